"""Every recipe in the small, against what was recorded of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import zoo

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Sums in another order, and twenty steps in which that grows.
TOLERANCE = 5e-3


@pytest.fixture(scope="module")
def golden():
    return json.loads(zoo.GOLDEN.read_text())


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_its_plans_and_first_losses_are_the_recorded_ones(name, golden):
    assert name in golden, f"record it: python tests/recipes/zoo.py {name}"
    recipe = zoo.made(name)
    assert zoo.plans(recipe) == golden[name]["plans"]
    np.testing.assert_allclose(
        zoo.losses(recipe), golden[name]["losses"], rtol=TOLERANCE
    )

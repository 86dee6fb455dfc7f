"""The worked examples at the head of the planner's files compute what they say."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    ["graph", "interaction", "keeping", "layout", "ranges", "remat"],
)
def test_the_example_at_the_head_of_a_file_holds(name):
    module = importlib.import_module(f"lepton_jax.planner.program.{name}")

    results = doctest.testmod(module)

    assert results.attempted > 0
    assert results.failed == 0

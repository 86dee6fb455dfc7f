"""Distances of pictures: the closed form, the floor, and the training pictures."""

from __future__ import annotations

import numpy as np
import pytest

import lepton_jax as lepton
from tools.bench import generation


def test_the_distance_is_that_of_the_fitted_normal_distributions():
    generator = np.random.default_rng(0)
    left = generator.normal(size=(200_000, 2)) * (1, 2)
    right = generator.normal(size=(200_000, 2)) * (3, 2) + (0, 5)
    # along each axis: squared difference of the means and of the deviations
    expected = 5**2 + (3 - 1) ** 2
    assert generation.frechet_distance(left, right) == pytest.approx(expected, rel=0.01)
    assert generation.frechet_distance(left, left) == pytest.approx(0, abs=1e-6)


def test_training_pictures_are_as_near_as_halves_and_others_are_farther():
    generator = np.random.default_rng(0)
    shape = (4000, 2, 2, 1)
    train = lepton.data.Arrays(generator.integers(0, 200, shape, np.uint8))
    test = lepton.data.Arrays(generator.integers(0, 200, shape, np.uint8))
    made = generator.uniform(0, 1, (2000, *shape[1:])).astype(np.float32)

    def judge(pictures):
        return pictures.reshape(len(pictures), -1), None

    found = generation._distances(judge, made, train, test)
    assert 0.2 < found["times_the_floor_training"] < 5
    assert found["times_the_floor_generated"] > 50
    assert found["distance_of_generated"] == pytest.approx(
        found["times_the_floor_generated"] * found["distance_of_real_halves"]
    )

"""Baselines of what makes pictures, against sampling and against least squares."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from lepton_jax.baselines import (
    NotHere,
    Samples,
    normal_direction,
    principal_components,
)

PIXELS = 6


def same(x):
    return x


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(PIXELS, PIXELS))
    rows = 1 + generator.normal(size=(6000, PIXELS)) @ mixing
    rows = rows.reshape(-1, 2, 3, 1)
    return Samples(rows[:5000], None, 5000), Samples(rows[5000:], None, 1000)


def test_no_linear_guess_of_the_way_to_the_noise_is_better(pictures):
    train, test = pictures
    guessed = normal_direction(train, test, preprocess=same).values["error"].mean()

    # least squares at each of some times, weighted as a sigmoid of a normal number
    generator = np.random.default_rng(1)
    x = train.inputs.reshape(5000, -1)
    errors = []
    for level in generator.normal(size=60):
        time = 1 / (1 + np.exp(-level))
        noise = generator.normal(size=x.shape)
        mixed = np.column_stack([(1 - time) * x + time * noise, np.ones(len(x))])
        fitted = np.linalg.lstsq(mixed, noise - x, rcond=None)[0]
        errors.append(np.square(mixed @ fitted - (noise - x)).mean())
    assert guessed == pytest.approx(np.mean(errors), rel=0.12)


def test_the_evidence_is_that_of_the_normal_distribution_of_the_components(pictures):
    train, test = pictures
    deviation = 0.5
    loss = principal_components(
        train, test, preprocess=same, latent=PIXELS, deviation=deviation
    ).values["evidence_loss"]
    x = train.inputs.reshape(5000, -1)
    # all components, each with at least the noise: the covariances themselves
    values, vectors = np.linalg.eigh(np.cov(x.T))
    covariances = (vectors * values.clip(deviation**2)) @ vectors.T
    law = multivariate_normal(x.mean(0), covariances)
    constant = PIXELS * np.log(2 * np.pi * deviation**2) / 2
    expected = -law.logpdf(test.inputs.reshape(1000, -1)) - constant
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_more_components_never_fit_the_training_pictures_worse(pictures):
    train, _ = pictures
    means = [
        principal_components(
            train, train, preprocess=same, latent=latent, deviation=0.5
        )
        .values["evidence_loss"]
        .mean()
        for latent in range(PIXELS + 1)
    ]
    assert np.all(np.diff(means) <= 1e-9)


def test_pictures_with_too_many_pixels_are_refused():
    large = Samples(np.zeros((2, 64, 64, 3)), None, 2)
    with pytest.raises(NotHere, match="12,288"):
        normal_direction(large, large, preprocess=same)

"""A normal distribution of all pixels, as the baseline of what makes pictures.

Both functions know means and covariances of the pixels and nothing else. What they
reach has a closed form, so nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples

# pixels of a picture up to which the covariances are worth their time: 32x32 in colour
MOST_PIXELS = 3072
MOST_ROWS = 10_000  # of the training pictures; assumption: enough for the covariances
SEED = 0  # of the noise
LOG_2_PI = np.log(2 * np.pi)


def normal_direction(
    train: Samples,
    test: Samples,
    *,
    preprocess: Callable[[Any], Any],
    pictures: str | None = None,
    metric: str = "error",
) -> Baseline:
    """Return the error of the best linear guess of the way from a picture to noise.

    For pictures x with the means m and the covariances C, noise e and a time t, the
    best linear guess of e - x from z = (1 - t) x + t e is

        -m + (t I - (1 - t) C) ((1 - t)^2 C + t^2 I)^-1 (z - (1 - t) m)

    Args:
      train: pictures, of which m and C are taken.
      test: pictures to guess for, each with one time and noise of its own, drawn as
        `models.Diffusion` draws them.
      preprocess: of the recipe.
      pictures: which of the inputs they are; None: all.
      metric: name of the metric that is the mean squared error.

    Raises:
      NotHere: the pictures have more pixels than MOST_PIXELS.
    """
    rows = _pixels(train, preprocess, pictures)
    mean, values, vectors = _spectrum(rows)
    generator = np.random.default_rng(SEED)
    away = (_pixels(test, preprocess, pictures) - mean) @ vectors
    time = 1 / (1 + np.exp(-generator.normal(size=(len(away), 1))))
    noise = generator.normal(size=away.shape)

    # in the basis of the covariances' eigenvectors, in which noise is noise still
    mixed = (1 - time) * away + time * noise
    gain = (time - (1 - time) * values) / ((1 - time) ** 2 * values + time**2)
    error = np.square(gain * mixed - (noise - away)).mean(axis=1)
    return Baseline(
        "a normal distribution",
        f"means and covariances of the pixels of {len(rows):,} training pictures",
        values={metric: error},
    )


def principal_components(
    train: Samples,
    test: Samples,
    *,
    preprocess: Callable[[Any], Any],
    latent: int,
    deviation: float,
    metric: str = "evidence_loss",
) -> Baseline:
    """Return the evidence of pictures under as many principal components as codes.

    A picture is W c + m plus noise with a fixed deviation, for a normal code c (Tipping
    and Bishop 1999, "Probabilistic principal component analysis"). The posterior of c
    is known, so the bound that a variational auto-encoder has is the evidence itself.

    Args:
      train: pictures, of which m and W are taken.
      test: pictures to measure.
      preprocess: of the recipe.
      latent: length of a code.
      deviation: of a pixel, as in `models.vae.evidence_loss`, whose constant is left
        out here too.
      metric: name of the metric that is the negative bound in nats.

    Raises:
      NotHere: the pictures have more pixels than MOST_PIXELS.
    """
    rows = _pixels(train, preprocess)
    mean, values, vectors = _spectrum(rows)
    largest = np.argsort(values)[::-1][:latent]
    noise = np.full(len(values), deviation**2)
    noise[largest] = np.maximum(values[largest], deviation**2)

    away = (_pixels(test, preprocess) - mean) @ vectors
    density = (away**2 / noise + np.log(noise) + LOG_2_PI).sum(axis=1) / 2
    constant = away.shape[1] * (LOG_2_PI + 2 * np.log(deviation)) / 2
    return Baseline(
        f"{latent} principal components",
        f"of the pixels of {len(rows):,} training pictures",
        values={metric: density - constant},
    )


def _pixels(
    samples: Samples,
    preprocess: Callable[[Any], Any],
    pictures: str | None = None,
) -> np.ndarray:
    """Return pictures as float64 (pictures, pixels)."""
    inputs = samples.inputs if pictures is None else samples.inputs[pictures]
    some = np.asarray(inputs)[:MOST_ROWS]
    pixels = np.asarray(preprocess(some), np.float64)
    pixels = pixels.reshape(len(pixels), -1)
    if pixels.shape[1] > MOST_PIXELS:
        raise NotHere(
            f"pictures of {pixels.shape[1]:,} numbers have too many covariances; at"
            f" most {MOST_PIXELS:,} are looked at"
        )
    return pixels


def _spectrum(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the means, and eigenvalues and eigenvectors of the covariances."""
    mean = rows.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    return mean, values.clip(0), vectors

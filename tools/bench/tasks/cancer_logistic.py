"""Breast cancer, standardized: logistic regression from 0."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

FLIPPED = 0.05  # share of the labels, so that the classes overlap


def task(data: Path) -> tasks.Task:
    """Return the task."""
    inputs, labels = tasks.sklearn("breast_cancer")
    flipped = np.random.default_rng(8).random(len(labels)) < FLIPPED
    targets = np.where(flipped, 1 - labels, labels).astype(np.float32)
    samples = Arrays(tasks.standardized(inputs), targets)
    return tasks.task_of(
        partial(tasks.ZeroLinear, 30),
        tasks.three(samples, 0.2, 0.35),
        400,
        32,
        loss=losses.binary_cross_entropy,
    )

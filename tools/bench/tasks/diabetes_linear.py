"""Diabetes: linear regression from 0, of targets from 25 to 346 as they are."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    inputs, targets = tasks.sklearn("diabetes")
    samples = Arrays(tasks.standardized(inputs), targets.astype(np.float32))
    return tasks.task_of(
        partial(tasks.ZeroLinear, 10),
        tasks.three(samples, 0.2, 0.3),
        400,
        32,
        loss=losses.squared_error,
    )

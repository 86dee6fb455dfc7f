"""Breast cancer, its 30 columns as they are, from 0.001 to 4,000: a small MLP."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    inputs, labels = tasks.sklearn("breast_cancer")
    samples = Arrays(inputs, labels.astype(np.int32))
    parts = tasks.three(samples, 0.2, 0.35)
    return tasks.task_of(partial(MLP, (30, 16, 2)), parts, 400, 32)

"""Generated classes, two samples a step: an MLP."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

SAMPLES = 4000
FEATURES = 8


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(16)
    points = random.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    score = points[:, 0] * points[:, 1] + points[:, 2] + 0.5 * points[:, 3]
    labels = (score + 0.5 * random.normal(size=SAMPLES) > 0).astype(np.int32)
    parts = tasks.three(Arrays(points, labels), 0.15, 0.3)
    return tasks.task_of(partial(MLP, (FEATURES, 32, 2)), parts, 800, 2)

"""Generated classes, five clusters each: an MLP with initial parameters times 10."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

CLASSES = 4
CLUSTERS = 5  # of a class
FEATURES = 12
SAMPLES = 6000
WIDTH = 1.3  # standard deviation of a cluster, whose center is from N(0, 1)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(4)
    centers = random.normal(size=(CLASSES * CLUSTERS, FEATURES))
    cluster = random.integers(0, len(centers), SAMPLES)
    spread = WIDTH * random.normal(size=(SAMPLES, FEATURES))
    points = (centers[cluster] + spread).astype(np.float32)
    samples = Arrays(points, (cluster % CLASSES).astype(np.int32))
    model = partial(MLP, (FEATURES, 32, 32, CLASSES))
    parts = tasks.three(samples, 0.1, 0.3)
    return tasks.task_of(tasks.scaled(model, 10), parts, 600, 64)

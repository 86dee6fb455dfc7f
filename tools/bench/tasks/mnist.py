"""MNIST: 784-128-10."""

from functools import partial
from pathlib import Path

import lepton_jax as lepton
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    train, test = lepton.data.idx(data / "mnist")
    train, validation = train.split(1 / 60, tasks.SPLIT_SEED)
    report, _ = test.split(0.75, tasks.SPLIT_SEED)
    return tasks.task_of(
        partial(MLP, (784, 128, 10)),
        (train, validation, report),
        800,
        128,
        preprocess=tasks.mnist_pixels,
    )

"""Small MNIST under SGD with momentum, some labels drawn anew: an MLP."""

from functools import partial
from pathlib import Path

import numpy as np
import optax

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    parts = []
    for seed, part in enumerate(tasks.small_mnist(data)):
        labels = tasks.relabeled(np.asarray(part.targets), 0.1, seed)
        parts.append(Arrays(part.inputs, labels))
    return tasks.task_of(
        partial(MLP, (196, 48, 10)),
        parts,
        480,
        64,
        preprocess=tasks.flat,
        optimizer=partial(optax.sgd, momentum=0.9),
    )

"""Small MNIST under LAMB: an MLP with dropout."""

from functools import partial
from pathlib import Path

import optax

from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    return tasks.task_of(
        partial(MLP, (196, 64, 10), dropout=0.2),
        tasks.small_mnist(data),
        400,
        128,
        preprocess=tasks.flat,
        optimizer=partial(optax.lamb, weight_decay=0.01),
    )

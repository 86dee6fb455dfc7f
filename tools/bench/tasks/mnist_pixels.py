"""Small MNIST, pixels from 0 to 255 as they are: an MLP."""

from functools import partial
from pathlib import Path

import jax

from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def _as_bytes(images: jax.Array) -> jax.Array:
    return 255 * tasks.flat(images)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    return tasks.task_of(
        partial(MLP, (196, 48, 10)),
        tasks.small_mnist(data),
        480,
        64,
        preprocess=_as_bytes,
    )

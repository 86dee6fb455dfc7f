"""scikit-learn's 8x8 digits: a small CNN with dropout; needs no folder."""

from functools import partial
from pathlib import Path

from lepton_jax.models import CNN
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    model = partial(
        CNN,
        10,
        size=(8, 8, 1),
        widths=(8, 16, 16),
        dense=32,
        dropout=0.3,
    )
    return tasks.task_of(model, tasks.three(tasks.digit_images(), 0.2, 0.35), 320, 64)

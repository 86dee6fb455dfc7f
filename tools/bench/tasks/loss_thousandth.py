"""scikit-learn's digits, a loss times 0.001, some labels drawn anew: a small CNN."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.models import CNN
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    images = tasks.digit_images()
    labels = tasks.relabeled(np.asarray(images.targets), 0.1)
    model = partial(CNN, 10, size=(8, 8, 1), widths=(6, 12), dense=24)
    return tasks.task_of(
        model,
        tasks.three(Arrays(images.inputs, labels), 0.2, 0.35),
        320,
        32,
        loss=tasks.multiplied(losses.cross_entropy, 1e-3),
    )

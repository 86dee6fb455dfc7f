"""scikit-learn's digits under Lion, a tenth of the labels drawn anew: an MLP."""

from functools import partial
from pathlib import Path

import numpy as np
import optax

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    images = tasks.digit_images()
    labels = tasks.relabeled(np.asarray(images.targets), 0.1)
    return tasks.task_of(
        partial(MLP, (64, 64, 10), dropout=0.2),
        tasks.three(Arrays(images.inputs, labels), 0.2, 0.35),
        400,
        64,
        preprocess=tasks.flat,
        optimizer=partial(optax.lion, weight_decay=0.01),
    )

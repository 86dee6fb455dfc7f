"""scikit-learn's digits, a third of the labels drawn anew in training and test: an MLP.

It overfits: the best rate is a low one.
"""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    images = tasks.digit_images()
    labels = tasks.relabeled(np.asarray(images.targets), 0.33)
    return tasks.task_of(
        partial(MLP, (64, 32, 10)),
        tasks.three(Arrays(images.inputs, labels), 0.2, 0.35),
        400,
        64,
        preprocess=tasks.flat,
    )

"""scikit-learn's digits: an autoencoder with a code of 6 numbers."""

from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task; the loss is in units of the pixels' variance."""
    pixels = np.asarray(tasks.digit_images().inputs).reshape(-1, 64)
    pixels = (pixels - pixels.mean(0)) / pixels.std()
    return tasks.task_of(
        partial(MLP, (64, 48, 6, 48, 64)),
        tasks.three(Arrays(pixels, pixels), 0.2, 0.3),
        600,
        64,
        loss=losses.squared_error,
    )

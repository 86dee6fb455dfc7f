"""scikit-learn's digits with smoothed labels: an MLP."""

from functools import partial
from pathlib import Path

import jax
import optax

from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

SMOOTHING = 0.1


def smoothed(outputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy with a tenth of each label spread over all classes."""
    wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), SMOOTHING)
    return optax.softmax_cross_entropy(outputs, wanted)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    return tasks.task_of(
        partial(MLP, (64, 48, 48, 10)),
        tasks.three(tasks.digit_images(), 0.2, 0.35),
        400,
        64,
        loss=smoothed,
        preprocess=tasks.flat,
    )

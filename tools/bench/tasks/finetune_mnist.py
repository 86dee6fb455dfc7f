"""An MLP trained on small MNIST's 0 to 4, fine-tuned on few of its 5 to 9."""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import optax

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

PRETRAINED = 400  # steps, AdamW, cosine from 0.003
FEW = 2000  # samples to fine-tune on
RELABELED = 0.1  # share of the labels
MODEL = partial(MLP, (196, 64, 32, 5))


def task(data: Path) -> tasks.Task:
    """Return the task; only the last layer is not taken over."""
    parts = [_digits(part, 5) for part in tasks.small_mnist(data)]
    parts[0] = tasks.first(parts[0], FEW)
    params = dict(_pretrained(data))
    layers = dict(params["layers"])
    layers.pop(max(layers))
    model = tasks.restored(MODEL, params | {"layers": layers})
    return tasks.task_of(model, parts, 400, 32, preprocess=tasks.flat)


def _digits(samples: Arrays, least: int) -> Arrays:
    """Return the samples of five digits, numbered from 0, some drawn anew."""
    labels = np.asarray(samples.targets)
    inputs, labels = samples.take(
        np.flatnonzero((labels >= least) & (labels < least + 5))
    )
    return Arrays(inputs, tasks.relabeled(labels - least, RELABELED))


@cache
def _pretrained(data: Path) -> Any:
    """Return the parameters after a training on 0 to 4."""
    train, few, _ = (_digits(part, 0) for part in tasks.small_mnist(data))
    schedule = optax.cosine_decay_schedule(0.003, PRETRAINED)
    recipe = tasks.recipe_of(MODEL, train, few, PRETRAINED, 64, preprocess=tasks.flat)
    return tasks.trained(recipe.with_(learning_rate=schedule))

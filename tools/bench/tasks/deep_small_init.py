"""Generated classes: six tanh layers, whose initial parameters are times 0.3."""

import itertools
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

FEATURES = 10
SAMPLES = 5000
LAYERS = 6
SMALLER = 0.3


class Deep(nnx.Module):
    """Layers of the same width, and logits."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        widths = (FEATURES, *[hidden] * LAYERS)
        self.layers = nnx.List(
            nnx.Linear(inside, outside, rngs=rngs)
            for inside, outside in itertools.pairwise(widths)
        )
        self.out = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, features) to logits (batch, 3)."""
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return self.out(x)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(11)
    points = random.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    plane = points[:, :3].sum(1) + np.sin(2 * points[:, 3])
    labels = np.digitize(plane + 0.5 * random.normal(size=SAMPLES), [-0.8, 0.8])
    model = tasks.scaled(partial(Deep, 24), SMALLER)
    parts = tasks.three(Arrays(points, labels.astype(np.int32)), 0.1, 0.2)
    return tasks.task_of(model, parts, 600, 64)

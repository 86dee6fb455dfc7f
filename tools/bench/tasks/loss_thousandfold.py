"""Generated regression whose loss is multiplied by 1,000: an MLP."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

SAMPLES = 5000
NOISE = 0.3


class Regression(nnx.Module):
    """An MLP with one output."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.mlp = MLP((6, 32, 32, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, 6) to (batch,)."""
        return self.mlp(x)[:, 0]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(13)
    x = random.normal(size=(SAMPLES, 6)).astype(np.float32)
    y = np.tanh(x[:, 0] + x[:, 1]) + 0.5 * x[:, 2] * np.cos(x[:, 3])
    y += NOISE * random.normal(size=SAMPLES)
    parts = tasks.three(Arrays(x, y.astype(np.float32)), 0.1, 0.2)
    loss = tasks.multiplied(losses.squared_error, 1e3)
    return tasks.task_of(Regression, parts, 600, 32, loss=loss)

"""A damped oscillation with noise, of one number: a tanh MLP."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

SAMPLES = 4000
NOISE = 0.15


class Curve(nnx.Module):
    """Three tanh layers."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.one = nnx.Linear(1, hidden, rngs=rngs)
        self.two = nnx.Linear(hidden, hidden, rngs=rngs)
        self.three = nnx.Linear(hidden, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, 1) to (batch,)."""
        x = nnx.tanh(self.one(x))
        x = nnx.tanh(self.two(x))
        return self.out(nnx.tanh(self.three(x)))[:, 0]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(15)
    x = random.uniform(-2, 2, (SAMPLES, 1)).astype(np.float32)
    y = np.exp(-(x[:, 0] ** 2) / 4) * np.sin(5 * x[:, 0])
    y += NOISE * random.normal(size=SAMPLES)
    parts = tasks.three(Arrays(x, y.astype(np.float32)), 0.1, 0.25)
    return tasks.task_of(partial(Curve, 32), parts, 800, 64, loss=losses.squared_error)

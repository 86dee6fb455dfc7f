"""Friedman's first function with noise: an MLP's 90 % quantile, by the pinball loss."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

SAMPLES = 6000
QUANTILE = 0.9


class Quantile(nnx.Module):
    """An MLP with one output."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.mlp = MLP((10, 32, 32, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, 10) to (batch,)."""
        return self.mlp(x)[:, 0]


def pinball(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the loss whose minimum is a quantile."""
    above = targets - outputs
    return jnp.maximum(QUANTILE * above, (QUANTILE - 1) * above)


def task(data: Path) -> tasks.Task:
    """Return the task; targets have a mean of 14 and a noise of 1."""
    random = np.random.default_rng(12)
    x = random.random((SAMPLES, 10)).astype(np.float32)
    y = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    y += 10 * x[:, 3] + 5 * x[:, 4] + random.normal(size=SAMPLES)
    parts = tasks.three(Arrays(x, y.astype(np.float32)), 0.1, 0.2)
    return tasks.task_of(Quantile, parts, 600, 64, loss=pinball)

"""Generated counts: an MLP of their mean's logarithm, under the Poisson deviance."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

FEATURES = 8
SAMPLES = 8000


class Rates(nnx.Module):
    """An MLP with one output."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.mlp = MLP((FEATURES, 32, 32, 1), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, features) to logarithms of means, (batch,)."""
        return self.mlp(x)[:, 0]


def deviance(outputs: jax.Array, counts: jax.Array) -> jax.Array:
    """Poisson deviance: about 1 for the true mean, 0 only where it hits each count."""
    log_counts = jnp.log(jnp.maximum(counts, 1))  # 0 log 0 = 0
    return 2 * (counts * (log_counts - outputs) - counts + jnp.exp(outputs))


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(5)
    inputs = random.normal(size=(SAMPLES, FEATURES)).astype(np.float32)
    log_mean = 1 + np.sin(2 * inputs[:, 0]) + 0.5 * inputs[:, 1] * inputs[:, 2]
    log_mean = np.clip(log_mean - 0.3 * inputs[:, 3], None, 4)
    counts = random.poisson(np.exp(log_mean)).astype(np.float32)
    parts = tasks.three(Arrays(inputs, counts), 0.1, 0.25)
    return tasks.task_of(Rates, parts, 600, 64, loss=deviance)

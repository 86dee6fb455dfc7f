"""Small MNIST, a tenth of the labels drawn anew: an MLP with batch normalization."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks


class Normalized(nnx.Module):
    """Two hidden layers, each normalized over the batch."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.one = nnx.Linear(196, hidden, use_bias=False, rngs=rngs)
        self.norm_one = nnx.BatchNorm(hidden, momentum=0.9, rngs=rngs)
        self.two = nnx.Linear(hidden, hidden, use_bias=False, rngs=rngs)
        self.norm_two = nnx.BatchNorm(hidden, momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, 196) to logits (batch, 10)."""
        x = nnx.relu(self.norm_one(self.one(x)))
        x = nnx.relu(self.norm_two(self.two(x)))
        return self.out(x)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    parts = []
    for seed, part in enumerate(tasks.small_mnist(data)):
        labels = tasks.relabeled(np.asarray(part.targets), 0.1, seed)
        parts.append(Arrays(part.inputs, labels))
    return tasks.task_of(partial(Normalized, 48), parts, 400, 64, preprocess=tasks.flat)

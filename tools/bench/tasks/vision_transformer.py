"""scikit-learn's digits, a tenth of the labels drawn anew: a vision transformer."""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

PATCHES = 16  # of 2 x 2 pixels


class ViT(nnx.Module):
    """Patches through one block of attention and MLP, and their mean to logits."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.patches = nnx.Linear(4, dim, rngs=rngs)
        places = 0.02 * jax.random.normal(rngs.params(), (PATCHES, dim))
        self.places = nnx.Param(places)
        self.before = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, dim, decode=False, rngs=rngs)
        self.between = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(dim, 2 * dim, rngs=rngs)
        self.down = nnx.Linear(2 * dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map (batch, 8, 8, 1) to logits (batch, 10)."""
        cut = images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)
        x = self.patches(cut.reshape(-1, PATCHES, 4)) + self.places[...]
        x = x + self.attention(self.before(x))
        x = x + self.down(nnx.gelu(self.up(self.between(x))))
        return self.out(x.mean(1))


def task(data: Path) -> tasks.Task:
    """Return the task."""
    images = tasks.digit_images()
    labels = tasks.relabeled(np.asarray(images.targets), 0.1)
    parts = tasks.three(Arrays(images.inputs, labels), 0.2, 0.35)
    return tasks.task_of(partial(ViT, 24), parts, 400, 32)

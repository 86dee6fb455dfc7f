"""Digits: vectors of two noisy views of an image are to agree (InfoNCE).

The views are drawn once for each sample. Each view is told from those of the other
samples of its batch, so the loss depends on the batch's size: validation and test are
of 250 samples each.
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

NOISE = 0.4  # standard deviation, of pixels from 0 to 1
TEMPERATURE = 0.2
HELD_OUT = 250  # samples of validation and test each


class Pairs(nnx.Module):
    """One MLP for both views."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.mlp = MLP((64, 64, width), rngs=rngs)

    def __call__(self, one: jax.Array, two: jax.Array) -> jax.Array:
        """Map two views, (batch, 64) each, to the logits of their pairs."""
        one, two = map(_normal, (self.mlp(one), self.mlp(two)))
        return one @ two.T / TEMPERATURE


def _normal(x: jax.Array) -> jax.Array:
    return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)


def told_apart(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy of each first view's own second view."""
    own = jnp.arange(logits.shape[0])
    return optax.softmax_cross_entropy_with_integer_labels(logits, own)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    pixels = np.asarray(tasks.digit_images().inputs).reshape(-1, 64)
    random = np.random.default_rng(9)
    one, two = (
        (pixels + NOISE * random.normal(size=pixels.shape)).astype(np.float32)
        for _ in range(2)
    )
    samples = Arrays({"one": one, "two": two}, np.zeros(len(pixels), np.float32))
    share = HELD_OUT / len(pixels)
    parts = tasks.three(samples, share, share)
    return tasks.task_of(partial(Pairs, 16), parts, 480, 64, loss=told_apart)

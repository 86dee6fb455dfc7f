"""A denoiser of 8x8 digits: it predicts the noise that was mixed in.

Noise and its level are drawn once for each sample of the data set, which holds each
image several times (Ho et al. 2020, "Denoising Diffusion Probabilistic Models").
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

COPIES = 16  # of each image


class Denoiser(nnx.Module):
    """An MLP of the mixed image and its level."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.mlp = MLP((66, hidden, hidden, 64), rngs=rngs)

    def __call__(self, image: jax.Array, angle: jax.Array) -> jax.Array:
        """Map (batch, 64) and the level (batch,) to the noise (batch, 64)."""
        level = jnp.stack([jnp.cos(angle), jnp.sin(angle)], -1)
        return self.mlp(jnp.concatenate([image, level], -1))


def task(data: Path) -> tasks.Task:
    """Return the task."""
    images = np.asarray(tasks.digit_images().inputs).reshape(-1, 64)
    images = np.tile(2 * images - 1, (COPIES, 1))
    random = np.random.default_rng(2)
    noise = random.normal(size=images.shape).astype(np.float32)
    angle = random.uniform(0.1, np.pi / 2, len(images)).astype(np.float32)
    mixed = np.cos(angle)[:, None] * images + np.sin(angle)[:, None] * noise
    samples = Arrays({"image": mixed, "angle": angle}, noise)
    return tasks.task_of(
        partial(Denoiser, 96),
        tasks.three(samples, 0.05, 0.1),
        600,
        64,
        loss=losses.squared_error,
    )

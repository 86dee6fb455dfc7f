"""Black and white digits, pixel by pixel: a masked autoencoder.

Germain et al. 2015, "MADE: Masked Autoencoder for Distribution Estimation".
"""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

PIXELS = 64


class Made(nnx.Module):
    """One hidden layer; each pixel's logit sees those before it alone."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        drawn = nnx.initializers.lecun_normal()
        self.up = nnx.Param(drawn(rngs.params(), (PIXELS, hidden)))
        self.up_bias = nnx.Param(jnp.zeros(hidden))
        self.down = nnx.Param(drawn(rngs.params(), (hidden, PIXELS)))
        self.down_bias = nnx.Param(jnp.zeros(PIXELS))
        self.degrees = 1 + np.arange(hidden) % (PIXELS - 1)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, 64) to logits (batch, 64)."""
        places = np.arange(1, PIXELS + 1)
        seen = places[:, None] <= self.degrees
        used = self.degrees[:, None] < places
        hidden = nnx.relu(x @ (self.up[...] * seen) + self.up_bias[...])
        return hidden @ (self.down[...] * used) + self.down_bias[...]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    pixels = np.asarray(tasks.digit_images().inputs).reshape(-1, PIXELS)
    bits = (pixels > 0.5).astype(np.float32)
    return tasks.task_of(
        partial(Made, 126),
        tasks.three(Arrays(bits, bits), 0.2, 0.3),
        480,
        32,
        loss=losses.binary_cross_entropy,
    )

"""Small MNIST: a variational autoencoder (Kingma & Welling 2013)."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

PIXELS = 196


class VAE(nnx.Module):
    """An encoder to mean and logarithm of the variance, and a decoder to logits."""

    def __init__(self, hidden: int, code: int, *, rngs: nnx.Rngs):
        self.encoder = MLP((PIXELS, hidden, 2 * code), rngs=rngs)
        self.decoder = MLP((code, hidden, PIXELS), rngs=rngs)
        self.noise = nnx.Dropout(0.0, rngs=rngs)  # has the mode, and the random stream

    def __call__(self, x: jax.Array) -> Any:
        """Map pixels (batch, 196) to logits of them and the loss of the code."""
        mean, log_variance = jnp.split(self.encoder(x), 2, -1)
        code = mean
        if not self.noise.deterministic:
            drawn = jax.random.normal(self.noise.rngs(), mean.shape)
            code = mean + jnp.exp(log_variance / 2) * drawn
        divergence = jnp.exp(log_variance) + mean**2 - 1 - log_variance
        return {"logits": self.decoder(code), "divergence": divergence.sum(-1) / 2}


def bound(outputs: Any, pixels: jax.Array) -> jax.Array:
    """Return the negative evidence lower bound of each image."""
    values = optax.sigmoid_binary_cross_entropy(outputs["logits"], pixels)
    return values.sum(-1) + outputs["divergence"]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    parts = []
    for part in tasks.small_mnist(data):
        pixels = np.asarray(part.inputs).reshape(-1, PIXELS)
        parts.append(Arrays(pixels, pixels))
    return tasks.task_of(partial(VAE, 64, 8), parts, 480, 64, loss=bound)

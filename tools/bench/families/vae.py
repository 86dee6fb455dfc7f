"""A variational autoencoder (Kingma and Welling 2014), convolutional or dense."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class VAE(nnx.Module):
    """Images to a latent normal, a draw of it, and the images again."""

    def __init__(
        self,
        side: int,
        widths: tuple[int, ...],
        latent: int,
        *,
        rngs: nnx.Rngs,
    ):
        conv = partial(
            nnx.Conv,
            kernel_size=(3, 3),
            strides=(2, 2),
            rngs=rngs,
        )
        back = partial(
            nnx.ConvTranspose,
            kernel_size=(3, 3),
            strides=(2, 2),
            rngs=rngs,
        )
        self.small = side // 2 ** len(widths)
        flat = self.small**2 * widths[-1]
        channels = (1, *widths)
        steps = list(itertools.pairwise(channels))
        self.encoder = nnx.List([conv(a, b) for a, b in steps])
        self.moments = nnx.Linear(
            flat,
            2 * latent,
            rngs=rngs,
        )
        self.enter = nnx.Linear(latent, flat, rngs=rngs)
        self.decoder = nnx.List([back(b, a) for a, b in steps[::-1]])
        self.rngs = rngs.fork()

    def __call__(
        self,
        images: jax.Array,
    ) -> dict[str, Any]:
        """Map (batch, side, side, 1) to images, means and log variances."""
        x = images
        for layer in self.encoder:
            x = nnx.relu(layer(x))
        moments = self.moments(
            x.reshape(
                x.shape[0],
                -1,
            )
        )
        mean, log_variance = jnp.split(
            moments,
            2,
            axis=-1,
        )
        noise = jax.random.normal(
            self.rngs.noise(),
            mean.shape,
            mean.dtype,
        )
        drawn = mean + jnp.exp(log_variance / 2) * noise
        y = self.enter(drawn).reshape(
            -1,
            self.small,
            self.small,
            x.shape[-1],
        )
        for layer in self.decoder:
            y = layer(nnx.relu(y))
        return {"images": y, "mean": mean, "log_variance": log_variance}


def loss(
    outputs: dict[str, Any],
    images: jax.Array,
) -> jax.Array:
    """Return error and divergence of each sample."""
    error = jnp.square(outputs["images"].astype(jnp.float32) - images)
    mean = outputs["mean"].astype(jnp.float32)
    log_variance = outputs["log_variance"].astype(jnp.float32)
    divergence = jnp.square(mean) + jnp.exp(log_variance) - log_variance - 1
    return error.sum(axis=(1, 2, 3)) + divergence.sum(axis=1) / 2


def case(draw: Draw) -> Case:
    """Draw the side, the widths and the latent dim."""
    side = 8 * draw.choice((4, 6, 8, 12))
    widths = [draw.width(16, 64)]
    for _ in range(draw.randint(1, 2)):
        widths.append(2 * widths[-1])
    images = shape(side, side, 1, dtype=jnp.float32)
    return Case(
        partial(
            VAE,
            side,
            tuple(widths),
            draw.width(16, 256),
        ),
        images,
        images,
        loss=loss,
        **draw.rest(),
    )

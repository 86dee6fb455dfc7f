"""MLP-Mixer (Tolstikhin et al. 2021), in Linen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Mixer(linen.Module):
    """Patches, and dense layers over patches and over channels in turn."""

    classes: int
    patch: int
    dim: int
    tokens: int
    channels: int
    layers: int

    @linen.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch, classes)."""
        sides = (self.patch, self.patch)
        x = linen.Conv(
            self.dim,
            sides,
            strides=sides,
        )(images)
        x = x.reshape(
            x.shape[0],
            -1,
            self.dim,
        )
        for _ in range(self.layers):
            across = jnp.swapaxes(
                linen.LayerNorm()(x),
                1,
                2,
            )
            hidden = linen.gelu(linen.Dense(self.tokens)(across))
            mixed = linen.Dense(x.shape[1])(hidden)
            x = x + jnp.swapaxes(mixed, 1, 2)
            hidden = linen.Dense(self.channels)(linen.LayerNorm()(x))
            x = x + linen.Dense(self.dim)(linen.gelu(hidden))
        x = linen.LayerNorm()(x).mean(axis=1)
        return linen.Dense(self.classes)(x)


def case(draw: Draw) -> Case:
    """Draw patches, widths and layers."""
    patch = draw.choice((4, 8, 16))
    side = patch * draw.choice((6, 8, 14))
    dim = draw.width(128, 1024)
    model = Mixer(
        draw.classes(),
        patch,
        dim,
        draw.width(64, 512),
        draw.width(dim, 4 * dim),
        draw.randint(1, 5),
    )
    return Case(
        model,
        shape(side, side, 3, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

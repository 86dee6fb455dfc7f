"""Vision transformer (Dosovitskiy et al. 2021)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import FeedForward


class Block(nnx.Module):
    """Flax's own attention, and a feed-forward layer."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads,
            dim,
            decode=False,
            rngs=rngs,
        )
        self.second = nnx.LayerNorm(dim, rngs=rngs)
        self.feed_forward = FeedForward(dim, hidden, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, patches, dim) to the same shape."""
        x = x + self.attention(self.first(x))
        return x + self.feed_forward(self.second(x))


class ViT(nnx.Module):
    """Patches, a class token, positions, blocks and the logits."""

    def __init__(
        self,
        classes: int,
        side: int,
        patch: int,
        dim: int,
        heads: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        sides = (patch, patch)
        patches = (side // patch) ** 2
        init = nnx.initializers.normal(0.02)
        self.patches = nnx.Conv(
            3,
            dim,
            sides,
            strides=sides,
            rngs=rngs,
        )
        self.label = nnx.Param(
            init(
                rngs.params(),
                (1, 1, dim),
            )
        )
        self.positions = nnx.Param(
            init(
                rngs.params(),
                (1, patches + 1, dim),
            )
        )
        self.blocks = nnx.List(
            [
                Block(
                    dim,
                    heads,
                    4 * dim,
                    rngs=rngs,
                )
                for _ in range(layers)
            ]
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.out = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch, classes)."""
        x = self.patches(images)
        x = x.reshape(
            x.shape[0],
            -1,
            x.shape[-1],
        )
        label = jnp.broadcast_to(
            self.label[...],
            (x.shape[0], 1, x.shape[-1]),
        )
        x = jnp.concatenate(
            [label.astype(x.dtype), x],
            axis=1,
        )
        x = x + self.positions[...].astype(x.dtype)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x[:, 0]))


def case(draw: Draw) -> Case:
    """Draw the images, the patches, the width and the layers."""
    patch = draw.choice((8, 14, 16))
    side = patch * draw.choice((6, 9, 14, 16))
    heads = draw.choice((2, 3, 4, 6, 12))
    dim = heads * max(
        4,
        int(draw.choice((32, 64)) * draw.scale),
    )
    model = partial(
        ViT,
        draw.classes(),
        side,
        patch,
        dim,
        heads,
        draw.randint(1, 4),
    )
    return Case(
        model,
        shape(side, side, 3, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

"""ConvNeXt (Liu et al. 2022): depthwise 7x7 convolutions and inverted bottlenecks."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Block(nnx.Module):
    """Depthwise convolution, norm, two dense layers, a learned scale."""

    def __init__(
        self,
        dim: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.depthwise = nnx.Conv(
            dim,
            dim,
            (7, 7),
            feature_group_count=dim,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(
            dim,
            4 * dim,
            rngs=rngs,
        )
        self.down = nnx.Linear(
            4 * dim,
            dim,
            rngs=rngs,
        )
        self.scale = nnx.Param(1e-6 * jnp.ones((dim,)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, side, side, dim) to the same shape."""
        y = self.norm(self.depthwise(x))
        y = self.down(nnx.gelu(self.up(y)))
        return x + self.scale[...].astype(y.dtype) * y


class ConvNeXt(nnx.Module):
    """Patches of 4, stages between which the side halves, and the logits."""

    def __init__(
        self,
        classes: int,
        widths: tuple[int, ...],
        depth: int,
        *,
        rngs: nnx.Rngs,
    ):
        conv = partial(nnx.Conv, rngs=rngs)
        self.layers = nnx.List()
        entering = 3
        for i, width in enumerate(widths):
            side = 2 if i else 4
            self.layers.append(
                conv(
                    entering,
                    width,
                    (side, side),
                    strides=(side, side),
                )
            )
            self.layers.append(nnx.LayerNorm(width, rngs=rngs))
            for _ in range(depth):
                self.layers.append(Block(width, rngs=rngs))
            entering = width
        self.out = nnx.Linear(entering, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch, classes)."""
        x = images
        for layer in self.layers:
            x = layer(x)
        return self.out(x.mean(axis=(1, 2)))


def case(draw: Draw) -> Case:
    """Draw the side, the widths of stages and their depth."""
    side = draw.choice((32, 64, 96, 128, 160))
    width = draw.width(32, 128)
    stages = draw.randint(2, 3)
    widths = tuple(width * 2**i for i in range(stages))
    return Case(
        partial(
            ConvNeXt,
            draw.classes(),
            widths,
            draw.randint(1, 2),
        ),
        shape(side, side, 3, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

"""DenseNet (Huang et al. 2017): each layer sees all earlier ones, concatenated."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Layer(nnx.Module):
    """Group norm, 1x1 and 3x3 convolutions; what is new is appended."""

    def __init__(
        self,
        entering: int,
        growth: int,
        *,
        rngs: nnx.Rngs,
    ):
        inner = 2 * growth
        self.norm = nnx.GroupNorm(
            entering,
            num_groups=1,
            rngs=rngs,
        )
        self.squeeze = nnx.Conv(
            entering,
            inner,
            (1, 1),
            rngs=rngs,
        )
        self.grow = nnx.Conv(
            inner,
            growth,
            (3, 3),
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, side, side, n) to (batch, side, side, n + growth)."""
        new = self.grow(nnx.relu(self.squeeze(nnx.relu(self.norm(x)))))
        return jnp.concatenate([x, new], axis=-1)


class DenseNet(nnx.Module):
    """Blocks of layers, transitions that halve side and channels, the logits."""

    def __init__(
        self,
        classes: int,
        growth: int,
        blocks: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
    ):
        channels = 2 * growth
        conv = partial(nnx.Conv, rngs=rngs)
        self.stem = conv(
            3,
            channels,
            (3, 3),
            strides=(2, 2),
        )
        self.blocks = nnx.List()
        self.transitions = nnx.List()
        for count in blocks:
            layers = []
            for _ in range(count):
                layers.append(Layer(channels, growth, rngs=rngs))
                channels += growth
            self.blocks.append(nnx.Sequential(*layers))
            self.transitions.append(
                conv(
                    channels,
                    channels // 2,
                    (1, 1),
                )
            )
            channels //= 2
        self.out = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch, classes)."""
        x = self.stem(images)
        for block, transition in zip(
            self.blocks,
            self.transitions,
            strict=True,
        ):
            x = transition(block(x))
            x = nnx.avg_pool(
                x,
                (2, 2),
                strides=(2, 2),
            )
        return self.out(x.mean(axis=(1, 2)))


def case(draw: Draw) -> Case:
    """Draw the side, the growth and the blocks."""
    side = draw.choice((32, 48, 64, 96))
    blocks = tuple(draw.randint(2, 4) for _ in range(draw.randint(1, 2)))
    growth = draw.width(16, 96)
    return Case(
        partial(DenseNet, draw.classes(), growth, blocks),
        shape(side, side, 3, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

"""ResNet (He et al. 2016) with batch norm and bottlenecks."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Bottleneck(nnx.Module):
    """Convolutions 1x1, 3x3 and 1x1, each normalized, and a shortcut."""

    def __init__(
        self,
        entering: int,
        width: int,
        stride: int,
        *,
        rngs: nnx.Rngs,
    ):
        conv = partial(nnx.Conv, use_bias=False, rngs=rngs)
        leaving = 4 * width
        strides = (stride, stride)
        self.convs = nnx.List(
            [
                conv(entering, width, (1, 1)),
                conv(
                    width,
                    width,
                    (3, 3),
                    strides=strides,
                ),
                conv(width, leaving, (1, 1)),
            ]
        )
        widths = (width, width, leaving)
        self.norms = nnx.List([nnx.BatchNorm(w, rngs=rngs) for w in widths])
        shortcut = None
        if stride > 1 or entering != leaving:
            shortcut = conv(
                entering,
                leaving,
                (1, 1),
                strides=strides,
            )
        self.shortcut = nnx.data(shortcut)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, side, side, entering) to a smaller side and 4 times `width`."""
        short = x if self.shortcut is None else self.shortcut(x)
        pairs = list(
            zip(
                self.convs,
                self.norms,
                strict=True,
            )
        )
        for conv, norm in pairs[:-1]:
            x = nnx.relu(norm(conv(x)))
        conv, norm = pairs[-1]
        return nnx.relu(norm(conv(x)) + short)


class ResNet(nnx.Module):
    """Stem, stages whose width doubles while the side halves, and the logits."""

    def __init__(
        self,
        classes: int,
        width: int,
        stages: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
    ):
        self.stem = nnx.Conv(
            3,
            width,
            (7, 7),
            strides=(2, 2),
            use_bias=False,
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.blocks = nnx.List()
        entering = width
        for i, count in enumerate(stages):
            inner = width * 2**i
            for j in range(count):
                stride = 2 if i and not j else 1
                block = Bottleneck(entering, inner, stride, rngs=rngs)
                self.blocks.append(block)
                entering = 4 * inner
        self.out = nnx.Linear(entering, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch, classes)."""
        x = nnx.relu(self.norm(self.stem(images)))
        x = nnx.max_pool(
            x,
            (3, 3),
            strides=(2, 2),
            padding="SAME",
        )
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(axis=(1, 2)))


def case(draw: Draw) -> Case:
    """Draw the side of images, the width and the stages."""
    side = draw.choice((32, 64, 96, 112, 160, 224))
    stages = tuple(draw.randint(1, 2) for _ in range(draw.randint(2, 3)))
    width = draw.width(32, 128)
    return Case(
        partial(ResNet, draw.classes(), width, stages),
        shape(side, side, 3, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

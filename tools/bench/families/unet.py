"""U-Net (Ronneberger et al. 2015): a label for each pixel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Double(nnx.Module):
    """Two convolutions with batch norm."""

    def __init__(
        self,
        entering: int,
        width: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.Conv(
            entering,
            width,
            (3, 3),
            rngs=rngs,
        )
        self.first_norm = nnx.BatchNorm(width, rngs=rngs)
        self.second = nnx.Conv(
            width,
            width,
            (3, 3),
            rngs=rngs,
        )
        self.second_norm = nnx.BatchNorm(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, side, side, entering) to `width` channels."""
        x = nnx.relu(self.first_norm(self.first(x)))
        return nnx.relu(self.second_norm(self.second(x)))


class UNet(nnx.Module):
    """Down with pooling, up with transposed convolutions, skips between."""

    def __init__(
        self,
        classes: int,
        widths: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
    ):
        self.down = nnx.List()
        entering = 3
        for width in widths:
            self.down.append(
                Double(
                    entering,
                    width,
                    rngs=rngs,
                )
            )
            entering = width
        self.enlarge = nnx.List()
        self.up = nnx.List()
        for width in widths[-2::-1]:
            self.enlarge.append(
                nnx.ConvTranspose(
                    entering,
                    width,
                    (2, 2),
                    strides=(2, 2),
                    rngs=rngs,
                )
            )
            self.up.append(
                Double(
                    2 * width,
                    width,
                    rngs=rngs,
                )
            )
            entering = width
        self.out = nnx.Conv(
            entering,
            classes,
            (1, 1),
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch, side, side, n)."""
        x = images
        skips = []
        for layer in self.down[:-1]:
            x = layer(x)
            skips.append(x)
            x = nnx.max_pool(
                x,
                (2, 2),
                strides=(2, 2),
            )
        x = self.down[-1](x)
        for enlarge, layer in zip(
            self.enlarge,
            self.up,
            strict=True,
        ):
            x = jnp.concatenate(
                [skips.pop(), enlarge(x)],
                axis=-1,
            )
            x = layer(x)
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw the side, the widths and how deep it is."""
    side = 8 * draw.choice((4, 8, 12, 16, 24))
    width = draw.width(16, 96)
    widths = tuple(width * 2**i for i in range(draw.randint(2, 4)))
    return Case(
        partial(
            UNet,
            draw.choice((2, 5, 21)),
            widths,
        ),
        shape(side, side, 3, dtype=jnp.float32),
        shape(side, side),
        **draw.rest(),
    )

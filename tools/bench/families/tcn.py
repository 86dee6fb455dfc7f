"""A temporal convolutional network (Bai et al. 2018): dilated causal convolutions."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Level(nnx.Module):
    """Two dilated convolutions and a shortcut."""

    def __init__(
        self,
        entering: int,
        width: int,
        taps: int,
        dilation: int,
        *,
        rngs: nnx.Rngs,
    ):
        conv = partial(
            nnx.Conv,
            kernel_size=(taps,),
            kernel_dilation=(dilation,),
            padding="CAUSAL",
            rngs=rngs,
        )
        self.first = conv(entering, width)
        self.second = conv(width, width)
        self.shortcut = nnx.Linear(entering, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, entering) to (batch, length, width)."""
        y = nnx.relu(self.first(x))
        y = nnx.relu(self.second(y))
        return nnx.relu(y + self.shortcut(x))


class TCN(nnx.Module):
    """Levels whose dilation doubles; a forecast of each next value."""

    def __init__(
        self,
        features: int,
        width: int,
        taps: int,
        levels: int,
        *,
        rngs: nnx.Rngs,
    ):
        widths = (features, *(width,) * (levels - 1))
        self.levels = nnx.List(
            [
                Level(entering, width, taps, 2**i, rngs=rngs)
                for i, entering in enumerate(widths)
            ]
        )
        self.out = nnx.Linear(width, features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, features) to the same shape."""
        for level in self.levels:
            x = level(x)
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw features, width, taps, levels and length."""
    features = draw.choice((1, 3, 16, 88))
    length = draw.length(64, 2048)
    model = partial(
        TCN,
        features,
        draw.width(64, 1024),
        draw.choice((2, 3, 5)),
        draw.randint(2, 5),
    )
    return Case(
        model,
        shape(length, features, dtype=jnp.float32),
        shape(length, features, dtype=jnp.float32),
        loss=lepton.losses.squared_error,
        **draw.rest(),
    )

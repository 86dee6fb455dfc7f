"""WaveNet (van den Oord et al. 2016): gated dilated convolutions with skips."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw

LEVELS = 256  # of a sample of sound


class Layer(nnx.Module):
    """A gated convolution, with a residual and a skip."""

    def __init__(
        self,
        width: int,
        skip: int,
        dilation: int,
        *,
        rngs: nnx.Rngs,
    ):
        conv = partial(
            nnx.Conv,
            width,
            width,
            (2,),
            kernel_dilation=(dilation,),
            padding="CAUSAL",
            rngs=rngs,
        )
        self.value = conv()
        self.gate = conv()
        self.residual = nnx.Conv(
            width,
            width,
            (1,),
            rngs=rngs,
        )
        self.skip = nnx.Conv(
            width,
            skip,
            (1,),
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Map (batch, length, width) to the same shape and (batch, length, skip)."""
        gated = nnx.tanh(self.value(x)) * nnx.sigmoid(self.gate(x))
        return x + self.residual(gated), self.skip(gated)


class WaveNet(nnx.Module):
    """Layers whose dilation doubles, and the next sample from the sum of skips."""

    def __init__(
        self,
        width: int,
        skip: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(LEVELS, width, rngs=rngs)
        self.layers = nnx.List(
            [
                Layer(
                    width,
                    skip,
                    2**i,
                    rngs=rngs,
                )
                for i in range(layers)
            ]
        )
        self.hidden = nnx.Linear(skip, skip, rngs=rngs)
        self.out = nnx.Linear(skip, LEVELS, rngs=rngs)

    def __call__(self, sound: jax.Array) -> jax.Array:
        """Map samples int32 (batch, length) to logits (batch, length, 256)."""
        x = self.embed(sound)
        total = 0.0
        for layer in self.layers:
            x, skip = layer(x)
            total = total + skip
        return self.out(nnx.relu(self.hidden(nnx.relu(total))))


def case(draw: Draw) -> Case:
    """Draw widths, layers and length."""
    length = draw.length(256, 4096)
    model = partial(
        WaveNet,
        draw.width(32, 256),
        draw.width(64, 512),
        draw.randint(2, 5),
    )
    return Case(
        model,
        shape(length),
        shape(length),
        **draw.rest(),
    )

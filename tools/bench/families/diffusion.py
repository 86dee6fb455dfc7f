"""A diffusion model: a residual U-Net that sees the time, with attention below."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Attention

LONGEST_WAVE = 10_000.0


def waves(
    times: jax.Array,
    dim: int,
) -> jax.Array:
    """Map times (batch,) to sines and cosines (batch, dim)."""
    rates = jnp.exp(-jnp.log(LONGEST_WAVE) * jnp.arange(dim // 2) / (dim // 2))
    angles = times[:, None] * rates
    return jnp.concatenate(
        [jnp.sin(angles), jnp.cos(angles)],
        axis=-1,
    )


class Residual(nnx.Module):
    """Two convolutions; between them a shift by the time."""

    def __init__(
        self,
        entering: int,
        width: int,
        time: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.first_norm = nnx.GroupNorm(
            entering,
            num_groups=1,
            rngs=rngs,
        )
        self.first = nnx.Conv(
            entering,
            width,
            (3, 3),
            rngs=rngs,
        )
        self.shift = nnx.Linear(time, width, rngs=rngs)
        self.second_norm = nnx.GroupNorm(
            width,
            num_groups=1,
            rngs=rngs,
        )
        self.second = nnx.Conv(
            width,
            width,
            (3, 3),
            rngs=rngs,
        )
        self.short = nnx.Conv(
            entering,
            width,
            (1, 1),
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        time: jax.Array,
    ) -> jax.Array:
        """Map (batch, side, side, entering) to `width` channels."""
        y = self.first(nnx.silu(self.first_norm(x)))
        y = y + self.shift(nnx.silu(time))[:, None, None, :]
        y = self.second(nnx.silu(self.second_norm(y)))
        return y + self.short(x)


class Diffusion(nnx.Module):
    """The noise in an image at a time."""

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.width = width
        time = 4 * width
        widths = [width * 2**i for i in range(depth)]
        make = partial(Residual, time=time, rngs=rngs)
        self.time = nnx.Linear(
            2 * (width // 2),
            time,
            rngs=rngs,
        )
        self.enter = nnx.Conv(
            3,
            width,
            (3, 3),
            rngs=rngs,
        )
        self.down = nnx.List(
            [
                make(
                    w // 2 if i else w,
                    w,
                )
                for i, w in enumerate(widths)
            ]
        )
        self.attention = Attention(
            widths[-1],
            heads,
            rngs=rngs,
        )
        self.middle = make(
            widths[-1],
            widths[-1],
        )
        self.up = nnx.List(
            [
                make(
                    2 * w,
                    w // 2 if w > width else w,
                )
                for w in widths
            ]
        )
        self.out = nnx.Conv(
            width,
            3,
            (3, 3),
            rngs=rngs,
        )

    def __call__(
        self,
        images: jax.Array,
        times: jax.Array,
    ) -> jax.Array:
        """Map images (batch, side, side, 3) and times (batch,) to noise."""
        time = self.time(waves(times, self.width))
        x = self.enter(images)
        time = time.astype(x.dtype)
        skips = []
        for layer in self.down:
            x = layer(x, time)
            skips.append(x)
            x = nnx.avg_pool(
                x,
                (2, 2),
                strides=(2, 2),
            )
        flat = x.reshape(
            x.shape[0],
            -1,
            x.shape[-1],
        )
        x = x + self.attention(flat).reshape(x.shape)
        x = self.middle(x, time)
        for layer in self.up[::-1]:
            skip = skips.pop()
            x = jax.image.resize(x, skip.shape, "nearest")
            x = layer(
                jnp.concatenate([x, skip], axis=-1),
                time,
            )
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw the side, the width and how deep it is."""
    side = draw.choice((16, 32, 48, 64))
    width = draw.width(32, 160)
    width -= width % 4
    model = partial(
        Diffusion,
        width,
        draw.randint(1, 2),
        draw.choice((1, 2, 4)),
    )
    inputs = {
        "images": shape(
            side,
            side,
            3,
            dtype=jnp.float32,
        ),
        "times": shape(dtype=jnp.float32),
    }
    return Case(
        model,
        inputs,
        shape(side, side, 3, dtype=jnp.float32),
        loss=lepton.losses.squared_error,
        **draw.rest(),
    )

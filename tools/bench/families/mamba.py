"""Mamba-like language model: a gated linear recurrence by an associative scan."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import scan, stack


def combine(
    left: tuple[jax.Array, jax.Array],
    right: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Compose two steps x -> decay * x + added."""
    decay = left[0] * right[0]
    return decay, right[0] * left[1] + right[1]


class Block(nnx.Module):
    """Short convolution, selective state, gate; added to its input."""

    def __init__(
        self,
        dim: int,
        inner: int,
        states: int,
        *,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.states = states
        self.norm = nnx.RMSNorm(dim, rngs=rngs)
        self.enter = linear(dim, 2 * inner)
        self.taps = nnx.Conv(
            inner,
            inner,
            (4,),
            padding="CAUSAL",
            feature_group_count=inner,
            rngs=rngs,
        )
        self.select = linear(inner, 2 * states)
        self.step = nnx.Linear(inner, inner, rngs=rngs)
        rates = jnp.broadcast_to(
            jnp.arange(1.0, states + 1),
            (inner, states),
        )
        self.log_rate = nnx.Param(jnp.log(rates))
        self.skip = nnx.Param(jnp.ones((inner,)))
        self.out = linear(inner, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        value, gate = jnp.split(
            self.enter(self.norm(x)),
            2,
            axis=-1,
        )
        value = nnx.silu(self.taps(value))
        write, read = jnp.split(
            self.select(value),
            2,
            axis=-1,
        )
        step = nnx.softplus(self.step(value))
        decay = jnp.exp(-step[..., None] * jnp.exp(self.log_rate[...]))
        added = (step * value)[..., None] * write[:, :, None, :]
        _, state = jax.lax.associative_scan(
            combine,
            (decay, added),
            axis=1,
        )
        mixed = jnp.einsum("blis,bls->bli", state, read) + self.skip[...] * value
        return x + self.out(mixed.astype(x.dtype) * nnx.silu(gate))


class Mamba(nnx.Module):
    """The language model."""

    def __init__(
        self,
        vocab: int,
        block: tuple[int, int, int],
        layers: int,
        loop: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.loop = loop
        self.embed = nnx.Embed(
            vocab,
            block[0],
            rngs=rngs,
        )
        if loop:
            self.blocks = stack(
                lambda r: Block(*block, rngs=r),
                layers,
                rngs,
            )
        else:
            made = [Block(*block, rngs=rngs) for _ in range(layers)]
            self.blocks = nnx.List(made)
        self.norm = nnx.RMSNorm(
            block[0],
            rngs=rngs,
        )
        self.out = nnx.Linear(
            block[0],
            vocab,
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        if self.loop:
            x = scan(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.out(self.norm(x))


def case(draw: Draw) -> Case:
    """Draw widths, states, length, layers, and whether they are a loop."""
    dim = draw.width(128, 1024)
    block = (dim, 2 * dim, draw.choice((4, 8, 16)))
    loop = draw.random() < 0.6
    layers = draw.randint(2, 12) if loop else draw.randint(1, 2)
    length = draw.length(64, 512)
    model = partial(
        Mamba,
        draw.vocabulary(),
        block,
        layers,
        loop,
    )
    return Case(
        model,
        shape(length),
        shape(length),
        ids=model.args[0],
        **draw.rest(),
    )

"""RWKV-like language model: linear attention with decay, in chunks or in a loop."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


def shifted(x: jax.Array) -> jax.Array:
    """Return (batch, length, dim) one place later; the first place is zero."""
    return jnp.pad(
        x,
        ((0, 0), (1, 0), (0, 0)),
    )[:, :-1]


class TimeMix(nnx.Module):
    """Keys and values gathered into a state a head, which decays by each token."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads = heads
        self.mix = nnx.Param(0.5 * jnp.ones((4, dim)))
        self.decay = nnx.Param(
            jnp.linspace(
                -6.0,
                -1.0,
                dim,
            )
        )
        self.receptance = linear(dim, dim)
        self.key = linear(dim, dim)
        self.value = linear(dim, dim)
        self.gate = linear(dim, dim)
        self.out = linear(dim, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        batch, length, dim = x.shape
        earlier = shifted(x)
        mix = self.mix[...].astype(x.dtype)
        layers = (self.receptance, self.key, self.value, self.gate)
        mixed = [
            layer(x * share + earlier * (1 - share))
            for layer, share in zip(layers, mix, strict=True)
        ]
        *parts, gate = mixed
        shape = (batch, length, self.heads, dim // self.heads)
        query, key, value = (p.reshape(shape).swapaxes(0, 1) for p in parts)
        decay = jnp.exp(-jnp.exp(self.decay[...])).reshape(shape[2:])

        def turn(
            state: jax.Array,
            token: tuple,
        ) -> tuple[jax.Array, jax.Array]:
            query, key, value = token
            read = jnp.einsum("bhk,bhkv->bhv", query, state)
            added = jnp.einsum("bhk,bhv->bhkv", key, value)
            return state * decay[..., None] + added, read.astype(x.dtype)

        state = jnp.zeros((batch, self.heads, shape[3], shape[3]))
        _, read = jax.lax.scan(
            turn,
            state,
            (query, key, value),
        )
        return self.out(read.swapaxes(0, 1).reshape(x.shape) * nnx.silu(gate))


class ChannelMix(nnx.Module):
    """A feed-forward layer with a squared rectifier and a gate."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.key = nnx.Linear(dim, hidden, rngs=rngs)
        self.value = nnx.Linear(hidden, dim, rngs=rngs)
        self.receptance = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        hidden = jnp.square(nnx.relu(self.key(x)))
        return nnx.sigmoid(self.receptance(shifted(x))) * self.value(hidden)


class RWKV(nnx.Module):
    """The language model."""

    def __init__(
        self,
        vocab: int,
        dim: int,
        heads: int,
        hidden: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.mixers = nnx.List()
        self.norms = nnx.List()
        for _ in range(layers):
            self.mixers.append(
                TimeMix(
                    dim,
                    heads,
                    rngs=rngs,
                )
            )
            self.mixers.append(
                ChannelMix(
                    dim,
                    hidden,
                    rngs=rngs,
                )
            )
            self.norms.append(nnx.LayerNorm(dim, rngs=rngs))
            self.norms.append(nnx.LayerNorm(dim, rngs=rngs))
        self.out = nnx.Linear(
            dim,
            vocab,
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        for norm, mixer in zip(
            self.norms,
            self.mixers,
            strict=True,
        ):
            x = x + mixer(norm(x))
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw heads, widths, layers and length."""
    heads = draw.choice((2, 3, 4, 8))
    dim = heads * max(
        4,
        int(draw.choice((32, 64)) * draw.scale),
    )
    length = draw.length(32, 256)
    model = partial(
        RWKV,
        draw.vocabulary(),
        dim,
        heads,
        draw.width(2 * dim, 4 * dim),
        draw.randint(1, 3),
    )
    return Case(
        model,
        shape(length),
        shape(length),
        ids=model.args[0],
        **draw.rest(),
    )

"""T5-like encoder and decoder: relative position biases, cross attention."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw

FURTHEST = 32  # distances that have a bias of their own


class BiasedAttention(nnx.Module):
    """Attention with a bias for each head and distance, in place of positions."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head: int,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.causal = causal
        self.shape = (heads, head)
        self.query = linear(dim, heads * head)
        self.key = linear(dim, heads * head)
        self.value = linear(dim, heads * head)
        self.out = linear(heads * head, dim)
        self.bias = nnx.Embed(
            2 * FURTHEST + 1,
            heads,
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array,
    ) -> jax.Array:
        """Map (batch, length, dim) over (batch, keys, dim) to the former's shape."""
        query, key, value = (
            layer(source).reshape(
                *source.shape[:2],
                *self.shape,
            )
            for layer, source in (
                (self.query, x),
                (self.key, memory),
                (self.value, memory),
            )
        )
        here = jnp.arange(x.shape[1])[:, None]
        distance = jnp.arange(memory.shape[1]) - here
        near = jnp.clip(distance, -FURTHEST, FURTHEST) + FURTHEST
        bias = self.bias(near).transpose(2, 0, 1)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) + bias
        if self.causal:
            scores = jnp.where(distance <= 0, scores, -1e9)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return self.out(
            mixed.reshape(
                *x.shape[:2],
                -1,
            )
        )


class Layer(nnx.Module):
    """Self-attention, cross attention in a decoder, and a feed-forward layer."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head: int,
        decodes: bool,
        *,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.RMSNorm(dim, rngs=rngs) for _ in range(3)])
        self.inner = BiasedAttention(
            dim,
            heads,
            head,
            decodes,
            rngs=rngs,
        )
        cross = None
        if decodes:
            cross = BiasedAttention(dim, heads, head, False, rngs=rngs)
        self.cross = nnx.data(cross)
        self.up = linear(dim, 4 * dim)
        self.down = linear(4 * dim, dim)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
    ) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        first, second, third = self.norms
        normed = first(x)
        x = x + self.inner(normed, normed)
        if self.cross is not None:
            x = x + self.cross(second(x), memory)
        return x + self.down(nnx.relu(self.up(third(x))))


class T5(nnx.Module):
    """Source tokens to target tokens."""

    def __init__(
        self,
        vocab: int,
        layer: tuple[int, int, int],
        encoders: int,
        decoders: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(
            vocab,
            layer[0],
            rngs=rngs,
        )
        encoder = [
            Layer(
                *layer,
                False,
                rngs=rngs,
            )
            for _ in range(encoders)
        ]
        decoder = [
            Layer(
                *layer,
                True,
                rngs=rngs,
            )
            for _ in range(decoders)
        ]
        self.encoder = nnx.List(encoder)
        self.decoder = nnx.List(decoder)
        self.norm = nnx.RMSNorm(
            layer[0],
            rngs=rngs,
        )

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
    ) -> jax.Array:
        """Map int32 (batch, n) and (batch, m) to logits (batch, m, vocab)."""
        memory = self.embed(source)
        for layer in self.encoder:
            memory = layer(memory)
        x = self.embed(target)
        for layer in self.decoder:
            x = layer(x, memory)
        return self.embed.attend(self.norm(x))


def case(draw: Draw) -> Case:
    """Draw heads, widths, lengths and layers."""
    layer = (
        draw.width(256, 1024),
        draw.choice((2, 3, 4, 6, 8)),
        max(8, int(64 * draw.scale)),
    )
    source = draw.length(64, 1024)
    target = draw.length(32, 512)
    model = partial(
        T5,
        draw.vocabulary(),
        layer,
        draw.randint(1, 2),
        draw.randint(1, 2),
    )
    return Case(
        model,
        {"source": shape(source), "target": shape(target)},
        shape(target),
        ids=model.args[0],
        **draw.rest(),
    )

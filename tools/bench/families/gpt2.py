"""GPT-2: learned positions, layer norms before, biases, a tied head, dropout."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Block(nnx.Module):
    """Attention from one joint projection, and a feed-forward layer."""

    def __init__(
        self,
        dim: int,
        heads: int,
        rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.joint = nnx.Linear(
            dim,
            3 * dim,
            rngs=rngs,
        )
        self.out = nnx.Linear(dim, dim, rngs=rngs)
        self.second = nnx.LayerNorm(dim, rngs=rngs)
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
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        batch, length, dim = x.shape
        joint = self.joint(self.first(x))
        heads = (batch, length, self.heads, dim // self.heads)
        query, key, value = (
            p.reshape(heads)
            for p in jnp.split(
                joint,
                3,
                axis=-1,
            )
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / heads[-1] ** 0.5
        mask = jnp.tril(
            jnp.ones(
                (length, length),
                bool,
            )
        )
        weights = jax.nn.softmax(
            jnp.where(mask, scores, -1e9),
            axis=-1,
        )
        mixed = jnp.einsum(
            "bhqk,bkhd->bqhd",
            self.dropout(weights),
            value,
        )
        x = x + self.dropout(self.out(mixed.reshape(x.shape)))
        hidden = nnx.gelu(self.up(self.second(x)))
        return x + self.dropout(self.down(hidden))


class GPT2(nnx.Module):
    """The language model."""

    def __init__(
        self,
        vocab: int,
        length: int,
        dim: int,
        heads: int,
        layers: int,
        rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.tokens = nnx.Embed(vocab, dim, rngs=rngs)
        self.positions = nnx.Embed(length, dim, rngs=rngs)
        self.blocks = nnx.List(
            [
                Block(
                    dim,
                    heads,
                    rate,
                    rngs=rngs,
                )
                for _ in range(layers)
            ]
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.tokens.attend(self.norm(x))


def case(draw: Draw) -> Case:
    """Draw heads, layers, length, vocabulary and dropout."""
    heads = draw.choice((2, 3, 5, 6, 8, 12))
    head = max(
        4,
        int(draw.choice((32, 64, 80)) * draw.scale),
    )
    length = draw.length(128, 1024)
    model = partial(
        GPT2,
        draw.vocabulary(),
        length,
        heads * head,
        heads,
        draw.randint(1, 4),
        draw.choice((0.0, 0.0, 0.1)),
    )
    return Case(
        model,
        shape(length),
        shape(length),
        ids=model.args[0],
        **draw.rest(),
    )

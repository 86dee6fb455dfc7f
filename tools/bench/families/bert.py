"""BERT: both directions, norms after, segments, masked words."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Attention, FeedForward

MASKED = 0.15  # of the tokens count in the loss, as in BERT


class Layer(nnx.Module):
    """Attention and a feed-forward layer, each normalized after it is added."""

    def __init__(
        self,
        dim: int,
        heads: int,
        rate: float,
        *,
        rngs: nnx.Rngs,
    ):
        self.attention = Attention(dim, heads, rngs=rngs)
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.feed_forward = FeedForward(dim, 4 * dim, rngs=rngs)
        self.second = nnx.LayerNorm(dim, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        x = self.first(x + self.dropout(self.attention(x)))
        return self.second(x + self.dropout(self.feed_forward(x)))


class BERT(nnx.Module):
    """The encoder, with a transform before the tied head."""

    def __init__(
        self,
        vocab: int,
        length: int,
        layer: tuple[int, int, float],
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        dim = layer[0]
        self.tokens = nnx.Embed(vocab, dim, rngs=rngs)
        self.positions = nnx.Embed(length, dim, rngs=rngs)
        self.segments = nnx.Embed(2, dim, rngs=rngs)
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        made = [Layer(*layer, rngs=rngs) for _ in range(layers)]
        self.layers = nnx.List(made)
        self.transform = nnx.Linear(dim, dim, rngs=rngs)
        self.last = nnx.LayerNorm(dim, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((vocab,)))

    def __call__(
        self,
        tokens: jax.Array,
        segments: jax.Array,
    ) -> jax.Array:
        """Map int32 (batch, length), twice, to logits (batch, length, vocab)."""
        places = self.positions(jnp.arange(tokens.shape[1]))
        x = self.tokens(tokens) + self.segments(segments) + places
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x)
        x = self.last(nnx.gelu(self.transform(x)))
        logits = self.tokens.attend(x)
        return logits + self.bias[...].astype(logits.dtype)


def masked_loss(
    logits: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return cross-entropy of each token, and which tokens count."""
    chances = jax.nn.log_softmax(logits.astype(jnp.float32))
    chosen = jnp.take_along_axis(
        chances,
        targets[..., None],
        axis=-1,
    )
    counts = targets % 100 < 100 * MASKED
    return -chosen[..., 0], counts.astype(jnp.float32)


def case(draw: Draw) -> Case:
    """Draw vocabulary, length, heads and layers."""
    heads = draw.choice((2, 4, 6, 8, 12))
    dim = heads * max(
        4,
        int(draw.choice((32, 64)) * draw.scale),
    )
    length = draw.length(64, 512)
    layer = (dim, heads, draw.choice((0.0, 0.1)))
    return Case(
        partial(
            BERT,
            draw.vocabulary(),
            length,
            layer,
            draw.randint(1, 4),
        ),
        {"tokens": shape(length), "segments": shape(length)},
        shape(length),
        loss=masked_loss,
        **draw.rest(),
    )

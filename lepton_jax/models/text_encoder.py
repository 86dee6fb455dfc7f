"""A Transformer encoder that classifies texts."""

from __future__ import annotations

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.transformer import rotary

PADDING = 0  # the token that fills a text up
THETA = 10_000.0  # base of the rotary frequencies (Su et al. 2021, section 3.3)
WIDENING = 4  # of the feed-forward layer (Vaswani et al. 2017, section 3.3)


class EncoderLayer(nnx.Module):
    """Attention in both directions and a feed-forward layer, each added to its inputs.

    The inputs of both are normalized (Xiong et al. 2020, "On Layer Normalization in the
    Transformer Architecture", figure 1b).

    Args:
      dim: width of the inputs and outputs.
      heads: number of heads, a divisor of dim.
      turned: whether queries and keys are turned by their positions.
      dropout: share of the outputs of either part dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        turned: bool,
        dropout: float,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.turned = turned
        linear = partial(nnx.Linear, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.query = linear(dim, dim)
        self.key = linear(dim, dim)
        self.value = linear(dim, dim)
        self.mix = linear(dim, dim)
        self.feed_forward_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = linear(dim, WIDENING * dim)
        self.down = linear(WIDENING * dim, dim)
        self.dropout = dropout_layer(dropout, rngs)

    def __call__(self, x: jax.Array, present: jax.Array) -> jax.Array:
        """Map x (batch, length, dim) to the same shape.

        Args:
          x: of each token.
          present: bool (batch, length); the others are not attended to.
        """
        x = x + self._dropped(self._attended(self.attention_norm(x), present))
        hidden = nnx.gelu(self.up(self.feed_forward_norm(x)))
        return x + self._dropped(self.down(hidden))

    def _attended(self, x: jax.Array, present: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        shape = (batch, length, self.heads, -1)
        query = self.query(x).reshape(shape)
        key = self.key(x).reshape(shape)
        if self.turned:
            query = rotary(query, THETA)
            key = rotary(key, THETA)
        mixed = jax.nn.dot_product_attention(
            query,
            key,
            self.value(x).reshape(shape),
            mask=present[:, None, None, :],
        )
        return self.mix(mixed.reshape(batch, length, -1))

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.dropout is None:
            return x
        return self.dropout(x)


class TextEncoder(nnx.Module):
    """Embedding, layers of attention, the mean over the text, and logits.

    Args:
      classes: number of logits.
      vocab: rows of the embedding; token 0 is padding.
      dim: width of the residual stream.
      layers: number of layers.
      heads: heads of each, a divisor of dim.
      positions: "rotary" (Su et al. 2021, "RoFormer"), or "learned", a vector for each
        place, which needs `length`.
      length: tokens of a text, for learned positions.
      dropout: share of the embeddings, of what is added in each layer, and of the mean
        dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: the heads do not divide the width, or positions are not known.
    """

    def __init__(
        self,
        classes: int,
        vocab: int,
        *,
        dim: int = 64,
        layers: int = 2,
        heads: int = 4,
        positions: Literal["rotary", "learned"] = "rotary",
        length: int | None = None,
        dropout: float = 0.1,
        rngs: nnx.Rngs,
    ):
        if dim % (2 * heads):
            raise ValueError(f"dim {dim} must be a multiple of 2 * {heads} heads")
        if positions not in ("rotary", "learned"):
            raise ValueError(f"positions is {positions!r}, not 'rotary' or 'learned'")
        if positions == "learned" and length is None:
            raise ValueError("learned positions need a length")
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        is_learned = positions == "learned"
        self.places = nnx.Embed(length or 1, dim, rngs=rngs) if is_learned else None
        layer = partial(
            EncoderLayer,
            dim,
            heads,
            turned=not is_learned,
            dropout=dropout,
            rngs=rngs,
        )
        self.layers = nnx.List([layer() for _ in range(layers)])
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.dropout = dropout_layer(dropout, rngs)
        self.out = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, classes)."""
        present = tokens != PADDING
        x = self.embed(tokens)
        if self.places is not None:
            x = x + self.places(jnp.arange(tokens.shape[1]))
        x = self._dropped(x)

        # an empty text attends to its padding: all masked would be NaN
        is_empty = ~present.any(axis=1, keepdims=True)
        for layer in self.layers:
            x = layer(x, present | is_empty)

        weight = present[..., None].astype(x.dtype)
        total = (self.norm(x) * weight).sum(axis=1)
        mean = total / jnp.maximum(weight.sum(axis=1), 1)
        return self.out(self._dropped(mean))

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.dropout is None:
            return x
        return self.dropout(x)

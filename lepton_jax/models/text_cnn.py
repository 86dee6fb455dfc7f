"""A convolutional classifier of texts."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer

PADDING = 0  # the token that fills a text up


class TextCNN(nnx.Module):
    """Convolutions over words, and their largest value over the text.

    It is the network of Kim 2014, "Convolutional Neural Networks for Sentence
    Classification", section 2: filters of several widths over the embeddings, ReLU, the
    maximum over time, dropout, and a linear layer. Embeddings of padding are zero. A
    window begins at each word, and may hang over the end of the text.

    Args:
      classes: number of logits.
      vocab: rows of the embedding; token 0 is padding.
      dim: width of an embedding.
      widths: words that the filters see at a time.
      filters: number of filters of each width.
      dropout: share of the maxima dropped in training.
      word_dropout: share of the words whose embedding is zero in training (Iyyer et al.
        2015, "Deep Unordered Composition", section 3.1).
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        classes: int,
        vocab: int,
        *,
        dim: int = 64,
        widths: Sequence[int] = (3, 4, 5),
        filters: int = 64,
        dropout: float = 0.5,
        word_dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.convolutions = nnx.List(
            [
                nnx.Conv(dim, filters, width, padding=((0, width - 1),), rngs=rngs)
                for width in widths
            ]
        )
        self.dropout = dropout_layer(dropout, rngs)
        whole = nnx.Dropout(word_dropout, broadcast_dims=(2,), rngs=rngs)
        self.word_dropout = whole if word_dropout else None
        self.out = nnx.Linear(len(widths) * filters, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, classes)."""
        is_word = (tokens != PADDING)[..., None]
        x = jnp.where(is_word, self.embed(tokens), 0)
        if self.word_dropout is not None:
            x = self.word_dropout(x)

        maxima = []
        for layer in self.convolutions:
            # a window that begins at padding must not win by its bias
            windows = jnp.where(is_word, nnx.relu(layer(x)), 0)
            maxima.append(windows.max(axis=1))
        features = jnp.concatenate(maxima, axis=-1)
        if self.dropout is not None:
            features = self.dropout(features)
        return self.out(features)

"""A classifier of texts by the words in them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.mlp import MLP

PADDING = 0  # the token that fills a text up


class BagOfWords(nnx.Module):
    """Logits of a text: an MLP on the mean of its tokens' embeddings.

    The order of the words does not count; see Joulin et al. 2016, "Bag of Tricks for
    Efficient Text Classification". Tokens that stand for pairs of words bring some of
    the order back.

    Args:
      classes: number of logits.
      vocab: rows of the embedding; token 0 is padding.
      dim: width of an embedding.
      hidden: widths of the hidden layers; none: the classic linear model.
      dropout: share of the units dropped in training, of the mean and of the hidden
        layers.
      word_dropout: share of the words that are left out of the mean in training (Iyyer
        et al. 2015, "Deep Unordered Composition", section 3.1).
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        classes: int,
        vocab: int,
        *,
        dim: int = 64,
        hidden: Sequence[int] = (),
        dropout: float = 0.0,
        word_dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.dropout = dropout_layer(dropout, rngs)
        whole = nnx.Dropout(word_dropout, broadcast_dims=(2,), rngs=rngs)
        self.word_dropout = whole if word_dropout else None
        self.head = MLP((dim, *hidden, classes), dropout=dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens, int32 (batch, length), to logits (batch, classes)."""
        is_word = (tokens != PADDING)[..., None]
        words = jnp.where(is_word, self.embed(tokens), 0)
        if self.word_dropout is not None:
            words = self.word_dropout(words)
        # those that are left are scaled up, so the count stays that of all
        mean = words.sum(1) / jnp.maximum(is_word.sum(1), 1)
        if self.dropout is not None:
            mean = self.dropout(mean)
        return self.head(mean)

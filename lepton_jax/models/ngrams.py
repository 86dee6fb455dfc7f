"""A linear classifier of texts by their n-grams, alone or next to a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.tabm import mean_of_outputs

PADDING = 0  # the id that fills a text's list up


class Ratios(nnx.Variable):
    """Scales of the n-grams: part of the model's state, but not trained."""


class NgramLinear(nnx.Module):
    """Logits of a text: the sum of the weights of the n-grams that are in it.

    Each n-gram is scaled by its log-count ratio of each class (Wang & Manning 2012,
    "Baselines and Bigrams", section 2.3): with equal weights this is naive Bayes, with
    trained ones their NB-SVM. In training, n-grams are dropped at random and the rest
    is scaled up (Wang & Manning 2013, "Fast dropout training", section 2): that keeps a
    frequent one from answering for a rare one.

    Args:
      classes: number of logits.
      vocab: ids of n-grams, with 0, which is padding.
      ratios: the scales, (vocab, classes); None: all are 1.
      start: every weight at the beginning; the bias starts at 0.
      dropout: share of the n-grams of a text that are dropped in training.
      rngs: stream `dropout`, with dropout.

    Raises:
      ValueError: the ratios have another shape.
    """

    def __init__(
        self,
        classes: int,
        vocab: int,
        *,
        ratios: Any = None,
        start: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        shape = (vocab, classes)
        if ratios is not None and np.shape(ratios) != shape:
            raise ValueError(f"ratios have shape {np.shape(ratios)}, not {shape}")
        scales = jnp.ones(shape) if ratios is None else jnp.asarray(ratios, "float32")
        self.ratios = Ratios(scales)
        self.weights = nnx.Param(jnp.full(shape, start, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(classes))
        self.dropout = dropout_layer(dropout, rngs)

    def __call__(self, ngrams: jax.Array) -> jax.Array:
        """Map ids of distinct n-grams, (batch, count), to logits (batch, classes)."""
        scaled = self.weights[...] * self.ratios[...]
        present = (ngrams != PADDING).astype(scaled.dtype)
        if self.dropout is not None:
            present = self.dropout(present)
        each = jnp.take(scaled, ngrams, axis=0)
        return jnp.einsum("bn,bnc->bc", present, each) + self.bias[...]


def mean_by_shares(outputs: jax.Array, shares: Sequence[float]) -> jax.Array:
    """Return the weighted mean over members of logits (batch, members, ...).

    Args:
      outputs: logits of the members.
      shares: weight of each member.
    """
    weights = jnp.asarray(shares, outputs.dtype)
    return jnp.einsum("bm...,m->b...", outputs, weights / weights.sum())


class WithNgrams(nnx.Module):
    """An ensemble of a network of tokens and of linear models of n-grams.

    The linear models know each rare n-gram by itself, the network what similar words
    have in common: they make different mistakes. Trained on the sum of their logits,
    the one that learns faster would leave the others nothing to learn; so in training
    the outputs are those of each member, and the loss is to be a mean of the members'
    losses (`lepton_jax.losses.of_members`). Outside of it `merge` gives one output a
    row.

    Args:
      network: makes the network of tokens from the rngs.
      words: makes the model of words and runs of words, such as `NgramLinear`, from the
        rngs.
      characters: makes the model of runs of characters.
      merge: logits of the members (batch, members, classes) to (batch, classes).
      rngs: streams of all.
    """

    def __init__(
        self,
        network: Callable[..., Any],
        words: Callable[..., Any],
        characters: Callable[..., Any],
        *,
        merge: Callable[[jax.Array], jax.Array] = mean_of_outputs,
        rngs: nnx.Rngs,
    ):
        self.deterministic = False
        self.merge = merge
        self.network = network(rngs=rngs)
        self.words = words(rngs=rngs)
        self.characters = characters(rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        words: jax.Array,
        characters: jax.Array,
    ) -> jax.Array:
        """Map a text's ids, int32, to logits.

        Args:
          tokens: (batch, length).
          words: ids of the n-grams of words, (batch, count).
          characters: ids of those of characters, (batch, count).

        Returns:
          (batch, 3, classes) in training, else (batch, classes).
        """
        logits = [
            self.network(tokens),
            self.words(words),
            self.characters(characters),
        ]
        outputs = jnp.stack(logits, axis=1)
        return self.merge(outputs) if self.deterministic else outputs

"""A multi-layer perceptron for tables of numbers and categories."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx

from lepton_jax.models.tabular_front import (
    Edges,
    Scaled,
    TabularFront,
    dropout_of,
)

__all__ = ["Edges", "TabularMLP"]


class TabularMLP(TabularFront):
    """An MLP on features of the numbers and embeddings of the categories.

    By default the features of a number are its piecewise-linear code; see
    `TabularFront` for it, and for trained ones.

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      edges: each number's ascending bin edges; fewer than two make no bins.
      sizes: how many indices each category has; 0 stands for missing or unseen.
      hidden: widths of the hidden layers.
      embedding: width of a category's embedding.
      dropout: share of the hidden units that are dropped in training.
      center: the outputs are center + spread * the last layer's, so that a quantity far
        from 0 and 1 can be learned in its own unit; a number, or one for each output.
      spread: see `center`.
      front: further arguments of `TabularFront`, such as its kind of numbers.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: there are neither numbers nor categories, edges do not ascend, or the
        dropout is no share.
    """

    def __init__(
        self,
        outputs: int | None,
        *,
        edges: Sequence[Sequence[float]] = (),
        sizes: Sequence[int] = (),
        hidden: Sequence[int] = (256, 128),
        embedding: int = 8,
        dropout: float = 0.0,
        center: float | Sequence[float] = 0.0,
        spread: float | Sequence[float] = 1.0,
        front: dict[str, Any] | None = None,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            edges=edges,
            sizes=sizes,
            embedding=embedding,
            rngs=rngs,
            **(front or {}),
        )
        self.head = Scaled(outputs, center, spread)
        widths = (self.width, *hidden, self.head.width)
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        self.dropout = dropout_of(dropout, rngs)

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Map rows of a table to outputs (batch, outputs), or (batch,).

        Args:
          numbers: float32 (batch, a), NaN where missing.
          categories: int32 (batch, c).
        """
        x = self.features(numbers, categories)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
            if self.dropout is not None:
                x = self.dropout(x)
        return self.head(self.layers[-1](x))

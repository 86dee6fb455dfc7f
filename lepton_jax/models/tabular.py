"""A multi-layer perceptron for tables of numbers and categories."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Edges(nnx.Variable):
    """Bin edges: part of the model's state, but not trained."""


class TabularMLP(nnx.Module):
    """An MLP on codes of the numbers and embeddings of the categories.

    The code of a number is piecewise linear (Gorishniy et al. 2022, "On Embeddings for
    Numerical Features in Tabular Deep Learning", section 3.2, equation 1). It has an
    entry for each bin: 1 for bins below the number, 0 for bins above, and the number's
    position in its own bin; the outermost bins go on beyond the edges. Then comes an
    entry that is 1 if the number is missing (NaN), in which case the others are 0. With
    the edges 0, 10, 20 and 40:

        number    5     15    60    -5    NaN
        code    0.5      1     1  -0.5      0   0 to 10
                  0    0.5     1     0      0   10 to 20
                  0      0     2     0      0   20 to 40
                  0      0     0     0      1   missing

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      edges: each number's ascending bin edges; fewer than two make no bins.
      sizes: how many indices each category has; 0 stands for missing or unseen.
      hidden: widths of the hidden layers.
      embedding: width of a category's embedding.
      dropout: share of the hidden units that are dropped in training.
      center: the outputs are center + spread * the last layer's, so that a quantity far
        from 0 and 1 can be learned in its own unit.
      spread: see `center`.
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
        center: float = 0.0,
        spread: float = 1.0,
        rngs: nnx.Rngs,
    ):
        if not (edges or sizes):
            raise ValueError("a table needs numbers (edges) or categories (sizes)")
        self.scalar = outputs is None
        self.center = center
        self.spread = spread
        self.starts = tuple(itertools.accumulate(sizes, initial=0))[:-1]
        table = _padded(edges)
        self.edges = Edges(jnp.asarray(table)) if edges else None
        embed = partial(
            nnx.Embed,
            embedding_init=self._init,
            rngs=rngs,
        )
        self.embed = embed(sum(sizes), embedding) if sizes else None

        # A number's code has as many entries as edges: there is a bin less than edges,
        # but one entry for missing.
        inputs = table.size + embedding * len(sizes)
        widths = (inputs, *hidden, 1 if outputs is None else outputs)
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(widths)]
        )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def _init(
        self,
        key: jax.Array,
        shape: Sequence[int],
        dtype: jnp.dtype,
    ) -> jax.Array:
        # Index 0 of each category starts at zero: a value that training never showed
        # says nothing.
        table = 0.1 * jax.random.normal(key, shape, dtype)
        return table.at[jnp.asarray(self.starts)].set(0)

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
        as_made = (self.edges is None, self.embed is None)
        if (numbers is None, categories is None) != as_made:
            raise ValueError(
                "the model and its inputs must have the same blocks of numbers and"
                " categories"
            )
        parts = []
        if self.edges is not None and numbers is not None:
            codes = _codes(numbers, self.edges[...])
            parts.append(codes.reshape(numbers.shape[0], -1))
        if self.embed is not None and categories is not None:
            rows = categories + jnp.asarray(self.starts, jnp.int32)
            parts.append(self.embed(rows).reshape(categories.shape[0], -1))

        x = jnp.concatenate(parts, axis=-1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
            if self.dropout is not None:
                x = self.dropout(x)
        x = self.center + self.spread * self.layers[-1](x)
        return x[:, 0] if self.scalar else x


def _padded(edges: Sequence[Sequence[float]]) -> np.ndarray:
    """Return edges as float32 (a, most edges).

    Shorter rows are filled up with their last edge, which makes bins of no width.
    """
    longest = max([2, *map(len, edges)])
    table = np.zeros((len(edges), longest), np.float32)
    for row, ascending in zip(table, edges, strict=True):
        if len(ascending):
            row[: len(ascending)] = ascending
            row[len(ascending) :] = ascending[-1]

    is_ascending = (np.diff(table) >= 0).all()
    if not (np.isfinite(table).all() and is_ascending):
        raise ValueError("bin edges must be finite and ascending")
    return table


def _codes(numbers: jax.Array, edges: jax.Array) -> jax.Array:
    """Return the codes (batch, a, bins + 1) of numbers (batch, a)."""
    low = edges[:, :-1]
    high = edges[:, 1:]
    width = high - low
    # the outermost bins have no end
    floor = jnp.where(
        jnp.arange(low.shape[1]) == 0,
        -jnp.inf,
        0.0,
    )
    ceiling = jnp.where(
        high == edges[:, -1:],
        jnp.inf,
        1.0,
    )

    missing = jnp.isnan(numbers)[..., None]
    above_low = jnp.where(missing, 0, numbers[..., None]) - low
    position = above_low / jnp.where(width > 0, width, 1)
    is_there = (width > 0) & ~missing
    code = jnp.where(
        is_there,
        jnp.clip(position, floor, ceiling),
        0,
    )
    return jnp.concatenate(
        [code, missing.astype(code.dtype)],
        axis=-1,
    )

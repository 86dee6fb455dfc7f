"""A multi-layer perceptron for tables of numbers and categories."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Edges(nnx.Variable):
    """Bin edges: part of the model's state, but not trained."""


class TabularMLP(nnx.Module):
    """Piecewise-linear codes of the numbers and embeddings of the categories, through
    an MLP.

    The code of a number (Gorishniy et al. 2022, "On Embeddings for Numerical Features
    in Tabular Deep Learning", section 3.2, equation 1) has an entry for each bin: 1 for
    bins below it, 0 for bins above, and its position in its own bin; the outermost bins
    go on beyond the edges. Then comes an entry that is 1 if the number is missing
    (NaN), in which case the others are 0.

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      edges: of each number, its ascending bin edges; fewer than two make no bins.
      sizes: of each category, how many indices it has; 0 stands for missing or unseen.
      hidden: widths of the hidden layers.
      embedding: width of a category's embedding.
      dropout: share of the hidden units that are dropped in training.
      center, spread: the outputs are center + spread * the last layer's, so that a
        quantity far from 0 and 1 can be learned in its own unit.
      rngs: streams `params` and, with dropout, `dropout`.
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
        self.embed = (
            nnx.Embed(
                sum(sizes),
                embedding,
                embedding_init=self._init,
                rngs=rngs,
            )
            if sizes
            else None
        )
        # As many entries as edges: there is a bin less than edges, but one entry for
        # missing.
        widths = (
            table.size + embedding * len(sizes),
            *hidden,
            1 if outputs is None else outputs,
        )
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
        return (
            (0.1 * jax.random.normal(key, shape, dtype))
            .at[jnp.asarray(self.starts)]
            .set(0)
        )

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Numbers float32 (batch, a), categories int32 (batch, c) to outputs (batch,
        outputs), or (batch,).
        """
        if (numbers is None, categories is None) != (
            self.edges is None,
            self.embed is None,
        ):
            raise ValueError(
                "the model and its inputs must have the same blocks of numbers and"
                " categories"
            )
        parts = []
        if self.edges is not None and numbers is not None:
            parts.append(_codes(numbers, self.edges[...]).reshape(numbers.shape[0], -1))
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
    """Edges as float32 (a, most edges), shorter rows filled up with their last edge:
    bins of no width.
    """
    longest = max([2, *map(len, edges)])
    rows = [
        (*row, *[row[-1]] * (longest - len(row))) if len(row) else (0.0,) * longest
        for row in edges
    ]
    table = np.asarray(rows, np.float32).reshape(len(rows), longest)
    if not (np.isfinite(table).all() and (np.diff(table) >= 0).all()):
        raise ValueError("bin edges must be finite and ascending")
    return table


def _codes(numbers: jax.Array, edges: jax.Array) -> jax.Array:
    """Numbers (batch, a) to codes (batch, a, bins + 1)."""
    low = edges[:, :-1]
    high = edges[:, 1:]
    width = high - low
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
    position = (jnp.where(missing, 0, numbers[..., None]) - low) / jnp.where(
        width > 0, width, 1
    )
    code = jnp.where(
        (width > 0) & ~missing,
        jnp.clip(position, floor, ceiling),
        0,
    )
    return jnp.concatenate(
        [code, missing.astype(code.dtype)],
        axis=-1,
    )

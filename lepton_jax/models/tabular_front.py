"""The front of models for tables: numbers and categories to features.

Numbers are read by the edges of their bins, quantiles of the training rows. The code of
a number is piecewise linear (Gorishniy et al. 2022, "On Embeddings for Numerical
Features in Tabular Deep Learning", section 3.2, equation 1). It has an entry for each
bin: 1 for bins below the number, 0 for bins above, and the number's position in its
own bin; the outermost bins go on beyond the edges. Then comes an entry that is 1 if the
number is missing (NaN), in which case the others are 0. With the edges 0, 10, 20, 40:

    number    5     15    60    -5    NaN
    code    0.5      1     1  -0.5      0   0 to 10
              0    0.5     1     0      0   10 to 20
              0      0     2     0      0   20 to 40
              0      0     0     0      1   missing
    rank    1/6    1/2   4/3  -1/6      -   the mean over the bins
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models.dropping import dropout_layer

KINDS = ("codes", "linear", "piecewise", "periodic")
FREQUENCIES = 48  # of a periodic embedding (Gorishniy et al. 2022, appendix E.6)
# Standard deviation of the frequencies at first, per unit of a number that has mean 0
# and variance 1 over the training rows: the best of 0.1, 1, 2 and 4 by likelihood on a
# validation fifth of Adult's training file (tuned between 0.01 and 10 in the paper).
FREQUENCY_SPREAD = 4.0
UNIT_VARIANCE = math.sqrt(12)  # times a rank, which is uniform over [0, 1]


class Edges(nnx.Variable):
    """Bin edges: part of the model's state, but not trained."""


class TabularFront(nnx.Module):
    """Numbers and categories of a table as one row of features.

    Numbers by `kind`, where z is the number's rank among its edges with mean 0 and
    variance 1, and all weights but those said to be shared are a number's own:

      codes: the code, without weights.
      linear: w z + b, which Gorishniy et al. 2021 give to FT-Transformer.
      piecewise: relu(w z + b + V code); V begins at zero, so that training begins with
        the linear part (Gorishniy et al. 2024, "TabM", appendix D.8).
      periodic: relu(W [cos 2 pi c z, sin 2 pi c z] + b) with trained frequencies c and
        a shared W and b: PLR(lite) of Gorishniy et al. 2023, "TabR", section 3.

    A missing number has a code of its own, and a trained vector in the other kinds.

    Args:
      edges: each number's ascending bin edges; fewer than two make no bins.
      sizes: how many indices each category has; 0 stands for missing or unseen.
      embedding: width of a category's embedding.
      kind: one of KINDS.
      number_width: features of a number, unless it is its code.
      activation: whether "piecewise" ends with relu.
      spread: see FREQUENCY_SPREAD.
      rngs: stream `params`.

    Raises:
      ValueError: there are neither numbers nor categories, edges do not ascend, or the
        kind is not known.
    """

    def __init__(
        self,
        *,
        edges: Sequence[Sequence[float]] = (),
        sizes: Sequence[int] = (),
        embedding: int = 8,
        kind: str = "codes",
        number_width: int = 16,
        activation: bool = True,
        spread: float = FREQUENCY_SPREAD,
        rngs: nnx.Rngs,
    ):
        if not (edges or sizes):
            raise ValueError("a table needs numbers (edges) or categories (sizes)")
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of numbers; use one of {KINDS}")
        self.kind = kind
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
        number = table.shape[1] if kind == "codes" else number_width
        self.widths = (*[number] * len(edges), *[embedding] * len(sizes))
        is_trained = bool(edges) and kind != "codes"
        embedding_of = partial(
            _Numbers,
            kind,
            table.shape,
            number_width,
            activation,
            spread,
        )
        self.numbers = embedding_of(rngs) if is_trained else None

    @property
    def width(self) -> int:
        """Count of features of a row."""
        return sum(self.widths)

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

    def blocks(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> list[jax.Array]:
        """Return the features of the numbers, of the categories, or of both in turn.

        Args:
          numbers: float32 (batch, a), NaN where missing.
          categories: int32 (batch, c).

        Returns:
          Arrays (batch, columns, features of a column).

        Raises:
          ValueError: a block is there that the model was not made for, or is missing.
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
            if self.numbers is not None:
                codes = self.numbers(codes, self.edges[...])
            parts.append(codes)
        if self.embed is not None and categories is not None:
            rows = categories + jnp.asarray(self.starts, jnp.int32)
            parts.append(self.embed(rows))
        return parts

    def features(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Return the features of rows, (batch, width); see `blocks`."""
        parts = self.blocks(numbers, categories)
        flat = [part.reshape(part.shape[0], -1) for part in parts]
        return jnp.concatenate(flat, axis=-1)

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Return the features of rows, (batch, width); see `blocks`."""
        return self.features(numbers, categories)


class Scaled(nnx.Module):
    """Outputs in their own unit: center + spread * those of the last layer.

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      center: a number, or one for each output.
      spread: see `center`.
    """

    def __init__(
        self,
        outputs: int | None,
        center: float | Sequence[float],
        spread: float | Sequence[float],
    ):
        self.scalar = outputs is None
        self.width = 1 if outputs is None else outputs
        self.center = _plain(center)
        self.spread = _plain(spread)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., width) to (..., outputs), or (...)."""
        center = jnp.asarray(self.center, x.dtype)
        spread = jnp.asarray(self.spread, x.dtype)
        x = center + spread * x
        return x[..., 0] if self.scalar else x


def dropout_of(
    share: float,
    rngs: nnx.Rngs,
) -> nnx.Dropout | None:
    """Return a dropout of a share of the units; None for a share of 0.

    Raises:
      ValueError: it is no share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"dropout is {share}; it must be at least 0 and below 1")
    return dropout_layer(share, rngs)


# ---- internals ----


def _plain(value: float | Sequence[float]) -> float | tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else value


class _Numbers(nnx.Module):
    """Trained embeddings of numbers, from their codes.

    Args:
      kind: one of KINDS but "codes".
      shape: count of numbers, and of a number's edges.
      width: features of a number.
      activation: whether "piecewise" ends with relu.
      spread: of the frequencies.
      rngs: stream `params`.
    """

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int],
        width: int,
        activation: bool,
        spread: float,
        rngs: nnx.Rngs,
    ):
        count, entries = shape
        self.kind = kind
        self.activation = activation
        self.missing = nnx.Param(jnp.zeros((count, width)))
        if kind == "periodic":
            key = rngs.params()
            drawn = spread * jax.random.normal(key, (count, FREQUENCIES))
            self.frequencies = nnx.Param(drawn)
            self.shared = nnx.Linear(2 * FREQUENCIES, width, rngs=rngs)
            return
        limit = 1 / math.sqrt(width)
        uniform = partial(
            jax.random.uniform,
            shape=(count, width),
            minval=-limit,
            maxval=limit,
        )
        self.weight = nnx.Param(uniform(rngs.params()))
        self.bias = nnx.Param(uniform(rngs.params()))
        if kind == "piecewise":
            self.pieces = nnx.Param(jnp.zeros((count, entries - 1, width)))

    def __call__(
        self,
        codes: jax.Array,
        edges: jax.Array,
    ) -> jax.Array:
        """Map codes (batch, a, entries) to features (batch, a, width)."""
        positions = codes[..., :-1]
        is_missing = codes[..., -1:] > 0
        bins = (edges[:, 1:] > edges[:, :-1]).sum(axis=1)
        rank = positions.sum(axis=-1) / jnp.maximum(bins, 1)
        z = (UNIT_VARIANCE * (rank - 0.5))[..., None]

        if self.kind == "periodic":
            angle = 2 * jnp.pi * self.frequencies[...] * z
            waves = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
            features = nnx.relu(self.shared(waves))
        else:
            features = self.weight[...] * z + self.bias[...]
        if self.kind == "piecewise":
            features += jnp.einsum(
                "bae,aew->baw",
                positions,
                self.pieces[...],
            )
            if self.activation:
                features = nnx.relu(features)
        return jnp.where(
            is_missing,
            self.missing[...],
            features,
        )


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

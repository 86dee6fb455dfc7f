"""Inputs of a model as one table of numbers, for methods that take nothing else.

numbers      minus the mean, over the standard deviation; a gap is 0, and 1 in a
             column that says so
categories   a column for each frequent value
pixels       over 255, so that all weigh alike
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lepton_jax.baselines.baseline import NotHere, Samples

# Values of a category that get a column of their own; the others share one. Assumption:
# those that a thousand rows say something about.
MOST_VALUES = 100
# Columns of an array of bytes from which on they are pixels, and not categories:
# assumption, digits of 8 x 8 are the smallest images.
FEWEST_PIXELS = 64
IMAGE_DIMS = 3  # rows, height and width, or more
MOST_COLUMNS = 4000  # of all features: more makes a cheap method slow; assumption
LEAST_SPREAD = 1e-6  # standard deviation of a column that says something


@dataclass(frozen=True)
class _Numbers:
    """Scaling of columns of numbers."""

    mean: np.ndarray
    spread: np.ndarray
    gaps: np.ndarray  # numbers of the columns that have gaps

    def columns(self, leaf: np.ndarray) -> np.ndarray:
        missing = ~np.isfinite(leaf)
        scaled = (
            np.where(
                missing,
                self.mean,
                leaf,
            )
            - self.mean
        ) / self.spread
        return np.concatenate(
            [scaled, missing[:, self.gaps]],
            axis=1,
        )


@dataclass(frozen=True)
class _Categories:
    """Values of each column that have a column of their own."""

    values: list[np.ndarray]

    def columns(self, leaf: np.ndarray) -> np.ndarray:
        parts = [
            column[:, None] == known
            for column, known in zip(
                leaf.T,
                self.values,
                strict=True,
            )
        ]
        return np.concatenate(parts, axis=1)


@dataclass(frozen=True)
class _Pixels:
    """Scaling of the pixels of an image, all alike."""

    largest: float

    def columns(self, leaf: np.ndarray) -> np.ndarray:
        return np.nan_to_num(leaf) / self.largest


class Features:
    """A table of numbers of a model's inputs, fitted on training rows.

    Args:
      train: the rows.

    Raises:
      NotHere: the inputs make more columns than a cheap method takes.
    """

    def __init__(self, train: Samples):
        self._parts = [_fitted(leaf) for leaf in _leaves(train.inputs)]
        self.count = self.of(
            train.inputs,
            rows=1,
        ).shape[1]
        if self.count > MOST_COLUMNS:
            raise NotHere(
                f"the inputs make {self.count:,} columns, more than {MOST_COLUMNS:,}"
            )

    def of(self, inputs: Any, rows: int | None = None) -> np.ndarray:
        """Return the features of inputs: float32 (rows, count).

        Args:
          inputs: an array, or a dict of them.
          rows: how many of them, from the first one; None: all.
        """
        leaves = [leaf[:rows] for leaf in _leaves(inputs)]
        columns = [
            part.columns(
                leaf.reshape(
                    len(leaf),
                    -1,
                )
            )
            for part, leaf in zip(
                self._parts,
                leaves,
                strict=True,
            )
        ]
        return np.concatenate(
            columns,
            axis=1,
            dtype=np.float32,
        )


def _leaves(inputs: Any) -> list[np.ndarray]:
    """Return the arrays of a model's inputs."""
    return [np.asarray(leaf) for leaf in jax.tree.leaves(inputs)]


def _fitted(leaf: np.ndarray) -> Any:
    is_image = leaf.ndim >= IMAGE_DIMS
    leaf = leaf.reshape(len(leaf), -1)
    is_wide = leaf.dtype == np.uint8 and leaf.shape[1] >= FEWEST_PIXELS
    if is_image or is_wide:
        return _Pixels(
            max(
                float(np.nan_to_num(leaf).max()),
                LEAST_SPREAD,
            )
        )
    if leaf.dtype.kind in "iu":
        return _Categories([_frequent(column) for column in leaf.T])
    numbers = np.where(
        np.isfinite(leaf),
        leaf,
        np.nan,
    ).astype(np.float64)
    gaps = np.isnan(numbers)
    count = np.maximum(
        1,
        (~gaps).sum(axis=0),
    )
    mean = np.nansum(numbers, axis=0) / count
    variance = (
        np.nansum(
            (numbers - mean) ** 2,
            axis=0,
        )
        / count
    )
    spread = np.sqrt(variance)
    spread[spread < LEAST_SPREAD] = 1
    return _Numbers(
        mean,
        spread,
        np.flatnonzero(gaps.any(axis=0)),
    )


def _frequent(column: np.ndarray) -> np.ndarray:
    values, counts = np.unique(column, return_counts=True)
    order = np.argsort(
        -counts,
        kind="stable",
    )[:MOST_VALUES]
    return np.sort(values[order])

"""Ranges of the whole numbers that a program can take, and the check of its data.

An index beyond its table stops nothing on a device: it reads another row, or NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_jax.errors import DataError
from lepton_jax.trees import by_path


@dataclass(frozen=True)
class Limit:
    """The range of an integer leaf of the samples: from 0 to below `size`.

    Attributes:
      path: of the leaf: "inputs", "inputs/tokens", "targets", ...
      size: the first whole number that is too large.
      why: what has that size, for messages.
      remedy: what a person can do about it.
      columns: places in a flattened sample that this holds for; None: all.
      negative: whether numbers below 0 are allowed.
      beyond: whether numbers from `size` on are allowed.
      spared: further numbers that are allowed.
    """

    path: str
    size: int
    why: str
    remedy: str
    columns: tuple[int, ...] | None = None
    negative: bool = False
    beyond: bool = False
    spared: tuple[int, ...] = ()

    def broken(self, leaf: np.ndarray) -> np.ndarray | None:
        """Find values that are out of range.

        Args:
          leaf: (samples, ...).

        Returns:
          bool (samples, values of a sample), or None if all are in range.
        """
        values = leaf.reshape(len(leaf), -1)
        if self.columns is not None:
            values = values[:, self.columns]
        if not values.size or values.dtype.kind not in "iu":
            return None

        fits_below = self.negative or values.min() >= 0
        fits_above = self.beyond or values.max() < self.size
        if fits_below and fits_above:
            return None

        wrong = np.zeros(values.shape, bool)
        if not self.negative:
            wrong |= values < 0
        if not self.beyond:
            wrong |= values >= self.size
        if self.spared:
            wrong &= ~np.isin(values, self.spared)
        return wrong if wrong.any() else None


def check_limits(
    limits: Sequence[Limit],
    rows: tuple[Any, Any],
    what: str,
    name: Callable[[int], str],
) -> None:
    """Check that samples hold no whole numbers that their program can't take.

    Args:
      limits: of the program.
      rows: (inputs, targets) with the samples along the leading dim; a part that is
        absent is None.
      what: the data that are checked, for messages: "training data".
      name: the number of a row to the identifier of its sample.

    Raises:
      DataError: a number is out of range. The error names the count of samples, the
        first one, its value and the range.
    """
    if not limits:
        return
    leaves = by_path({"inputs": rows[0], "targets": rows[1]})
    for limit in limits:
        leaf = leaves.get(limit.path)
        if leaf is None:
            continue
        wrong = limit.broken(np.asarray(leaf))
        if wrong is not None:
            raise _out_of_range(limit, leaf, wrong, what, name)


def _out_of_range(
    limit: Limit,
    leaf: Any,
    wrong: np.ndarray,
    what: str,
    name: Callable[[int], str],
) -> DataError:
    samples = np.flatnonzero(wrong.any(axis=1))
    first = int(samples[0])
    values = np.asarray(leaf[first]).reshape(-1)
    if limit.columns is not None:
        values = values[list(limit.columns)]
    value = values[wrong[first]][0]

    allowed = f"0 to {limit.size - 1}"
    if limit.negative:
        allowed = f"what is below {limit.size}"
    return DataError(
        f"{len(samples)} samples have {limit.path} outside {allowed}: {limit.why}",
        where=f"{what}, first in sample {name(first)}: {value}",
        remedy=limit.remedy,
    )

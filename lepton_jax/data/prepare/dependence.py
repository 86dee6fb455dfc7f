"""Mutual information of columns with a target, corrected for chance.

In a small sample two independent columns share some information by chance, the more the
more values they have: an identifier with a value of its own in each row seems to tell
the target wholly. What shuffled targets share with the same column is the measure of
chance (as in Vinh, Epps, Bailey: Information Theoretic Measures for Clusterings
Comparison, JMLR 2010, with shuffles in place of the exact expectation):

    share = (information - mean of shuffled) / (entropy of target - mean of shuffled)

    column   target   information   shuffled   entropy   share
    copy     class       1.0 bit       0.01      1.0      1.0
    id       class       1.0           1.0       1.0      can't be told
    noise    class       0.01          0.01      1.0      0.0
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SHUFFLES = 10  # assumption: their mean varies by less than a hundredth of the entropy
# Bins of equally many rows, for numbers with more distinct values than that.
# Assumption: fine enough to show that a number decides the target, coarse enough for
# 1000 rows.
BINS = 32
TARGET_BINS = 10
# Least part of the entropy that chance must leave for a share to be told (assumption).
LEAST_ROOM = 0.2


def codes_of(
    values: Sequence[float | str | None],
    bins: int,
) -> np.ndarray:
    """Return a number from 0 for each value, Int64; a missing value is a value.

    Numbers with more than `bins` distinct values are put into bins of about as many
    rows each; equal numbers are in one bin.
    """
    is_number = all(
        value is None
        or not isinstance(
            value,
            str,
        )
        for value in values
    )
    if not is_number:
        texts = np.array(["" if v is None else f"={v}" for v in values])
        return np.unique(
            texts,
            return_inverse=True,
        )[1]
    numbers = np.array(
        [np.nan if v is None else v for v in values],
        np.float64,
    )
    distinct, codes = np.unique(
        numbers,
        return_inverse=True,
    )
    if len(distinct) <= bins:
        return codes
    edges = np.nanquantile(
        numbers,
        np.linspace(
            0,
            1,
            bins + 1,
        )[1:-1],
    )
    binned = np.searchsorted(
        edges,
        numbers,
        side="right",
    )
    return np.where(
        np.isnan(numbers),
        bins,
        binned,
    )


def entropy(codes: np.ndarray) -> float:
    """Return the entropy of codes, bits."""
    counts = np.unique(
        codes,
        return_counts=True,
    )[1]
    shares = counts / len(codes)
    return float(-(shares * np.log2(shares)).sum())


def information(
    one: np.ndarray,
    other: np.ndarray,
) -> float:
    """Return the mutual information of two columns of codes, bits."""
    both = one * (int(other.max()) + 1) + other
    return entropy(one) + entropy(other) - entropy(both)


def share_of_target(
    column: np.ndarray,
    target: np.ndarray,
) -> float | None:
    """Return what part of the target's entropy a column gives away, beyond chance.

    Args:
      column: codes [rows].
      target: codes [rows].

    Returns:
      0 to about 1; None if chance alone would give away nearly all.
    """
    whole = entropy(target)
    if whole == 0:
        return None
    random = np.random.default_rng(0)
    shuffled = [
        information(
            column,
            random.permutation(target),
        )
        for _ in range(SHUFFLES)
    ]
    chance = float(np.mean(shuffled))
    if whole - chance < LEAST_ROOM * whole:
        return None
    return (
        information(
            column,
            target,
        )
        - chance
    ) / (whole - chance)

"""Drift: how far the rows of a table have moved from those of another.

The population stability index compares shares bin by bin:

    PSI = sum over the bins of (q - p) * ln(q / p)

of the reference's share p and the other's q. It is 0 for equal shares; 0.1 is called a
small shift, 0.25 a large one (Siddiqi 2006, "Credit Risk Scorecards", chapter 8).

A test whether two tables are drawn from the same distribution says nothing about a
large table: with ten million rows, any difference is significant. What a person asks is
whether the shift is *larger than one that matters*. With n and m rows, PSI * n m / (n +
m) is distributed as a non-central chi-square with bins - 1 degrees of freedom and the
true PSI * n m / (n + m) as its non-centrality (Yurdakul and Naranjo 2020, "Statistical
Properties of the Population Stability Index", for the central case). So

    p = chance of a PSI as large as the one found, or larger, if the true one were 0.1

which is small only if the shift is larger than 0.1 and there are rows enough to know.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import ncx2

from lepton_jax.data.prepare.profile import ColumnProfile, Profile

# Siddiqi 2006, "Credit Risk Scorecards", chapter 8.
SMALL = 0.1
LARGE = 0.25
# The chance of an alarm where there is none, for each column. Assumption: a person
# looks at some hundred columns.
SIGNIFICANT = 1e-3
# Rows that are added to each bin, for an empty one would make the index infinite.
HALF_A_ROW = 0.5


@dataclass(frozen=True)
class Drift:
    """Distance between two profiles of a column.

    Attributes:
      column: its name.
      psi: population stability index.
      noise: the index that is expected without any drift, from so many rows.
      p: chance of such an index if the true one were 0.1.
      distance: the largest difference of the cumulative shares (Kolmogorov-Smirnov), at
        the edges of the bins; of categories, half the sum of the differences.
      missing: share of missing rows, of the reference and of the other table.
      verdict: "none", "small" or "large".
    """

    column: str
    psi: float
    noise: float
    p: float
    distance: float
    missing: tuple[float, float]
    verdict: str


def drift(
    reference: Profile,
    other: Profile,
) -> list[Drift]:
    """Compare a table with a reference, column by column, the most moved first.

    Args:
      reference: profile of what is compared with: the training split.
      other: profile with the reference's edges and words, `profile(tables,
        like=reference)`.
    """
    both = [name for name in reference.columns if name in other.columns]
    compared = [
        _column(
            name,
            reference.columns[name],
            other.columns[name],
        )
        for name in both
        if reference.columns[name].rows and other.columns[name].rows
    ]
    return sorted(
        compared,
        key=lambda moved: -moved.psi,
    )


# ---- internals ----


def _column(
    name: str,
    reference: ColumnProfile,
    other: ColumnProfile,
) -> Drift:
    before = _bins(reference)
    after = _bins(other)
    psi = _index(before, after)
    rows = reference.rows * other.rows / (reference.rows + other.rows)
    freedom = max(
        1,
        int(np.count_nonzero(before + after)) - 1,
    )
    return Drift(
        column=name,
        psi=psi,
        noise=float(freedom / rows),
        p=_chance(psi, SMALL, rows, freedom),
        distance=_distance(reference, before, after),
        missing=(reference.missing / reference.rows, other.missing / other.rows),
        verdict=_verdict(psi, rows, freedom),
    )


def _bins(column: ColumnProfile) -> np.ndarray:
    """Return the rows of each bin; missing ones have a bin of their own."""
    counts: Sequence[int] = column.part_counts
    if column.kind == "category":
        counts = [*column.word_counts, column.others]
    return np.asarray(
        [*counts, column.missing],
        np.float64,
    )


def _index(
    before: np.ndarray,
    after: np.ndarray,
) -> float:
    occurs = (before + after) > 0
    p = before[occurs] + HALF_A_ROW
    q = after[occurs] + HALF_A_ROW
    p = p / p.sum()
    q = q / q.sum()
    return float(((q - p) * np.log(q / p)).sum())


def _chance(
    psi: float,
    true_psi: float,
    rows: float,
    freedom: int,
) -> float:
    return float(
        ncx2.sf(
            psi * rows,
            freedom,
            true_psi * rows,
        )
    )


def _verdict(
    psi: float,
    rows: float,
    freedom: int,
) -> str:
    if (
        psi > LARGE
        and _chance(
            psi,
            LARGE,
            rows,
            freedom,
        )
        < SIGNIFICANT
    ):
        return "large"
    if (
        psi > SMALL
        and _chance(
            psi,
            SMALL,
            rows,
            freedom,
        )
        < SIGNIFICANT
    ):
        return "small"
    return "none"


def _distance(
    reference: ColumnProfile,
    before: np.ndarray,
    after: np.ndarray,
) -> float:
    difference = after / after.sum() - before / before.sum()
    if reference.kind == "category":
        return float(np.abs(difference).sum() / 2)
    return float(np.abs(np.cumsum(difference)).max())

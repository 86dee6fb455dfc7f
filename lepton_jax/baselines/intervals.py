"""Confidence intervals of 95 %, and whether two methods differ on the same rows.

A share of hits has Wilson's interval (E. B. Wilson, JASA 22, 1927); any other metric
that of the bootstrap, between the percentiles of its values over resampled rows (Efron
and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). Two methods are
compared on the same rows: by McNemar's exact test where both hit or miss (Q. McNemar,
Psychometrika 12, 1947), else by the bootstrap of the difference, both methods
resampled with the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lepton_jax.baselines.baseline import Interval

LEVEL = 0.95
# of the standard normal distribution, between whose negative and itself LEVEL lies
QUANTILE = 1.959964
RESAMPLES = 1000  # as Efron and Tibshirani advise for percentiles, section 13.3
SEED = 0  # of the resampling: the same rows give the same interval


def wilson(hits: float, count: int) -> Interval:
    """Return the share of hits with Wilson's interval.

    >>> wilson(8, 10)
    Interval(value=0.8, low=0.490..., high=0.943...)
    """
    share = hits / count
    square = QUANTILE**2
    middle = (share + square / (2 * count)) / (1 + square / count)
    variance = share * (1 - share) / count + square / (4 * count**2)
    width = QUANTILE * math.sqrt(variance) / (1 + square / count)
    return Interval(
        share,
        max(0.0, middle - width),
        min(1.0, middle + width),
    )


def percentiles(value: float, resampled: np.ndarray) -> Interval:
    """Return a value with the interval of its resampled values, (resamples,)."""
    tail = 100 * (1 - LEVEL) / 2
    finite = resampled[np.isfinite(resampled)]
    if not len(finite):
        return Interval(value, math.nan, math.nan)
    low, high = np.percentile(
        finite,
        [tail, 100 - tail],
    )
    return Interval(
        value,
        float(low),
        float(high),
    )


def mean_interval(values: np.ndarray) -> Interval:
    """Return the mean of values by row, (rows,), with its interval.

    For a baseline that gives a metric and not its outputs.
    """
    values = np.asarray(values, np.float64)
    if are_hits(values):
        return wilson(values.sum(), len(values))
    means = [counts @ values / len(values) for counts in resamples(len(values))]
    return percentiles(
        float(values.mean()),
        np.array(means),
    )


def are_hits(values: np.ndarray) -> bool:
    """Whether each value is 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())


def resamples(rows: int, count: int = RESAMPLES) -> Iterator[np.ndarray]:
    """Yield how often each row is drawn in a resample: int (rows,)."""
    generator = np.random.default_rng(SEED)
    for _ in range(count):
        yield np.bincount(
            generator.integers(0, rows, rows),
            minlength=rows,
        )


class Alone(NamedTuple):
    """Rows in which one of two methods alone is right.

    Attributes:
      ours: where the first one is.
      theirs: where the second one is.
    """

    ours: int
    theirs: int

    def chance(self) -> float:
        """Return the probability of such counts if both are right equally often.

        It is McNemar's test, exact: then either method is the one with a probability of
        1/2, whatever the other rows are.
        """
        # only here: it takes a second to import, as long as the rest of Lepton
        from scipy.stats import binomtest

        count = self.ours + self.theirs
        return float(binomtest(self.ours, count).pvalue) if count else 1.0


def alone(ours: np.ndarray, theirs: np.ndarray) -> Alone:
    """Count the rows in which one of two methods alone is right.

    Args:
      ours: hits of one method, 0 or 1, (rows,).
      theirs: hits of the other one on the same rows.
    """
    return Alone(int((ours > theirs).sum()), int((theirs > ours).sum()))

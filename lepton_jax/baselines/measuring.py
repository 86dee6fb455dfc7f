"""A recipe's metrics over rows on the host, and over resamples of these rows.

The metric of a resample is the metric of rows that are drawn with replacement. Of a
mean it takes one product with the counts of the rows:

    hits of 4 rows         1  0  1  1     accuracy 0.75
    counts of a resample   0  2  1  1     accuracy (0 + 0 + 1 + 1) / 4 = 0.5
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import losses
from lepton_jax.baselines.baseline import Interval
from lepton_jax.baselines.intervals import (
    RESAMPLES,
    are_hits,
    percentiles,
    resamples,
    wilson,
)

# Resamples of a metric that needs all rows at once, such as an area under a curve;
# assumption: the ends of an interval need two digits, not three.
RESAMPLES_OF_WHOLE = 200


class Measured:
    """A metric of some rows, that can be taken of resamples of them.

    Attributes:
      value: over the rows as they are.
      hits: 0 or 1 by row where the metric is their mean, float64 (rows,); else None.
      resamples: how many are worth their time.
    """

    value: float
    hits: np.ndarray | None = None
    resamples: int = RESAMPLES

    def of(self, counts: np.ndarray) -> float:
        """Return the metric of a resample; `counts` says how often a row is in it."""
        raise NotImplementedError

    def interval(self, rows: int) -> Interval:
        """Return the metric with its interval, over so many rows."""
        if self.hits is not None:
            return wilson(self.hits.sum(), rows)
        values = [
            self.of(counts)
            for counts in resamples(
                rows,
                self.resamples,
            )
        ]
        return percentiles(self.value, np.array(values))


class MeasuredMean(Measured):
    """A weighted mean over rows, or a function of it.

    Args:
      values: by row, (rows, ...), already multiplied with their weights.
      weights: by row, in the same shape; None: each value counts once.
      finish: the mean to the metric; None: the mean is it.
    """

    def __init__(
        self,
        values: np.ndarray,
        weights: np.ndarray | None,
        finish: Callable[[Any], Any] | None,
    ):
        rows = len(values)
        self._sums = values.reshape(rows, -1).sum(
            axis=1,
            dtype=np.float64,
        )
        if weights is None:
            weights = np.ones_like(values)
        self._weights = weights.reshape(rows, -1).sum(
            axis=1,
            dtype=np.float64,
        )
        self._finish = finish
        self.value = self.of(np.ones(rows))
        is_share = finish is None and (self._weights == 1).all()
        if is_share and are_hits(self._sums):
            self.hits = self._sums

    def of(self, counts: np.ndarray) -> float:
        weight = counts @ self._weights
        mean = counts @ self._sums / weight if weight else np.nan
        return float(mean if self._finish is None else self._finish(np.float32(mean)))


class MeasuredMeans(Measured):
    """A function of several means over rows.

    Args:
      arrays: a tree of values by row, (rows, ...).
      finish: the tree of their means to the metric.
    """

    def __init__(self, arrays: Any, finish: Callable[[Any], Any]):
        self._arrays = jax.tree.map(
            lambda x: np.asarray(x, np.float64),
            arrays,
        )
        self._finish = jax.jit(finish)
        rows = len(jax.tree.leaves(self._arrays)[0])
        self.value = self.of(np.ones(rows))

    def of(self, counts: np.ndarray) -> float:
        total = counts.sum()

        def mean(x: np.ndarray) -> Any:
            return np.float32(
                np.tensordot(
                    counts,
                    x,
                    axes=1,
                )
                / total
            )

        return float(
            self._finish(
                jax.tree.map(
                    mean,
                    self._arrays,
                )
            )
        )


class MeasuredWhole(Measured):
    """A function of all rows at once.

    Args:
      function: (outputs, targets) to a scalar.
      outputs: a tree of arrays (rows, ...).
      targets: a tree of arrays (rows, ...).
    """

    resamples = RESAMPLES_OF_WHOLE

    def __init__(self, function: Callable, outputs: Any, targets: Any):
        self._function = jax.jit(function)
        self._rows = (outputs, targets)
        self.value = float(
            self._function(
                outputs,
                targets,
            )
        )

    def of(self, counts: np.ndarray) -> float:
        drawn = np.repeat(
            np.arange(len(counts)),
            counts,
        )
        rows = jax.tree.map(
            lambda x: np.asarray(x)[drawn],
            self._rows,
        )
        return float(self._function(*rows))


def measured(metric: Any, outputs: Any, targets: Any) -> Measured:
    """Measure one of a recipe's metrics.

    Args:
      metric: a function, or a `lepton_jax.metrics.Metric`.
      outputs: as the model gives them, rows first.
      targets: of the same rows.

    Raises:
      ModelError: the metric does not take them.
    """
    function, several = losses.sums_of(metric)
    finish = getattr(metric, "finish", None)
    result = losses.values(function, outputs, targets, several)
    if isinstance(result, losses.Several):
        assert finish is not None
        return MeasuredMeans(result.arrays, finish)
    values, weights = (
        result
        if isinstance(
            result,
            tuple,
        )
        else (result, None)
    )
    if jnp.ndim(values) == 0:
        return MeasuredWhole(_finished(function, finish), outputs, targets)
    values = np.asarray(values, np.float64)
    if weights is None:
        return MeasuredMean(values, None, finish)
    weights = np.asarray(weights, np.float64)
    return MeasuredMean(
        np.where(weights == 0, 0, values) * weights,
        weights,
        finish,
    )


def all_measured(
    metrics: Mapping[str, Any],
    outputs: Any,
    targets: Any,
) -> dict[str, Measured]:
    """Measure all of a recipe's metrics."""
    return {
        name: measured(
            one,
            outputs,
            targets,
        )
        for name, one in metrics.items()
    }


def _finished(function: Callable, finish: Callable | None) -> Callable:
    if finish is None:
        return function
    return lambda outputs, targets: finish(
        function(
            outputs,
            targets,
        )
    )

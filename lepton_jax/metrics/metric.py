"""The form of a metric of several means."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lepton_jax import losses


@dataclass(frozen=True)
class Metric:
    """A metric that is a function of one or several means over samples.

    An example is the share of the samples called positive that are so:

    >>> precision = Metric(
    ...     lambda outputs, labels: {
    ...         "called": outputs > 0,
    ...         "right": (outputs > 0) & (labels == 1),
    ...     },
    ...     lambda means: means["right"] / means["called"],
    ... )

    Attributes:
      values: (outputs, targets) to the values that are averaged: as `Recipe.loss`, or a
        dict or tuple of arrays of shape (batch, ...). Each array is averaged over the
        samples alone, so its other dims stay.
      finish: the mean, or the means in the same dict or tuple, to one number.
    """

    values: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]


def of_task(key: Any, metric: Any) -> Any:
    """Return a metric of one of several tasks: of one key of outputs and targets.

    Args:
      key: the task, as in `losses.sum_of`.
      metric: a function (outputs, targets), or a `Metric`.

    Example:
      >>> from lepton_jax import metrics
      >>> recipe_metrics = {"sex_accuracy": of_task("sex", metrics.accuracy)}
    """
    function, several = losses.sums_of(metric)
    own = functools.partial(_task_metric, key=key, function=function)
    return Metric(own, metric.finish) if several else own


def without_missing(metric: Any) -> Any:
    """Return a metric that leaves out missing targets, as `losses.without_missing`.

    Args:
      metric: a function (outputs, targets) with one value for each target, or a
        `Metric` of such values, e.g. `rmse`.
    """
    function, several = losses.sums_of(metric)
    known = losses.without_missing(function)
    return Metric(known, metric.finish) if several else known


def check_same(left: tuple, right: tuple, name: str) -> None:
    """Check that two shapes are the same.

    Raises:
      ValueError: they are not. Broadcasting would turn (batch, 1) against (batch,) into
        a wrong (batch, batch) without a word.
    """
    if left != right:
        raise ValueError(f"{name}: outputs give shape {left}, targets have {right}")


def _task_metric(
    outputs: Any,
    targets: Any,
    *,
    key: Any,
    function: Callable,
) -> Any:
    own, wanted = losses.task_parts(outputs, targets, key)
    return function(own, wanted)

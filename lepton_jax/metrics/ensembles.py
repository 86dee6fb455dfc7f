"""Metrics of ensembles that are one model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from lepton_jax import losses
from lepton_jax.metrics.metric import Metric


def of_ensemble(
    metric: Any,
    merge: Callable[[Any], Any],
    ndim: int,
) -> Any:
    """Return a metric of an ensemble as a whole, such as `models.TabM`.

    In training such a model gives one output a member, which are merged first.

    Args:
      metric: a function (outputs, targets), or a `Metric`.
      merge: the members' outputs to one: (batch, members, ...) to (batch, ...).
      ndim: count of dims of the merged outputs.
    """
    function, several = losses.sums_of(metric)
    own = functools.partial(
        _merged,
        function=function,
        merge=merge,
        ndim=ndim,
    )
    return Metric(own, metric.finish) if several else own


def _merged(
    outputs: Any,
    targets: Any,
    *,
    function: Callable[[Any, Any], Any],
    merge: Callable[[Any], Any],
    ndim: int,
) -> Any:
    is_merged = jnp.ndim(outputs) == ndim
    return function(outputs if is_merged else merge(outputs), targets)

"""Metrics of quantities."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lepton_jax import losses
from lepton_jax.metrics.metric import Metric, check_same


def absolute_error(outputs: Any, targets: Any) -> Any:
    """Return |output - target|; both have one shape."""
    check_same(outputs.shape, targets.shape, "absolute_error")
    return jnp.abs(outputs - targets)


rmse = Metric(losses.squared_error, jnp.sqrt)
perplexity = Metric(losses.cross_entropy, jnp.exp)


def r2(outputs: Any, targets: Any) -> Any:
    """Return the share of the targets' variance that the outputs explain.

    Outputs and targets have one shape. With several targets a sample it is the mean
    over them. It takes the whole test set at once: sums of squares over batches would
    lose the digits that matter where the targets' mean is large.
    """
    check_same(outputs.shape, targets.shape, "r2")
    outputs = outputs.reshape(len(outputs), -1)
    targets = targets.reshape(len(targets), -1)
    residual = jnp.square(targets - outputs).sum(axis=0)
    away = targets - targets.mean(axis=0)
    spread = jnp.square(away).sum(axis=0)

    # constant targets have no variance to explain: 1 if they are met, else 0
    constant = jnp.where(residual > 0, 0.0, 1.0)
    explained = 1 - residual / jnp.where(spread > 0, spread, 1)
    return jnp.where(spread > 0, explained, constant).mean()

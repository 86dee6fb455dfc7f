"""Losses of tables in which some targets are missing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.losses.sums import values
from lepton_jax.trees import is_inexact


def without_missing(loss: Callable) -> Callable:
    """Return a loss that leaves out targets that are missing.

    A number is missing where it is NaN, a label where it is negative. The mean is over
    the targets that are there, so a batch without any is no step. The recipe's metrics
    get "known", the share of the targets that are there.

    Args:
      loss: (outputs, targets) to values of the targets' shape.

    Example:
      >>> from lepton_jax.losses import squared_error
      >>> targets = jnp.array([[1.0, jnp.nan], [2.0, 0.0]])
      >>> values, weights = without_missing(squared_error)(jnp.zeros((2, 2)), targets)
      >>> print(weights)
      [[1. 0.]
       [1. 1.]]
    """
    return functools.partial(known_values, loss=loss)


def known_values(
    outputs: Any,
    targets: jax.Array,
    *,
    loss: Callable,
) -> tuple[jax.Array, jax.Array]:
    """Return (values, weights) of a loss; both are 0 where a target is missing.

    Raises:
      ValueError: the loss does not return one value for each target.
    """
    there = known(outputs, targets)
    # labels stay as they are, so that those that are too large are found
    if is_inexact(targets):
        # not the values alone: the gradient of what NaN went into is NaN
        targets = jnp.where(there > 0, targets, 0)
    result = values(loss, outputs, targets)
    each, weights = result if isinstance(result, tuple) else (result, 1.0)
    if each.shape != targets.shape:
        raise ValueError(
            f"without_missing: the loss returned shape {each.shape} for targets"
            f" {targets.shape}; it takes one value for each target"
        )
    # a select: a label far below 0, such as -100, may give NaN
    each = jnp.where(there > 0, each, 0)
    return each, weights * there.astype(each.dtype)


def known(outputs: Any, targets: jax.Array) -> jax.Array:
    """Return 1.0 for each target that is there, 0.0 for each that is missing."""
    is_number = is_inexact(targets)
    there = ~jnp.isnan(targets) if is_number else targets >= 0
    return there.astype(jnp.float32)

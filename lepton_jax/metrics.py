"""Metrics: sums on the device, one closing function on the host's side of the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lepton_jax import losses


@dataclass(frozen=True)
class Metric:
    """A mean over samples and what is made of that mean: `finish(mean(values(outputs, targets)))`."""

    values: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]


def accuracy(outputs: Any, targets: Any) -> Any:
    """1.0 where the largest of the last dim's outputs is at the target's index; outputs (..., classes), targets (...)."""
    _same(outputs.shape[:-1], targets.shape, "accuracy")
    return (jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32)


def binary_accuracy(outputs: Any, targets: Any) -> Any:
    """1.0 where the logit's sign agrees with the target (0 or 1); both of one shape."""
    _same(outputs.shape, targets.shape, "binary_accuracy")
    return ((outputs > 0) == (targets > 0.5)).astype(jnp.float32)


def absolute_error(outputs: Any, targets: Any) -> Any:
    """|output - target|; both of one shape."""
    _same(outputs.shape, targets.shape, "absolute_error")
    return jnp.abs(outputs - targets)


rmse = Metric(losses.squared_error, jnp.sqrt)
perplexity = Metric(losses.cross_entropy, jnp.exp)


def _same(left: tuple, right: tuple, name: str) -> None:
    # broadcasting would turn (batch, 1) against (batch,) into a wrong (batch, batch) without a word
    if left != right:
        raise ValueError(f"{name}: outputs give shape {left}, targets have {right}")

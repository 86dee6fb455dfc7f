"""Hit rate and discounted gain of a ranking, in the form of Lepton's metrics.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def hit_rate(k: int) -> Callable[[Any, Any], jax.Array]:
    """Return the metric that is 1 where the item is among the first k, else 0."""

    def hits(outputs: Any, targets: jax.Array) -> jax.Array:
        return (ranks(outputs, targets) < k).astype(jnp.float32)

    return hits


def ndcg(k: int) -> Callable[[Any, Any], jax.Array]:
    """Return the metric that is 1 / log2(rank + 2) of the first k ranks, else 0."""

    def gain(outputs: Any, targets: jax.Array) -> jax.Array:
        rank = ranks(outputs, targets)
        return jnp.where(rank < k, 1 / jnp.log2(rank + 2), 0.0)

    return gain


def ranks(outputs: Any, targets: jax.Array) -> jax.Array:
    """Return how many items have a better score, (batch,); equal ones count half."""
    if isinstance(outputs, Mapping):  # in training: among the negatives
        own = outputs["own"][:, None]
        scores = outputs["others"]
        itself = 0
    else:
        own = jnp.take_along_axis(outputs, targets[:, None], axis=1)
        scores = outputs
        itself = 1
    better = (scores > own).sum(axis=1)
    equal = (scores == own).sum(axis=1) - itself
    return better + equal / 2

"""Hit rate and discounted gain of a ranking, in the form of Lepton's metrics.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import baselines


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


def best_of_three(train: Any, test: Any, *, items: int) -> Any:
    """Return the best of popularity, ItemKNN and iALS by its NDCG@10 on the test rows.

    The best on the test rows themselves is a bar that is a little too high.
    """
    given = replace(train, task="classes", classes=items)
    candidates = []
    for method in (baselines.popularity, baselines.item_knn, baselines.ials):
        try:
            found = method(given, test)
        except baselines.NotHere as reason:
            print(f"no {method.__name__} baseline: {reason}", file=sys.stderr)
            continue
        scores = jnp.asarray(found.outputs)
        gain = float(ndcg(10)(scores, jnp.asarray(test.targets)).mean())
        candidates.append((gain, found))
    return max(candidates, key=itemgetter(0))[1]

"""Metrics of ranked candidates: of the items that a user may be shown, for example.

Outputs are scores, (batch, ..., candidates), highest first. Targets are either the
index of the one candidate that is relevant, (batch, ...), or the relevance of each,
0 for none, (batch, ..., candidates). A candidate that must not be shown has the score
minus infinity. Among equal scores the least relevant count as first, so that a model
gains nothing by giving all the same.

A row in which nothing is relevant has no weight. Another k is given by
`functools.partial(metrics.ndcg, k=20)`.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from lepton_jax.metrics.metric import check_same


def ndcg(outputs: Any, targets: Any, *, k: int = 10) -> Any:
    """Return the normalized discounted cumulative gain of the first k candidates.

    The gain of a candidate with relevance r at rank n, from 1, is r / log2(n + 1); it
    is divided by that of the best order (Järvelin and Kekäläinen 2002).

    Returns:
      (values, weights), (batch, ...) each.
    """
    if _is_index(outputs, targets):
        rank = _rank(outputs, targets)
        gain = 1 / jnp.log2(rank + 2.0)
        gain = jnp.where(rank < k, gain, 0.0)
        return gain, jnp.ones_like(gain)
    ranked = _ranked(outputs, targets)
    relevance = targets.astype(jnp.float32)
    best = jnp.sort(relevance, axis=-1, descending=True)
    gain = _discounted(ranked, k)
    most = _discounted(best, k)
    there = most > 0
    share = gain / jnp.where(there, most, 1)
    return jnp.where(there, share, 0), there.astype(jnp.float32)


def hit_rate(outputs: Any, targets: Any, *, k: int = 10) -> Any:
    """Return 1.0 where something relevant is among the first k candidates, else 0.0.

    Returns:
      (values, weights), (batch, ...) each.
    """
    rank, weights = _first(outputs, targets)
    return (rank < k).astype(jnp.float32) * weights, weights


def reciprocal_rank(outputs: Any, targets: Any) -> Any:
    """Return 1 / rank of the first relevant candidate; ranks begin with 1.

    Returns:
      (values, weights), (batch, ...) each.
    """
    rank, weights = _first(outputs, targets)
    return weights / (rank + 1.0), weights


def mean_average_precision(outputs: Any, targets: Any) -> Any:
    """Return the mean precision at the ranks of the relevant candidates.

    Returns:
      (values, weights), (batch, ...) each.
    """
    if _is_index(outputs, targets):
        return reciprocal_rank(outputs, targets)
    relevant = (_ranked(outputs, targets) > 0).astype(jnp.float32)
    ranks = jnp.arange(1, outputs.shape[-1] + 1)
    precision = jnp.cumsum(relevant, axis=-1) / ranks
    total = relevant.sum(axis=-1)
    there = total > 0
    found = (precision * relevant).sum(axis=-1)
    mean = found / jnp.where(there, total, 1)
    return mean, there.astype(jnp.float32)


# ---- internals ----


def _is_index(outputs: Any, targets: Any) -> bool:
    """Whether targets are the index of the one relevant candidate of each row."""
    if targets.ndim == outputs.ndim:
        check_same(outputs.shape, targets.shape, "metric of ranks")
        return False
    check_same(outputs.shape[:-1], targets.shape, "metric of ranks")
    return True


def _rank(outputs: Any, targets: Any) -> Any:
    """Return how many other candidates have a score at least as high."""
    own = jnp.take_along_axis(outputs, targets[..., None], axis=-1)
    # also where the own score is NaN, which compares with nothing
    before = ~(outputs < own)
    return before.sum(axis=-1) - 1


def _ranked(outputs: Any, targets: Any) -> Any:
    """Return the relevances in the order of the scores, float32."""
    relevance = targets.astype(jnp.float32)
    order = jnp.lexsort((relevance, -outputs), axis=-1)
    return jnp.take_along_axis(relevance, order, axis=-1)


def _first(outputs: Any, targets: Any) -> tuple[Any, Any]:
    """Return the rank of the first relevant candidate, from 0, and its weight."""
    if _is_index(outputs, targets):
        rank = _rank(outputs, targets)
        return rank, jnp.ones(rank.shape, jnp.float32)
    relevant = _ranked(outputs, targets) > 0
    there = relevant.any(axis=-1)
    return jnp.argmax(relevant, axis=-1), there.astype(jnp.float32)


def _discounted(relevance: Any, k: int) -> Any:
    first = relevance[..., :k]
    ranks = jnp.arange(first.shape[-1])
    gains = first / jnp.log2(ranks + 2.0)
    return gains.sum(axis=-1)

"""Areas under curves, of the whole test set at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.metrics.metric import check_same


def auc(outputs: Any, targets: Any) -> Any:
    """Return the area under the ROC curve, of the whole test set.

    It is the probability that a sample of the class has a higher score than one outside
    it; equal scores count half (Hanley and McNeil 1982). Outputs are logits: of the
    shape of the targets 0 and 1, or (batch, classes) for integer labels; with more than
    two classes, it is the mean over each class against the rest, by its probability. It
    is NaN where a class has no sample, or all.
    """
    return _over_classes(_area, outputs, targets, "auc")


def average_precision(outputs: Any, targets: Any) -> Any:
    """Return the area under the precision-recall curve, of the whole test set.

    It is the mean, over the samples of the class, of the precision at their own scores:
    the share of the class among all samples with a score at least as high. Outputs and
    targets are those of `auc`. It is NaN where a class has no sample.
    """
    return _over_classes(_precision, outputs, targets, "average_precision")


def _over_classes(
    curve: Callable[[Any, Any], Any],
    outputs: Any,
    targets: Any,
    name: str,
) -> Any:
    """Apply a curve of (scores, positive) to one class, or the mean over several."""
    if outputs.shape == targets.shape:
        positive = targets.reshape(-1) > 0.5
        return curve(outputs.reshape(-1), positive)
    check_same(outputs.shape[:-1], targets.shape, name)
    classes = outputs.shape[-1]
    outputs = outputs.reshape(-1, classes)
    targets = targets.reshape(-1)
    if classes == 2:
        scores = outputs[:, 1] - outputs[:, 0]
        return curve(scores, targets == 1)
    shares = jax.nn.softmax(outputs).T
    positive = targets == jnp.arange(classes)[:, None]
    return jax.vmap(curve)(shares, positive).mean()


def _area(scores: Any, positive: Any) -> Any:
    """Return the area of scores (n,) for the samples that are positive, bool (n,).

    Each positive sample adds the share of negatives below it, and half of the share of
    negatives that are equal to it.
    """
    order = jnp.argsort(scores)
    ascending = scores[order]
    negatives = _counts(~positive[order])
    below = negatives[jnp.searchsorted(ascending, scores, side="left")]
    up_to = negatives[jnp.searchsorted(ascending, scores, side="right")]

    # in whole numbers as long as possible: float32 has seven digits
    shares = (below + up_to) / (2 * negatives[-1])
    total = jnp.where(positive, shares, 0).sum()
    return _unless_nan(scores, total / positive.sum())


def _precision(scores: Any, positive: Any) -> Any:
    """Return the mean precision at the scores of the samples that are positive."""
    order = jnp.argsort(scores)
    ascending = scores[order]
    positives = _counts(positive[order])
    below = jnp.searchsorted(ascending, scores, side="left")
    found = positives[-1] - positives[below]
    called = len(scores) - below
    total = jnp.where(positive, found / called, 0).sum()
    return _unless_nan(scores, total / positive.sum())


def _counts(marked: Any) -> Any:
    """Return how many of the first n are marked, for n from 0 to all."""
    none = jnp.zeros(1, int)
    return jnp.concatenate([none, jnp.cumsum(marked)])


def _unless_nan(scores: Any, value: Any) -> Any:
    """Return a value, or NaN where a score is NaN, which has no place in an order."""
    is_lost = jnp.isnan(scores).any()
    return jnp.where(is_lost, jnp.nan, value)

"""Metrics: weighted sums on the device, and a function of their means on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import losses


@dataclass(frozen=True)
class Metric:
    """A metric that is a function of one or several means over samples.

    An example is the precision, the share of the samples called positive that are so:

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


def of_ensemble(
    outputs: Any,
    targets: Any,
    *,
    values: Callable[[Any, Any], Any],
    merge: Callable[[Any], Any],
    ndim: int,
) -> Any:
    """Return a metric of an ensemble as a whole, such as `models.TabM`.

    Args:
      outputs: (batch, members, ...) in training, (batch, ...) outside of it.
      targets: (batch, ...).
      values: function of (batch, ...) outputs and targets.
      merge: the members' outputs to one: (batch, members, ...) to (batch, ...).
      ndim: count of dims of the outputs outside of training.
    """
    is_merged = jnp.ndim(outputs) == ndim
    return values(outputs if is_merged else merge(outputs), targets)


def accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1.0 where the largest output is that of the target, else 0.0.

    Args:
      outputs: (..., classes).
      targets: indices, (...).
    """
    _check_same(outputs.shape[:-1], targets.shape, "accuracy")
    hits = jnp.argmax(outputs, axis=-1) == targets
    return hits.astype(jnp.float32)


def binary_accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1.0 where the logit's sign agrees with the target, else 0.0.

    Args:
      outputs: logits.
      targets: 0 or 1, of the same shape.
    """
    _check_same(outputs.shape, targets.shape, "binary_accuracy")
    hits = (outputs > 0) == (targets > 0.5)
    return hits.astype(jnp.float32)


def absolute_error(outputs: Any, targets: Any) -> Any:
    """Return |output - target|; both have one shape."""
    _check_same(outputs.shape, targets.shape, "absolute_error")
    return jnp.abs(outputs - targets)


rmse = Metric(losses.squared_error, jnp.sqrt)
perplexity = Metric(losses.cross_entropy, jnp.exp)


def _f1_counts(
    outputs: Any,
    targets: Any,
) -> dict[str, Any]:
    """Return the shares of hits, called and labelled, float32 (batch, classes)."""
    if outputs.shape == targets.shape:
        called = (outputs > 0)[..., None]
        labelled = (targets > 0.5)[..., None]
    else:
        _check_same(outputs.shape[:-1], targets.shape, "f1")
        classes = outputs.shape[-1]
        likeliest = jnp.argmax(outputs, axis=-1)
        called = jax.nn.one_hot(likeliest, classes) > 0
        labelled = targets[..., None] == jnp.arange(classes)
    if called.shape[-1] == 2:
        called = called[..., 1:]
        labelled = labelled[..., 1:]

    counts = {
        "hits": called & labelled,
        "called": called,
        "labelled": labelled,
    }
    batch = called.shape[0]
    classes = called.shape[-1]

    def share(x: Any) -> Any:
        """Return the mean over all dims of a sample but the class."""
        rows = x.reshape(batch, -1, classes)
        return rows.mean(axis=1, dtype=jnp.float32)

    return {name: share(x) for name, x in counts.items()}


def _f1(means: Any) -> Any:
    """Return 2 * hits / (called + labelled), the mean over classes that occur."""
    seen = means["called"] + means["labelled"]
    occurs = seen > 0
    score = 2 * means["hits"] / jnp.where(seen > 0, seen, 1)
    score = jnp.where(occurs, score, 0)
    total = score.sum()
    return total / jnp.maximum((seen > 0).sum(), 1)


# F1 score: of the positive class where outputs are logits of the targets' shape, or of
# class 1 where there are two; of more classes, the mean over those that occur
# ("macro").
f1 = Metric(_f1_counts, _f1)


def r2(outputs: Any, targets: Any) -> Any:
    """Return the share of the targets' variance that the outputs explain.

    Outputs and targets have one shape. With several targets a sample it is the mean
    over them. It takes the whole test set at once: sums of squares over batches would
    lose the digits that matter where the targets' mean is large.
    """
    _check_same(outputs.shape, targets.shape, "r2")
    outputs = outputs.reshape(len(outputs), -1)
    targets = targets.reshape(len(targets), -1)
    residual = jnp.square(targets - outputs).sum(axis=0)
    away = targets - targets.mean(axis=0)
    spread = jnp.square(away).sum(axis=0)

    # constant targets have no variance to explain: 1 if they are met, else 0
    constant = jnp.where(residual > 0, 0.0, 1.0)
    explained = 1 - residual / jnp.where(spread > 0, spread, 1)
    return jnp.where(spread > 0, explained, constant).mean()


def auc(outputs: Any, targets: Any) -> Any:
    """Return the area under the ROC curve, of the whole test set.

    It is the probability that a sample of the class has a higher score than one outside
    it; equal scores count half (Hanley and McNeil 1982). Outputs are logits: of the
    shape of the targets 0 and 1, or (batch, classes) for integer labels; with more than
    two classes, it is the mean over each class against the rest, by its probability. It
    is NaN where a class has no sample, or all.
    """
    if outputs.shape == targets.shape:
        return _area(outputs.reshape(-1), targets.reshape(-1) > 0.5)
    _check_same(outputs.shape[:-1], targets.shape, "auc")
    classes = outputs.shape[-1]
    outputs = outputs.reshape(-1, classes)
    targets = targets.reshape(-1)
    if classes == 2:
        return _area(outputs[:, 1] - outputs[:, 0], targets == 1)
    shares = jax.nn.softmax(outputs).T
    positive = targets == jnp.arange(classes)[:, None]
    return jax.vmap(_area)(shares, positive).mean()


def _area(scores: Any, positive: Any) -> Any:
    """Return the area of scores (n,) for the samples that are positive, bool (n,).

    Each positive sample adds the share of negatives below it, and half of the share of
    negatives that are equal to it.
    """
    order = jnp.argsort(scores)
    ascending = scores[order]
    none = jnp.zeros(1, int)
    negatives = jnp.concatenate([none, jnp.cumsum(~positive[order])])
    below = negatives[jnp.searchsorted(ascending, scores, side="left")]
    up_to = negatives[jnp.searchsorted(ascending, scores, side="right")]

    # in whole numbers as long as possible: float32 has seven digits
    shares = (below + up_to) / (2 * negatives[-1])
    total = jnp.where(positive, shares, 0).sum()
    area = total / positive.sum()
    return jnp.where(
        jnp.isnan(scores).any(),
        jnp.nan,
        area,
    )


def _check_same(
    left: tuple,
    right: tuple,
    name: str,
) -> None:
    # broadcasting would turn (batch, 1) against (batch,) into a wrong (batch, batch)
    # without a word
    if left != right:
        raise ValueError(f"{name}: outputs give shape {left}, targets have {right}")

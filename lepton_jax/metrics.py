"""Metrics: sums on the device, one closing function on the host's side of the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import losses


@dataclass(frozen=True)
class Metric:
    """Means over samples and the number that is made of them.

    A metric that is no mean itself, such as the F1 score, is often made of several:

        Metric(
            lambda outputs, labels: {"hits": hits, "labelled": labels == 1, ...},
            lambda means: 2 * means["hits"] / (means["labelled"] + means["found"]),
        )

    Attributes:
      values: (outputs, targets) to what is averaged: as `Recipe.loss`, or a dict or
        tuple of arrays of shape (batch, ...). Each array is averaged over the samples
        alone, so its other dims stay.
      finish: the mean, or the means in the same dict or tuple, to one number.
    """

    values: Callable[[Any, Any], Any]
    finish: Callable[[Any], Any]


def accuracy(outputs: Any, targets: Any) -> Any:
    """1.0 where the largest of the last dim's outputs is at the target's index; outputs
    (..., classes), targets (...).
    """
    _same(
        outputs.shape[:-1],
        targets.shape,
        "accuracy",
    )
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


def _f1_counts(outputs: Any, targets: Any) -> dict[str, Any]:
    """For each class: found and labelled, found, labelled; float32 (batch, classes)."""
    if outputs.shape == targets.shape:
        found = (outputs > 0)[..., None]
        labelled = (targets > 0.5)[..., None]
    else:
        _same(
            outputs.shape[:-1],
            targets.shape,
            "f1",
        )
        classes = outputs.shape[-1]
        found = jax.nn.one_hot(jnp.argmax(outputs, axis=-1), classes) > 0
        labelled = targets[..., None] == jnp.arange(classes)
    if found.shape[-1] == 2:
        found = found[..., 1:]
        labelled = labelled[..., 1:]

    counts = {
        "hits": found & labelled,
        "found": found,
        "labelled": labelled,
    }
    batch = found.shape[0]
    classes = found.shape[-1]

    def of_sample(x: Any) -> Any:
        return x.reshape(batch, -1, classes).mean(
            axis=1,
            dtype=jnp.float32,
        )

    return {name: of_sample(x) for name, x in counts.items()}


def _f1(means: Any) -> Any:
    seen = means["found"] + means["labelled"]
    score = jnp.where(
        seen > 0,
        2 * means["hits"] / jnp.where(seen > 0, seen, 1),
        0,
    )
    return score.sum() / jnp.maximum((seen > 0).sum(), 1)


# F1 score: of the positive class where outputs are logits of the targets' shape, or of
# class 1 where there are two; of more classes, the mean over those that occur
# ("macro").
f1 = Metric(_f1_counts, _f1)


def r2(outputs: Any, targets: Any) -> Any:
    """Share of the targets' variance that the outputs explain, both of one shape.

    With several targets a sample it is the mean over them. It takes the whole test set
    at once: sums of squares over batches would lose the digits that matter where the
    targets' mean is large.
    """
    _same(outputs.shape, targets.shape, "r2")
    outputs = outputs.reshape(len(outputs), -1)
    targets = targets.reshape(len(targets), -1)
    left = jnp.square(targets - outputs).sum(axis=0)
    spread = jnp.square(targets - targets.mean(axis=0)).sum(axis=0)

    # constant targets: all of nothing is explained, or none of it
    flat = jnp.where(left > 0, 0.0, 1.0)
    explained = 1 - left / jnp.where(spread > 0, spread, 1)
    return jnp.where(spread > 0, explained, flat).mean()


def auc(outputs: Any, targets: Any) -> Any:
    """Area under the ROC curve, of the whole test set.

    The probability that a sample of the class has a higher score than one outside of
    it; equal scores count half (Hanley and McNeil 1982). Outputs are logits: of the
    shape of the targets 0 and 1, or (batch, classes) for integer labels; with more than
    two classes, the mean over each class against the rest, by its probability. It is
    NaN where a class has no sample, or all.
    """
    if outputs.shape == targets.shape:
        return _area(outputs.reshape(-1), targets.reshape(-1) > 0.5)
    _same(
        outputs.shape[:-1],
        targets.shape,
        "auc",
    )
    classes = outputs.shape[-1]
    outputs = outputs.reshape(-1, classes)
    targets = targets.reshape(-1)
    if classes == 2:
        return _area(outputs[:, 1] - outputs[:, 0], targets == 1)
    shares = jax.nn.softmax(outputs).T
    return jax.vmap(_area)(shares, targets == jnp.arange(classes)[:, None]).mean()


def _area(scores: Any, positive: Any) -> Any:
    """Area under the ROC curve of scores (n,) for what is positive, bool (n,)."""
    order = jnp.argsort(scores)
    ascending = scores[order]
    negatives = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(~positive[order])])
    below = negatives[jnp.searchsorted(ascending, scores, side="left")]
    up_to = negatives[jnp.searchsorted(ascending, scores, side="right")]

    # in whole numbers as long as possible: float32 has seven digits
    each = jnp.where(
        positive,
        (below + up_to) / (2 * negatives[-1]),
        0,
    )
    area = each.sum() / positive.sum()
    return jnp.where(
        jnp.isnan(scores).any(),
        jnp.nan,
        area,
    )


def _same(
    left: tuple,
    right: tuple,
    name: str,
) -> None:
    # broadcasting would turn (batch, 1) against (batch,) into a wrong (batch, batch)
    # without a word
    if left != right:
        raise ValueError(f"{name}: outputs give shape {left}, targets have {right}")

"""Metrics of classes that are told apart: hits, misses and their shares.

Outputs are logits. Where they have the targets' shape, each is a decision of its own
between 0 and 1 (the class that is looked for is 1); else the last dim holds the
classes, and targets are whole numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.metrics.metric import Metric, check_same
from lepton_jax.trees import is_real


def accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1.0 where the largest output is that of the target, else 0.0.

    Args:
      outputs: (..., classes).
      targets: indices, (...); or shares of the classes, such as mixed samples have, of
        the outputs' shape: then the largest share is the target.
    """
    are_shares = is_real(targets)
    if are_shares and outputs.ndim == targets.ndim:
        check_same(outputs.shape, targets.shape, "accuracy")
        targets = jnp.argmax(targets, axis=-1)
    check_same(outputs.shape[:-1], targets.shape, "accuracy")
    hits = jnp.argmax(outputs, axis=-1) == targets
    return hits.astype(jnp.float32)


def binary_accuracy(outputs: Any, targets: Any) -> Any:
    """Return 1.0 where the logit's sign agrees with the target, else 0.0.

    Args:
      outputs: logits.
      targets: 0 or 1, of the same shape.
    """
    check_same(outputs.shape, targets.shape, "binary_accuracy")
    hits = (outputs > 0) == (targets > 0.5)
    return hits.astype(jnp.float32)


def top_k_accuracy(outputs: Any, targets: Any, *, k: int = 5) -> Any:
    """Return 1.0 where the target is among the k largest outputs, else 0.0.

    Of equal outputs the first ones count as larger, as for `accuracy`. Another k is
    given by `functools.partial(metrics.top_k_accuracy, k=3)`.

    Args:
      outputs: (..., classes).
      targets: indices, (...).
      k: at least 1.
    """
    check_same(outputs.shape[:-1], targets.shape, "top_k_accuracy")
    classes = outputs.shape[-1]
    _, best = jax.lax.top_k(outputs, min(k, classes))
    hits = best == targets[..., None]
    return hits.any(axis=-1).astype(jnp.float32)


def counts(outputs: Any, targets: Any) -> dict[str, Any]:
    """Return the shares of hits, called and labelled, float32 (batch, classes)."""
    if outputs.shape == targets.shape:
        positive = targets > 0.5
        is_called = outputs > 0
        called = jnp.stack([~is_called, is_called], axis=-1)
        labelled = jnp.stack([~positive, positive], axis=-1)
    else:
        check_same(outputs.shape[:-1], targets.shape, "metric of classes")
        classes = jnp.arange(outputs.shape[-1])
        likeliest = jnp.argmax(outputs, axis=-1)
        called = likeliest[..., None] == classes
        labelled = targets[..., None] == classes
    return {
        "hits": _by_sample(called & labelled),
        "called": _by_sample(called),
        "labelled": _by_sample(labelled),
    }


def _by_sample(x: Any) -> Any:
    """Return the mean over all dims of a sample but the class."""
    classes = x.shape[-1]
    rows = x.reshape(len(x), -1, classes)
    return rows.mean(axis=1, dtype=jnp.float32)


def _sought(means: Any) -> Any:
    """Return the means of the classes that count: of two, the second alone."""
    if means["hits"].shape[-1] != 2:
        return means
    return {name: x[..., 1:] for name, x in means.items()}


def _mean_of_seen(score: Any, seen: Any) -> Any:
    """Return the mean of a score over the classes that were seen."""
    occurs = seen > 0
    total = jnp.where(occurs, score, 0).sum()
    return total / jnp.maximum(occurs.sum(), 1)


def _share(part: Any, whole: Any) -> Any:
    """Return part / whole, and 0 where there is nothing."""
    there = whole > 0
    quotient = part / jnp.where(there, whole, 1)
    return jnp.where(there, quotient, 0)


def _f1(means: Any) -> Any:
    """Return 2 * hits / (called + labelled)."""
    means = _sought(means)
    seen = means["called"] + means["labelled"]
    return _mean_of_seen(_share(2 * means["hits"], seen), seen)


def _precision(means: Any) -> Any:
    means = _sought(means)
    seen = means["called"] + means["labelled"]
    return _mean_of_seen(_share(means["hits"], means["called"]), seen)


def _recall(means: Any) -> Any:
    means = _sought(means)
    seen = means["called"] + means["labelled"]
    return _mean_of_seen(_share(means["hits"], means["labelled"]), seen)


def _balanced(means: Any) -> Any:
    recalls = _share(means["hits"], means["labelled"])
    return _mean_of_seen(recalls, means["labelled"])


# Of the positive class where outputs are logits of the targets' shape, or of class 1
# where there are two; of more classes, the mean over those that occur ("macro"). What
# is never called has a precision of 0, what is never there a recall of 0.
f1 = Metric(counts, _f1)
precision = Metric(counts, _precision)
recall = Metric(counts, _recall)
# The mean over the classes that are there of the share that is found.
balanced_accuracy = Metric(counts, _balanced)

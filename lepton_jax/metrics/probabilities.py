"""Metrics of the probabilities that outputs, which are logits, stand for.

Where outputs have the targets' shape, each is the logit of its own 0 or 1; else the
last dim holds the classes, and targets are whole numbers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax import losses
from lepton_jax.metrics.metric import Metric, check_same

# bins of the confidence; as in Guo et al. 2017, section 5
BINS = 15


def log_loss(outputs: Any, targets: Any) -> Any:
    """Return minus the logarithm of the target's probability."""
    if outputs.shape == targets.shape:
        return losses.binary_cross_entropy(outputs, targets)
    check_same(outputs.shape[:-1], targets.shape, "log_loss")
    return losses.cross_entropy(outputs, targets)


def brier(outputs: Any, targets: Any) -> Any:
    """Return the squared error of the probabilities.

    It is (p - t)^2 for the probability p of a 1; over more than two classes the sum of
    these (Brier 1950). So 0 is best, and the worst is 1, or 2 for more than two.
    """
    if outputs.shape == targets.shape:
        return jnp.square(jax.nn.sigmoid(outputs) - targets)
    check_same(outputs.shape[:-1], targets.shape, "brier")
    classes = outputs.shape[-1]
    wanted = targets[..., None] == jnp.arange(classes)
    errors = jax.nn.softmax(outputs) - wanted
    squares = jnp.square(errors).sum(axis=-1)
    return squares / 2 if classes == 2 else squares


def calibration(outputs: Any, targets: Any) -> dict[str, Any]:
    """Return how sure the model is, and how often it is right, by bins.

    The confidence is the probability of the class that is called. Of a sample with
    several decisions all count.

    Returns:
      "share", "confidence" and "hits" of each bin, float32 (batch, `BINS`): the bin's
      entry holds 1, the confidence, and whether the call is right; others 0.
    """
    if outputs.shape == targets.shape:
        called = outputs > 0
        right = called == (targets > 0.5)
        confidence = jax.nn.sigmoid(jnp.abs(outputs))
    else:
        check_same(outputs.shape[:-1], targets.shape, "calibration_error")
        right = jnp.argmax(outputs, axis=-1) == targets
        confidence = jax.nn.softmax(outputs).max(axis=-1)

    number = jnp.ceil(confidence * BINS) - 1
    in_bin = number[..., None] == jnp.arange(BINS)
    columns = {
        "share": in_bin,
        "confidence": in_bin * confidence[..., None],
        "hits": in_bin * right[..., None],
    }

    def by_sample(x: Any) -> Any:
        rows = x.reshape(len(x), -1, BINS)
        return rows.mean(axis=1, dtype=jnp.float32)

    return {name: by_sample(x) for name, x in columns.items()}


def _error(means: Any) -> Any:
    return jnp.abs(means["hits"] - means["confidence"]).sum()


# Expected calibration error (Naeini et al. 2015; Guo et al. 2017, equation 3): the mean
# distance, over bins of the confidence, between confidence and share of right calls.
calibration_error = Metric(calibration, _error)


def calibration_curve(outputs: Any, targets: Any) -> np.ndarray:
    """Return how often the model is right, by how sure it is.

    Args:
      outputs: logits, as for `calibration_error`.
      targets: the labels.

    Returns:
      float32 (bins, 3), a row for each of `BINS` bins of the confidence that holds
      some calls: the share of all calls, their mean confidence, the share of right
      ones among them.
    """
    columns = calibration(jnp.asarray(outputs), jnp.asarray(targets))
    share = np.asarray(columns["share"]).mean(axis=0)
    confidence = np.asarray(columns["confidence"]).mean(axis=0)
    hits = np.asarray(columns["hits"]).mean(axis=0)
    used = share > 0
    share = share[used]
    rows = (share, confidence[used] / share, hits[used] / share)
    return np.stack(rows, axis=1)

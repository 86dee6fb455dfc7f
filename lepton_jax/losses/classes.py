"""Losses of classes with weights, and with labels that are not quite certain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lepton_jax.errors import DataError, RecipeError
from lepton_jax.losses.stock import binary_cross_entropy, cross_entropy

WHERE = "losses.weighted_cross_entropy"


def weighted_cross_entropy(
    outputs: jax.Array,
    targets: jax.Array,
    *,
    weights: Sequence[float] | None = None,
    smoothing: float = 0.0,
    z: float = 0.0,
) -> Any:
    """Cross entropy with a weight for each class, smoothed labels, and a z-loss.

    With a smoothing of e, the label y of k classes is the distribution that gives it
    the share 1 - e + e / k, and each other class e / k. The mean over samples is
    weighted by the weight of each sample's own class. A z-loss adds z log(Z)^2, where Z
    is the sum of the exponentials of the logits: it keeps them from drifting, which
    steadies language models at high rates and in low precision. Give the settings by
    `functools.partial`:

        loss=partial(losses.weighted_cross_entropy, weights=(1.0, 5.0), smoothing=0.1)

    References:
      Szegedy et al. 2016, "Rethinking the Inception architecture", section 7.
      Chowdhery et al. 2022, "PaLM", section 5 (z-loss, with z = 1e-4).

    Args:
      outputs: logits, (batch, ..., classes).
      targets: whole numbers, (batch, ...); or distributions over the classes, of the
        outputs' shape, such as mixed samples have.
      weights: one for each class; see `balanced`. None: all weigh alike.
      smoothing: from 0 to below 1.
      z: weight of the z-loss, at least 0.

    Returns:
      Values (batch, ...); with weights a pair (values, weights).

    Raises:
      RecipeError: there are more or fewer weights than classes, or the smoothing or z
        is out of range.
    """
    if not z >= 0:
        raise RecipeError(
            f"z is {z!r}", where=WHERE, remedy="give a weight of at least 0, e.g. 1e-4"
        )
    if not 0 <= smoothing < 1:
        raise RecipeError(
            f"smoothing is {smoothing!r}",
            where=WHERE,
            remedy="give a share from 0 to below 1, e.g. 0.1",
        )
    classes = outputs.shape[-1]
    are_shares = targets.ndim == outputs.ndim
    if are_shares:
        values = optax.softmax_cross_entropy(outputs, targets)
    else:
        values = cross_entropy(outputs, targets)
    if smoothing:
        # the cross entropy of the even distribution
        even = jax.nn.logsumexp(outputs, axis=-1) - outputs.mean(axis=-1)
        values = (1 - smoothing) * values + smoothing * even
    if z:
        values = values + z * jax.nn.logsumexp(outputs, axis=-1) ** 2
    if weights is None:
        return values

    if len(weights) != classes:
        raise RecipeError(
            f"there are {len(weights)} weights for {classes} classes",
            where=WHERE,
            remedy="give one weight for each of the model's outputs",
        )
    each = jnp.asarray(weights, values.dtype)
    own = targets @ each if are_shares else each[targets]
    return values, own.astype(values.dtype)


def weighted_binary_cross_entropy(
    outputs: jax.Array,
    targets: jax.Array,
    *,
    positive: float = 1.0,
    smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Binary cross entropy with a weight for the positive class, and smoothed labels.

    Args:
      outputs: logits.
      targets: 0 or 1, or shares between, of the same shape.
      positive: weight of the positive class; the negative one weighs 1.
      smoothing: e, from 0 to below 1; labels become e / 2 and 1 - e / 2.

    Returns:
      (values, weights), of the same shape.

    Raises:
      RecipeError: the weight is not above 0, or the smoothing is out of range.
    """
    if not positive > 0 or not 0 <= smoothing < 1:
        raise RecipeError(
            f"positive is {positive!r}, smoothing is {smoothing!r}",
            where="losses.weighted_binary_cross_entropy",
            remedy="give a weight above 0, and a share from 0 to below 1",
        )
    targets = targets.astype(outputs.dtype)
    weights = 1 + (positive - 1) * targets
    smoothed = targets * (1 - smoothing) + smoothing / 2
    return binary_cross_entropy(outputs, smoothed), weights


def balanced(labels: Any, classes: int | None = None) -> tuple[float, ...]:
    """Return weights with which all classes weigh alike in a sum over some samples.

    The weight of a class with n of N samples is N / (k n), as in scikit-learn's
    `class_weight="balanced"`; their mean over the samples is 1.

    Args:
      labels: those of the training samples, whole numbers; negative ones are left out.
      classes: their number, k. None: the greatest label plus 1.

    Raises:
      DataError: there are no labels, or a class has no sample, so that no weight is
        right for it.

    Example:
      >>> balanced([0, 0, 0, 1])
      (0.6666666666666666, 2.0)
    """
    labels = np.asarray(labels).reshape(-1)
    is_whole = np.issubdtype(labels.dtype, np.integer)
    labels = labels[labels >= 0] if is_whole else labels[:0]
    if labels.size == 0:
        raise DataError(
            "there are no labels to balance",
            where="losses.balanced",
            remedy="give the whole numbers that are the training samples' targets",
        )
    counts = np.bincount(labels, minlength=classes or 0)
    missing = np.flatnonzero(counts == 0)
    if missing.size or (classes is not None and counts.size != classes):
        what = f"class {missing[0]} has" if missing.size else "some labels have"
        fault = "no sample" if missing.size else f"no place among {classes} classes"
        raise DataError(
            f"{what} {fault}, so nothing is known of its weight",
            where="losses.balanced",
            remedy="give the labels of all training samples, or weights by hand",
        )
    weights = labels.size / (counts.size * counts)
    return tuple(float(weight) for weight in weights)

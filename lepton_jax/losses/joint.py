"""Losses of several labels, whose logits are side by side in one array."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.losses.stock import cross_entropy


def joint_cross_entropy(
    outputs: jax.Array,
    targets: jax.Array,
    *,
    classes: Sequence[int],
) -> jax.Array:
    """Return the cross entropy of several labels a row, (batch, labels).

    Args:
      outputs: logits of the labels' classes, one label after the other, (batch, sum of
        classes).
      targets: whole numbers, (batch, labels).
      classes: count of each label's classes.
    """
    ends = np.cumsum(classes)[:-1].tolist()
    parts = jnp.split(outputs, ends, axis=-1)
    values = [
        cross_entropy(part, label)
        for part, label in zip(parts, jnp.moveaxis(targets, -1, 0), strict=True)
    ]
    return jnp.stack(values, axis=-1)


def joint_labels(
    outputs: jax.Array,
    *,
    classes: Sequence[int],
) -> jax.Array:
    """Return the most likely class of each of several labels, (batch, labels).

    Args:
      outputs: see `joint_cross_entropy`.
      classes: count of each label's classes.
    """
    ends = np.cumsum(classes)[:-1].tolist()
    parts = jnp.split(outputs, ends, axis=-1)
    labels = [jnp.argmax(part, axis=-1) for part in parts]
    return jnp.stack(labels, axis=-1)

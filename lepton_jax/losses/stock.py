"""Losses that Optax has, under the names by which users know them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
binary_cross_entropy = optax.sigmoid_binary_cross_entropy
squared_error = optax.squared_error
huber = optax.huber_loss
# the names under which users know them
STOCK = {
    cross_entropy: "cross_entropy",
    binary_cross_entropy: "binary_cross_entropy",
    squared_error: "squared_error",
    huber: "huber",
}


def padded_cross_entropy(
    outputs: jax.Array,
    targets: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Cross entropy that leaves out targets below 0, which are padding.

    Args:
      outputs: logits, (batch, ..., classes).
      targets: whole numbers, (batch, ...).

    Returns:
      (values, weights), (batch, ...) each; the weights are 0 for padding, else 1.
    """
    values = cross_entropy(outputs, jnp.maximum(targets, 0))
    return values, (targets >= 0).astype(jnp.float32)

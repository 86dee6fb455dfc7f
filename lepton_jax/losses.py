"""Losses, which are Optax's, and their averages over samples that count.

A loss or metric is a function (outputs, targets) of batches. It returns one value per sample, shape (batch, ...); or a
pair (values, weights) of that shape for a weighted mean; or a scalar that is already the batch's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lepton_jax.errors import ModelError

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
binary_cross_entropy = optax.sigmoid_binary_cross_entropy
squared_error = optax.squared_error
huber = optax.huber_loss


def totals(function: Callable, outputs: Any, targets: Any, valid: jax.Array | None = None) -> tuple[Any, Any]:
    """Sum of a loss or metric over a batch, and the weight that the sum stands for; their ratio is the mean.

    Args:
      function: as described at the top of this module.
      outputs: the model's outputs, batch dim first.
      targets: what the samples should give, batch dim first.
      valid: bool (batch,), False where a row is padding; None: every row counts.

    Raises:
      ModelError: the function's value does not start with the batch dim.
    """
    values = function(outputs, targets)
    weights = None
    if isinstance(values, tuple) and len(values) == 2:
        values, weights = values
    batch = jax.tree.leaves(outputs)[0].shape[0]
    if jnp.ndim(values) == 0:
        if valid is None:
            return values, 1.0
        each = lambda *pair: function(*jax.tree.map(lambda x: x[None], pair))  # noqa: E731
        values = jax.vmap(each)(outputs, targets)
    if values.shape[0] != batch:
        raise ModelError(f"{_name(function)} returns shape {values.shape} for a batch of {batch} samples",
                         where=_name(function), remedy="return one value per sample, batch dim first, or a scalar mean")
    if jnp.issubdtype(values.dtype, jnp.bool_) or jnp.issubdtype(values.dtype, jnp.integer):
        values = values.astype(jnp.float32)
    if valid is not None:
        rows = valid.reshape((batch,) + (1,) * (values.ndim - 1))
        # where, not a product: a padded row may hold NaN
        values = jnp.where(rows, values, 0)
        weights = jnp.where(rows, jnp.ones_like(values) if weights is None else weights, 0)
        return (values * weights).sum(), weights.sum()
    if weights is None:
        return values.sum(), float(values.size)
    return (values * weights).sum(), weights.sum()


def measure(recipe: Any, outputs: Any, targets: Any, valid: jax.Array | None = None) -> dict[str, tuple[Any, Any]]:
    """(sum, weight) of the recipe's loss, under "loss", and of each of its metrics, over one batch."""
    functions = {"loss": recipe.loss} | {n: getattr(m, "values", m) for n, m in recipe.metrics.items()}
    return {name: totals(function, outputs, targets, valid) for name, function in functions.items()}


def finish(recipe: Any, name: str, mean: Any) -> Any:
    """What a metric makes of its mean; a loss is its mean."""
    return getattr(recipe.metrics.get(name), "finish", lambda x: x)(mean)


def decoder(loss: Callable) -> Callable[[Any], Any]:
    """What `predict` makes of the outputs of a model trained with `loss`, unless the recipe says otherwise.

    Integer labels come back as the most likely one (argmax over the last dim), binary labels as 0 or 1; otherwise the
    outputs as they are.
    """
    return _most_likely if loss is cross_entropy else _zero_or_one if loss is binary_cross_entropy else _as_they_are


def _most_likely(outputs: Any) -> Any:
    return jnp.argmax(outputs, axis=-1)


def _zero_or_one(outputs: Any) -> Any:
    return (outputs > 0).astype(jnp.int32)


def _as_they_are(outputs: Any) -> Any:
    return outputs


def _name(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)

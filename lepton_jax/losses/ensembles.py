"""Losses of ensembles that are one model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def of_members(
    outputs: jax.Array,
    targets: jax.Array,
    *,
    loss: Callable[..., Any],
    ndim: int,
) -> Any:
    """Return the loss of each member of an ensemble, such as `models.TabM`.

    The mean over the members is a loss under which each is trained by itself. What an
    ensemble gives outside of training, one output a row, gets the plain loss.

    Args:
      outputs: (batch, members, ...) in training, (batch, ...) outside of it.
      targets: (batch, ...).
      loss: of (batch, ...) outputs and targets: values, or a pair with weights.
      ndim: count of dims of the outputs outside of training.
    """
    if jnp.ndim(outputs) == ndim:
        return loss(outputs, targets)
    each = jax.vmap(
        loss,
        in_axes=(1, None),
        out_axes=1,
    )
    return each(outputs, targets)

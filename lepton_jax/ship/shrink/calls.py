"""Calls of a module outside of a train step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def called(
    module: Any,
    inputs: Any,
) -> Any:
    """Call a module on inputs: an array, or a dict of its arguments by name."""
    if isinstance(inputs, dict):
        return module(**inputs)
    return module(inputs)


def some_inputs(
    trainer: Any,
    rows: int = 2,
) -> Any:
    """Return a batch of zeros as the model takes it, after `Recipe.preprocess`."""

    def zeros(shape: Any) -> Any:
        extents = (rows, *shape.shape[1:])
        return jnp.asarray(np.zeros(extents, shape.dtype))

    inputs = jax.tree.map(zeros, trainer.program.trace.inputs)
    return preprocessed(trainer, inputs)


def preprocessed(
    trainer: Any,
    inputs: Any,
) -> Any:
    """Return inputs as the model takes them."""
    preprocess = trainer.recipe.preprocess
    return preprocess(inputs) if preprocess else inputs

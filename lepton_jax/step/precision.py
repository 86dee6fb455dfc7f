"""Precision policies: in which dtype the model computes, and the loss scale that
float16 needs.

Master weights, optimizer state, losses and metrics are float32 in each policy.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

START = 2.0**15  # of the loss, to begin with


def cast(tree: Any, precision: str) -> Any:
    """Floating-point leaves in the compute dtype of `precision`; the tree itself for
    float32.
    """
    return tree if precision == "float32" else _floats_to(tree, jnp.dtype(precision))


def to_float32(tree: Any, precision: str) -> Any:
    """Outputs of a low-precision model as float32, so that losses and metrics are
    computed there.
    """
    return tree if precision == "float32" else _floats_to(tree, jnp.float32)


def _floats_to(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()

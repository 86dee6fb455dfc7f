"""Precision policies: in which dtype the model computes, and the loss scale that float16 needs.

Master weights, optimizer state, losses and metrics are float32 in each policy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

GROWTH_INTERVAL = 2000  # finite steps before the scale doubles: Micikevicius et al. 2018, section 3.2
START = 2.0**15
LOWEST = 1.0


class LossScale(NamedTuple):
    """Dynamic loss scale (Micikevicius et al. 2018, "Mixed Precision Training"): float32 value, int32 finite steps."""

    value: Any
    finite_steps: Any


def cast(tree: Any, precision: str) -> Any:
    """Floating-point leaves in the compute dtype of `precision`; the tree itself for float32."""
    return tree if precision == "float32" else _floats_to(tree, jnp.dtype(precision))


def to_float32(tree: Any, precision: str) -> Any:
    """Outputs of a low-precision model as float32, so that losses and metrics are computed there."""
    return tree if precision == "float32" else _floats_to(tree, jnp.float32)


def _floats_to(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def init_scale(precision: str) -> LossScale | tuple[()]:
    if precision != "float16":
        return ()
    return LossScale(jnp.float32(START), jnp.int32(0))


def next_scale(scale: LossScale, finite: jax.Array) -> LossScale:
    """Halved after a step with a non-finite gradient, doubled after `GROWTH_INTERVAL` finite ones."""
    grow = finite & (scale.finite_steps + 1 >= GROWTH_INTERVAL)
    value = jnp.where(finite, jnp.where(grow, scale.value * 2, scale.value), jnp.maximum(scale.value / 2, LOWEST))
    return LossScale(value, jnp.where(finite & ~grow, scale.finite_steps + 1, 0))


def all_finite(tree: Any) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]).all()

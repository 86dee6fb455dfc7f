"""Precision policies: the dtype in which the model computes, and float16's loss scale.

Master weights, optimizer state, losses and metrics are float32 in each policy.

With "fp8" and "int8" the model computes in bfloat16. In training the products of its
large kernels are taken of 8 bits, see `planner.rewrite.narrow`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.trees import is_real

# Precisions whose name is not the dtype that the model computes in.
COMPUTED_IN = {"fp8": "bfloat16", "int8": "bfloat16"}

# the first loss scale: 2**15, with which a loss of 1 is within float16
START = 2.0**15


def dtype_of(precision: str) -> Any:
    """Return the dtype in which a model computes."""
    return jnp.dtype(COMPUTED_IN.get(precision, precision))


def cast(tree: Any, precision: str) -> Any:
    """Return a tree with its floating-point leaves in the dtype of a precision.

    For float32 it is the tree itself.
    """
    return tree if precision == "float32" else _floats_to(tree, dtype_of(precision))


def to_float32(tree: Any, precision: str) -> Any:
    """Return outputs of a low-precision model as float32.

    Losses and metrics are computed from them.
    """
    return tree if precision == "float32" else _floats_to(tree, jnp.float32)


def all_finite(tree: Any) -> jax.Array:
    """Whether all entries of a tree of arrays are finite, bool ()."""
    finite = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)]
    return jnp.stack(finite).all()


def _floats_to(tree: Any, dtype: Any) -> Any:
    def convert(x: Any) -> Any:
        return x.astype(dtype) if is_real(x) else x

    return jax.tree.map(convert, tree)

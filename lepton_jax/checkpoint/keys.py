"""Random keys in a state: files hold the numbers behind them, their key data."""

from __future__ import annotations

from typing import Any

import jax


def is_key(leaf: Any) -> bool:
    """Whether a leaf, or the shape of one, is of random keys."""
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def stored_shape(leaf: Any) -> tuple[int, ...]:
    """Return the shape in which a leaf is stored."""
    if not is_key(leaf):
        return leaf.shape
    data = jax.eval_shape(jax.random.key_data, leaf)
    return data.shape


def as_stored(leaf: Any) -> Any:
    """Return the numbers of a leaf."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def as_wanted(stored: Any, leaf: Any) -> Any:
    """Return stored numbers as a leaf of a template, which may be of random keys."""
    if not is_key(leaf):
        return stored
    keys = jax.random.wrap_key_data(stored, impl=_implementation(leaf))
    return jax.device_put(keys, leaf.sharding)


def _implementation(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return str(jax.random.key_impl(leaf))
    return leaf.dtype._impl

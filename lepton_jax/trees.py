"""Pytrees as flat tables: paths, leaves, shapes and bytes."""

from __future__ import annotations

from typing import Any

import jax


def path_of(path: tuple) -> str:
    """A pytree path as "blocks/0/kernel"."""
    return "/".join(
        str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path
    )


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree under their paths, in the order of the tree."""
    return {
        path_of(path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def shapes(tree: Any) -> str:
    """The arrays of a pytree as "float32[8, 4]", or "image float32[8, 4], mask
    bool[8]".
    """
    return ", ".join(
        (
            f"{path} {x.dtype}{list(x.shape)}".strip()
            if hasattr(x, "dtype")
            else f"{path} {x!r}".strip()
        )
        for path, x in by_path(tree).items()
    ) or repr(tree)


def nbytes(leaf: Any) -> int:
    """Bytes of an array or a shape; a random key counts as its key data."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.size * leaf.dtype.itemsize

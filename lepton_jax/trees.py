"""Pytrees as flat tables: paths, leaves, shapes and bytes."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import jax


def path_of(path: tuple) -> str:
    """Return a pytree path as "blocks/0/kernel"."""
    return "/".join(map(_key_name, path))


def _key_name(key: Any) -> str:
    # a key of a dict, the name of a field, or an index
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def by_path(
    tree: Any,
) -> dict[str, Any]:
    """Return the leaves of a pytree under their paths, in the order of the tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_of(path): leaf for path, leaf in leaves}


def with_leaves(tree: Any, leaves: Sequence[Any]) -> Any:
    """Return a pytree of the structure of another, with leaves of its own."""
    structure = jax.tree.structure(tree)
    return jax.tree.unflatten(structure, leaves)


def matches(path: str, pattern: str) -> bool:
    """Whether a path matches as in a shell; "**/" also stands for no folder at all.

    >>> matches("blocks/0/kernel", "blocks/*"), matches("kernel", "**/kernel")
    (True, True)
    """
    if fnmatch.fnmatchcase(path, pattern):
        return True
    no_folder = pattern.removeprefix("**/")
    return no_folder != pattern and fnmatch.fnmatchcase(path, no_folder)


def shapes(tree: Any) -> str:
    """Describe the arrays of a pytree.

    Returns:
      "float32[8, 4]", or "image float32[8, 4], mask bool[8]".
    """
    descriptions = []
    for path, leaf in by_path(tree).items():
        is_array = hasattr(leaf, "dtype")
        described = f"{leaf.dtype}{list(leaf.shape)}" if is_array else repr(leaf)
        descriptions.append(f"{path} {described}".strip())
    return ", ".join(descriptions) or repr(tree)


def is_real(x: Any) -> bool:
    """Whether an array, or a shape, is of real numbers."""
    return jax.numpy.issubdtype(x.dtype, jax.numpy.floating)


def is_inexact(x: Any) -> bool:
    """Whether an array, or a shape, is of real or complex numbers."""
    return jax.numpy.issubdtype(x.dtype, jax.numpy.inexact)


def nbytes(leaf: Any) -> int:
    """Return the bytes of an array or a shape; a random key counts as its key data."""
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.size * leaf.dtype.itemsize

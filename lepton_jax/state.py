"""Everything that a train step changes: one pytree, and all that a checkpoint holds of
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state of a training run after `step` optimizer updates.

    Attributes:
      step: updates done, int32 scalar.
      params: what the optimizer changes; nested dict of arrays, float32 master weights.
      variables: the module's other collections (batch statistics, dropout keys and
        counts, carries, constants).
      optimizer: state of the Optax transformation.
      controller: a `controller.ControllerState`; an empty tuple where nothing can ever
        move.
      key: the run's random key; step keys are folded from it, so it never changes.
    """

    step: Any
    params: Any
    variables: Any
    optimizer: Any
    controller: Any
    key: Any


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

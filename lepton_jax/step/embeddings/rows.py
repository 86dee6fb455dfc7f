"""The rows that a batch touches: their numbers, and the way to them and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.step.embeddings.tables import Tables, followed, slots_for
from lepton_jax.step.state import State
from lepton_jax.trees import by_path, with_leaves

# (path of an array of the state, its rows) to the same rows where they are to lie
Place = Callable[[str, Any], Any]


def touched(
    ids: Any,
    size: int,
) -> jax.Array:
    """Return the numbers of the rows that a batch touches, ascending.

    >>> touched(jnp.array([5, 2, 5]), size=8)
    Array([ 2,  5, 10, 11], dtype=int32)

    Args:
      ids: int32 (lookups,), `size` for what is no row.
      size: rows of the table.

    Returns:
      int32 (slots,); those of free slots are no rows: `size` and more.
    """
    slots = slots_for(len(ids), size)
    ordered = jnp.sort(ids)
    # a pad: there may be more slots than ids
    pad = jnp.full(
        max(slots - len(ids), 0),
        size,
        jnp.int32,
    )
    ordered = jnp.concatenate([ordered, pad])
    again = ordered[1:] == ordered[:-1]
    repeated = jnp.concatenate([jnp.zeros(1, bool), again])
    # a second sort is quicker than a scatter (XLA of jax 0.10 on a CPU)
    rows = jnp.sort(jnp.where(repeated, size, ordered))[:slots]
    return jnp.where(
        rows < size,
        rows,
        size + jnp.arange(slots, dtype=jnp.int32),
    )


class Rows:
    """The touched rows of one step.

    Args:
      tables: the tables.
      rows: the numbers of the rows, by path of the table (see `touched`).
      place: puts the rows of an array where they are to lie on several devices.
    """

    def __init__(
        self,
        tables: Tables,
        rows: Mapping[str, Any],
        place: Place = lambda path, x: x,
    ):
        self.rows = dict(rows)
        self._tables = tables
        self._place = place

    def taken(
        self,
        state: State,
    ) -> State:
        """Return a state with the touched rows of its tables in place of them."""

        def take(
            path: str,
            whole: Any,
            rows: Any,
        ) -> Any:
            taken = whole.at[rows].get(
                mode="fill",
                fill_value=0,
                indices_are_sorted=True,
                unique_indices=True,
            )
            return self._place(path, taken)

        return self._mapped(take, state, state)

    def put(
        self,
        state: State,
        after: State,
    ) -> State:
        """Return the state after a step.

        Args:
          state: the one before it, with the tables.
          after: the one after it, with the touched rows in place of them.
        """
        whole = by_path(state)

        def put(
            path: str,
            part: Any,
            rows: Any,
        ) -> Any:
            return (
                whole[path]
                .at[rows]
                .set(
                    self._place(path, part),
                    mode="drop",
                    indices_are_sorted=True,
                    unique_indices=True,
                )
            )

        return self._mapped(put, after, state)

    def _mapped(
        self,
        function: Callable,
        state: State,
        like: State,
    ) -> State:
        """Apply a function to the arrays of the state that have a table's rows."""
        tables = rowwise_arrays(self._tables.sizes, like)
        leaves = []
        for path, x in by_path(state).items():
            if path in tables:
                x = function(path, x, self.rows[tables[path]])
            leaves.append(x)
        return with_leaves(state, leaves)


def rowwise_arrays(
    sizes: Mapping[str, int],
    state: Any,
) -> dict[str, str]:
    """Return the arrays of a state that have the rows of a table.

    Args:
      sizes: rows of each table, by path.
      state: a `State`, the tables whole.

    Returns:
      Path in the state to the path of the table.
    """
    leaves = by_path(state)
    params = {
        path.removeprefix("params/") for path in leaves if path.startswith("params/")
    }
    found = {}
    for path, leaf in leaves.items():
        if not path.startswith(("params/", "optimizer/")):
            continue
        table = followed(path, params)
        if table is None or table not in sizes:
            continue
        if leaf.ndim and leaf.shape[0] == sizes[table]:
            found[path] = table
    return found

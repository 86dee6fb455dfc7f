"""The tables of a recipe: its embeddings that are updated by rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from lepton_jax.trees import by_path, with_leaves

# slots are a multiple of this, so that devices can divide them among each other; where
# there are fewer, of a power of two
MULTIPLE = 128


@dataclass(frozen=True)
class Table:
    """An embedding that is updated by rows.

    Attributes:
      path: of the parameter, without "params/".
      size: its rows.
      slots: rows that a batch can touch at the most, rounded up.
      lazy: whether an update of the whole would also move rows that are not touched.
    """

    path: str
    size: int
    slots: int
    lazy: bool

    @property
    def why(self) -> str:
        """The sentence of a plan on this table."""
        most = min(self.slots, self.size)
        others = (
            "and the others wait" if self.lazy else "as the others would stay anyway"
        )
        return (
            f"a step updates the rows that it looks up alone, at most {most:,} of"
            f" {self.size:,}, {others}"
        )


@dataclass(frozen=True)
class Tables:
    """The tables of a recipe.

    Attributes:
      tables: by path.
      hints: on large embeddings that could be updated by rows, if a person wanted it.
      refused: on embeddings that a person wants to be, and that can't be.
    """

    tables: Mapping[str, Table] = field(default_factory=dict)
    hints: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.tables)

    @property
    def sizes(self) -> dict[str, int]:
        """The rows of each table, by path."""
        return {path: table.size for path, table in self.tables.items()}

    def leaves(
        self,
        params: Any,
    ) -> dict[str, Any]:
        """Return the parameters by path, in the order of the tree."""
        return by_path(params)

    def whole(
        self,
        params: Any,
    ) -> Any:
        """Return the shapes of the parameters, the tables whole.

        Args:
          params: the parameters with the touched rows in place of the tables.
        """
        return self._resized(params, lambda table: table.size)

    def compact(
        self,
        params: Any,
    ) -> Any:
        """Return the shapes of the parameters with the slots in place of the tables."""
        return self._resized(params, lambda table: table.slots)

    def rows(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the touched rows' numbers, by path."""
        return {
            path: jax.ShapeDtypeStruct((table.slots,), "int32")
            for path, table in self.tables.items()
        }

    def _resized(
        self,
        params: Any,
        count: Callable[[Table], int],
    ) -> Any:
        shapes = []
        for path, x in by_path(params).items():
            shape = tuple(x.shape)
            if path in self.tables:
                shape = (count(self.tables[path]), *shape[1:])
            shapes.append(jax.ShapeDtypeStruct(shape, x.dtype))
        return with_leaves(params, shapes)


NO_TABLES = Tables()


def slots_for(
    lookups: int,
    size: int,
) -> int:
    """Return the slots of a table.

    >>> slots_for(3, 8), slots_for(1000, 10**6), slots_for(1000, 300)
    (4, 1024, 384)

    Args:
      lookups: ids that a batch looks up.
      size: rows of the table.
    """
    most = min(lookups, size)
    if most >= MULTIPLE:
        return -(-most // MULTIPLE) * MULTIPLE
    return 1 << max(most - 1, 0).bit_length()


def followed(
    path: str,
    params: Iterable[str],
) -> str | None:
    """Return the parameter whose state an array is: its path ends in the parameter's.

    >>> followed("optimizer/0/mu/users/embedding", {"users/embedding", "embedding"})
    'users/embedding'

    Args:
      path: of an array of the optimizer's or the controller's state.
      params: paths of the parameters.
    """
    tail = path
    while tail:
        _, _, tail = tail.partition("/")
        if tail in params:
            return tail
    return None

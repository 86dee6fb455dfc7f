"""Columns of a row group as leaves of samples.

A leaf is made of one column, or of several side by side:

    inputs=["age", "hours"], target="income"

    age  hours  income         inputs         targets
    39   40     0         ->   [[39, 40],     [0,
    50   13     1               [50, 13]]      1]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_jax.data.arrays import Arrays
from lepton_jax.data.extras import needs
from lepton_jax.errors import DataError, nearest

Columns = str | Sequence[str] | Mapping[str, str | Sequence[str]]
Decode = Callable[[bytes], np.ndarray]

INPUTS = "inputs"
TARGETS = "targets"
OF_PREPARATION = "lepton."  # begins the columns that say where a row comes from
BETWEEN = "/"  # of the parts of a leaf's path


@dataclass(frozen=True, eq=False)
class Ragged:
    """Values of different lengths: lists of numbers, or bytes.

    Attributes:
      values: all of them, one after the other, (values,).
      ends: where those of each row end, (rows + 1,); the first is 0.
    """

    values: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends) - 1

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.values.nbytes + self.ends.nbytes

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.ends[row] : self.ends[row + 1]]


Leaf = np.ndarray | Ragged


@dataclass(frozen=True)
class Leaves:
    """The leaves of a sample, and the columns that each is made of.

    Attributes:
      columns: by path: "inputs", "inputs/tokens", "targets"; a name if the leaf is
        that column, a tuple of names for columns side by side.
      decode: functions from the bytes of a column's cell to an array, by column.
    """

    columns: Mapping[str, str | tuple[str, ...]]
    decode: Mapping[str, Decode]

    @classmethod
    def of(
        cls,
        inputs: Columns | None,
        target: Columns | None,
        decode: Mapping[str, Decode],
        known: Sequence[str],
        where: str,
    ) -> Leaves:
        """Return the leaves that a person asks for.

        Args:
          inputs: a column, several side by side, or either by the model's argument;
            None: all but the target's.
          target: the same; None: there is none, as the inputs are documents.
          decode: by column.
          known: the columns that there are.
          where: the data, for messages.

        Raises:
          DataError: there is no such column.
        """
        targets = _by_path(TARGETS, target) if target is not None else {}
        if inputs is None:
            used = {name for names in targets.values() for name in _listed(names)}
            others = [
                name
                for name in known
                if name not in used and not name.startswith(OF_PREPARATION)
            ]
            inputs = others
        columns = _by_path(INPUTS, inputs) | targets

        leaves = cls(columns, decode)
        for name in [*leaves.names, *decode]:
            if name not in known:
                raise DataError(
                    f"there is no column {name!r}{nearest(name, known)}",
                    where=where,
                    remedy=f"the columns are {', '.join(known)}",
                )
        return leaves

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        names = [name for leaf in self.columns.values() for name in _listed(leaf)]
        return list(dict.fromkeys(names))

    @property
    def of_documents(self) -> bool:
        """Whether a sample is its inputs alone: a vector of tokens."""
        return list(self.columns) == [INPUTS]

    def make(
        self,
        table: Mapping[str, Leaf],
        where: str,
    ) -> dict[str, Leaf]:
        """Make the leaves of a table's rows.

        Args:
          table: its columns.
          where: the row group, for messages.

        Raises:
          DataError: columns that stand side by side are no numbers.
        """
        leaves: dict[str, Leaf] = {}
        for path, names in self.columns.items():
            if isinstance(names, str):
                leaves[path] = table[names]
                continue
            alone = table[names[0]]
            if len(names) == 1 and (isinstance(alone, Ragged) or alone.ndim > 1):
                leaves[path] = alone  # lists of numbers, or bytes, need no list around
                continue
            leaves[path] = _side_by_side(table, names, where)
        return leaves

    def decoder(self, path: str) -> Decode | None:
        """Return what decodes a leaf's cells; None: they are numbers already."""
        names = _listed(self.columns[path])
        return self.decode.get(names[0]) if len(names) == 1 else None


def _side_by_side(
    table: Mapping[str, Leaf],
    names: Sequence[str],
    where: str,
) -> np.ndarray:
    """Return columns of single numbers as one array: (rows, columns)."""
    columns = [_single_numbers(table[name], name, where) for name in names]
    kind = np.result_type(*columns)
    if kind == np.float64:  # of whole numbers and fractions together
        kind = np.dtype(np.float32)
    return np.stack([column.astype(kind, copy=False) for column in columns], axis=-1)


def _single_numbers(
    column: Leaf,
    name: str,
    where: str,
) -> np.ndarray:
    """Return a column that may stand next to others."""
    if not isinstance(column, Ragged) and column.ndim == 1:
        return column
    raise DataError(
        f"the column {name!r} holds no single numbers, and can't stand next to others",
        where=where,
        remedy=f"make it an input of its own: {{{name!r}: {name!r}}}",
    )


def nested(leaves: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return leaves by path as (inputs, targets); without targets, None.

    >>> nested({"inputs/a": 1, "inputs/b": 2, "targets": 3})
    ({'a': 1, 'b': 2}, 3)
    """
    sides: dict[str, Any] = {INPUTS: None, TARGETS: None}
    for path, leaf in leaves.items():
        side, _, name = path.partition(BETWEEN)
        if name:
            sides[side] = (sides[side] or {}) | {name: leaf}
        else:
            sides[side] = leaf
    return sides[INPUTS], sides[TARGETS]


def leaf_of(
    column: Any,
    name: str,
    where: str,
) -> Leaf:
    """Return an Arrow column as a leaf.

    Args:
      column: a chunked array.
      name: of the column.
      where: the row group, for messages.

    Raises:
      DataError: cells are missing, or are no numbers, bytes, or lists of numbers.
    """
    arrow = needs("pyarrow", extra="data", purpose="reading shards")
    types = arrow.types
    if column.null_count:
        raise DataError(
            f"the column {name!r} has {column.null_count} missing cells",
            where=where,
            remedy="fill or drop them in the preparation: FillMissing, DropMissing",
        )
    array = column.combine_chunks()
    if isinstance(array, arrow.ChunkedArray):  # of no rows, or of several chunks still
        array = arrow.concat_arrays(array.chunks)

    if types.is_fixed_size_list(array.type):
        values = _numbers(array.flatten(), name, where)
        return values.reshape(len(array), array.type.list_size)
    if types.is_list(array.type) or types.is_large_list(array.type):
        ends = array.offsets.to_numpy()
        return Ragged(_numbers(array.flatten(), name, where), ends - ends[0])
    if _is_bytes(array.type, types):
        return _bytes_of(array, arrow)
    return _numbers(array, name, where)


def _is_bytes(kind: Any, types: Any) -> bool:
    checks = (
        types.is_binary,
        types.is_large_binary,
        types.is_string,
        types.is_large_string,
    )
    return any(check(kind) for check in checks)


def _bytes_of(array: Any, arrow: Any) -> Ragged:
    """Return a binary array's bytes without a copy."""
    large = array.cast(arrow.large_binary())
    _, offsets, data = large.buffers()
    ends = np.frombuffer(offsets, np.int64)[large.offset :][: len(large) + 1]
    if data is None:
        return Ragged(np.empty(0, np.uint8), ends)
    return Ragged(np.frombuffer(data, np.uint8), ends)


def _numbers(
    array: Any,
    name: str,
    where: str,
) -> np.ndarray:
    """Return numbers of at most 32 bits."""
    arrow = needs("pyarrow", extra="data", purpose="reading shards")
    types = arrow.types
    kind = array.type
    is_number = types.is_integer(kind) or types.is_floating(kind)
    if not is_number and not types.is_boolean(kind):
        raise DataError(
            f"the column {name!r} is of type {kind}, which holds no numbers",
            where=where,
            remedy=(
                "turn it into numbers in the preparation (Vocabulary, DateParts), or"
                " leave it out of inputs=[...]"
            ),
        )
    values = array.to_numpy(zero_copy_only=False)
    return Arrays(values).inputs if len(values) else values.astype(np.float32)


def _by_path(side: str, columns: Columns) -> dict[str, str | tuple[str, ...]]:
    if isinstance(columns, Mapping):
        return {
            f"{side}{BETWEEN}{argument}": _names(names)
            for argument, names in columns.items()
        }
    return {side: _names(columns)}


def _names(columns: str | Sequence[str]) -> str | tuple[str, ...]:
    return columns if isinstance(columns, str) else tuple(columns)


def _listed(columns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (columns,) if isinstance(columns, str) else columns

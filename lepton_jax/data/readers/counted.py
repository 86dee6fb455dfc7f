"""Readers that know their number of rows, and what tables with types have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

import numpy as np
import polars as pl

from lepton_jax.data.readers.files import digest
from lepton_jax.data.readers.notes import refused_rows
from lepton_jax.data.readers.reader import ROW, Column, Reader, Rows
from lepton_jax.errors import DataError

PREFIX = "lepton."  # of names that preparation keeps for itself
# A file of the quarantine has this column; preparation leaves out those of its notes.
NOTED = "lepton.action"


class CountedReader(Reader):
    """A reader that knows its number of rows."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of rows, with those that can't be read."""


def numbered(
    table: pl.DataFrame,
    first_row: int,
) -> Rows:
    """Return rows without refused ones, numbered from `first_row`."""
    numbers = pl.int_range(
        first_row,
        first_row + table.height,
        dtype=pl.UInt64,
        eager=True,
    )
    return Rows(
        table.with_columns(numbers.alias(ROW)),
        refused_rows([], 0),
    )


def check_names(
    names: Iterable[str],
    where: object,
) -> None:
    """Check that no column has a name that preparation keeps for itself.

    The columns of a quarantine file have, which may be taken in again.

    Raises:
      DataError: one has.
    """
    names = list(names)
    if NOTED in names:
        return
    for name in names:
        if name.startswith(PREFIX):
            raise DataError(
                f"column {name!r} begins with {PREFIX!r}",
                where=where,
                remedy="rename it: names that begin so are kept for row numbers",
            )


def columns_of(
    table: pl.DataFrame,
    reason: str,
) -> list[Column]:
    """Return what is known of the columns of a table with types."""
    return [
        Column(
            series.name,
            series.dtype,
            reason,
            missing=series.null_count(),
        )
        for series in table
    ]


def table_digest(table: pl.DataFrame) -> str:
    """Return a hash of a table's content: names, types and values."""
    parts = [repr(table.schema).encode()]
    for series in table.rechunk():
        parts += _content(series)
    return digest(*parts)


def _content(series: pl.Series) -> list[bytes]:
    """Return bytes that are the same for the same values, whatever holds them."""
    valid = series.is_not_null().to_numpy().tobytes()
    return [valid, *_values(series)]


def _values(series: pl.Series) -> list[bytes]:
    """Return the bytes of a column's values; of missing ones nothing, or zeros."""
    type_ = series.dtype
    if isinstance(type_, pl.List):
        lengths = series.list.len().fill_null(0)
        inner = series.filter(lengths > 0).explode()
        return [*_values(lengths), *_content(inner)]
    if isinstance(type_, pl.Array):
        return _content(series.drop_nulls().explode())
    if isinstance(type_, pl.Struct):
        parts = []
        for field in type_.fields:
            parts += _content(series.struct.field(field.name))
        return parts
    if type_ == pl.Boolean():
        series = series.cast(pl.UInt8)
    elif type_.is_temporal():
        series = series.to_physical()
    if series.dtype.is_numeric() and not series.dtype.is_decimal():
        numbers = series.fill_null(0).to_numpy()
        return [np.ascontiguousarray(numbers).tobytes()]
    return _texts(series)


def _texts(series: pl.Series) -> list[bytes]:
    """Return the lengths and the bytes of values that are written as text."""
    if series.dtype != pl.Binary():
        series = series.cast(pl.String)
    words = series.cast(pl.Binary)
    lengths = words.bin.size().fill_null(0).to_numpy()
    return [
        lengths.astype("<u8").tobytes(),
        *words.drop_nulls().to_list(),
    ]

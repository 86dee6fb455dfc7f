"""Readers that know their number of rows, and what tables with types have in common."""

from __future__ import annotations

import io
from abc import abstractmethod
from collections.abc import Iterable

import numpy as np
import polars as pl

from lepton_jax.data.readers.files import digest
from lepton_jax.data.readers.notes import refused_rows
from lepton_jax.data.readers.reader import ROW, Column, Reader, Rows
from lepton_jax.errors import DataError

PREFIX = "lepton."  # of names that preparation keeps for itself


class CountedReader(Reader):
    """A reader that knows its number of rows."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of rows, with those that can't be read."""


def numbered(table: pl.DataFrame, first_row: int) -> Rows:
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


def check_names(names: Iterable[str], where: object) -> None:
    """Check that no column has a name that preparation keeps for itself.

    Raises:
      DataError: one has.
    """
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
    """Return bytes that are the same for the same values."""
    valid = series.is_not_null().to_numpy()
    if series.dtype.is_numeric() and not series.dtype.is_decimal():
        values = np.ascontiguousarray(series.fill_null(0).to_numpy())
        return [valid.tobytes(), values.tobytes()]
    if series.dtype in (pl.String(), pl.Binary()):
        lengths = series.cast(pl.Binary).bin.size().fill_null(0).to_numpy()
        joined = b"".join(series.cast(pl.Binary).drop_nulls().to_list())
        return [valid.tobytes(), lengths.astype("<u8").tobytes(), joined]
    stream = io.BytesIO()
    series.to_frame("").write_ipc(
        stream,
        compression="uncompressed",
        compat_level=pl.CompatLevel.oldest(),
    )
    return [stream.getvalue()]

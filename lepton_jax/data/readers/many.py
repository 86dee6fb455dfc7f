"""Several files that are one source: their rows one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import polars as pl

from lepton_jax.data.readers.counted import CountedReader
from lepton_jax.data.readers.delimited import SAMPLE, CsvReader
from lepton_jax.data.readers.reader import ROW, Column, Piece, Rows
from lepton_jax.errors import DataError, nearest

Drift = Literal["error", "union"]
_DATES = (pl.Date(), pl.Datetime("us"))


class ManyReader(CountedReader):
    """Several files as one source.

    Args:
      name: what messages call it.
      readers: one a file, in their order.
      drift: "error": all files have the same columns; "union": a column that a file
        lacks is missing in its rows, and types that differ become text.
    """

    def __init__(
        self,
        name: str,
        readers: Sequence[CountedReader],
        drift: Drift = "error",
    ):
        if drift not in ("error", "union"):
            raise DataError(
                f"drift is {drift!r}",
                where="drift",
                remedy="use 'error' or 'union'",
            )
        self.name = name
        self.readers = list(readers)
        self.drift = drift
        self._columns: list[Column] | None = None
        self._by_path = {_place(reader): reader for reader in readers}

    def columns(self) -> list[Column]:
        if self._columns is None:
            if all(
                isinstance(
                    reader,
                    CsvReader,
                )
                for reader in self.readers
            ):
                self._plan_together()
            self._columns = self._united()
        return self._columns

    def count(self) -> int:
        return sum(reader.count() for reader in self.readers)

    def pieces(
        self,
        size: int,
    ) -> list[Piece]:
        pieces = []
        row = 0
        for reader in self.readers:
            for piece in reader.pieces(size):
                pieces.append(
                    replace(
                        piece,
                        first_row=row + piece.first_row,
                    )
                )
            row += reader.count()
        return pieces

    def read(self, piece: Piece) -> Rows:
        columns = self.columns()
        rows = self._reader(piece).read(piece)
        values = [
            _as_column(
                rows.table,
                column,
            )
            for column in columns
        ]
        table = pl.DataFrame([*values, rows.table[ROW]])
        return rows._replace(table=table)

    def described(self) -> str:
        """Describe in words how the files are read."""
        parts = [
            reader.described()
            for reader in self.readers
            if hasattr(reader, "described")
        ]
        return "; ".join([f"{len(self.readers)} files", *dict.fromkeys(parts)])

    # ---- internals ----

    def _reader(self, piece: Piece) -> CountedReader:
        if piece.path in self._by_path:
            return self._by_path[piece.path]
        raise DataError(
            f"{piece.path!r} is no file of this source",
            where=self.name,
            remedy="divide the source again: its files are others now",
        )

    def _plan_together(self) -> None:
        """Infer the types of all CSV files from rows of all of them."""
        first, *others = [
            reader for reader in self.readers if isinstance(reader, CsvReader)
        ]
        names = first.names()
        for other in others:
            if other.names() != names:
                return
        share = max(
            2**16,
            SAMPLE // len(self.readers),
        )
        plans = first.plans_of_all(others, share)
        for reader in (first, *others):
            reader.with_plans(plans)

    def _united(self) -> list[Column]:
        first, *others = self.readers
        united = {column.name: column for column in first.columns()}
        for reader in others:
            theirs = {column.name: column for column in reader.columns()}
            if self.drift == "error":
                self._check_names(
                    list(united),
                    list(theirs),
                    reader,
                )
            for name, column in theirs.items():
                known = united.get(name)
                if known is None:
                    united[name] = column
                elif known is not column:
                    united[name] = self._both(
                        known,
                        column,
                        reader,
                    )
        return list(united.values())

    def _check_names(
        self,
        names: list[str],
        theirs: list[str],
        reader: CountedReader,
    ) -> None:
        remedy = (
            "give files with the same columns, or set drift='union' to read a column"
            " that is not there as missing"
        )
        for name in names:
            if name not in theirs:
                raise DataError(
                    f"there is no column {name!r}, which {self.readers[0].name}"
                    f" has{nearest(name, theirs)}",
                    where=_place(reader),
                    remedy=remedy,
                )
        for name in theirs:
            if name not in names:
                raise DataError(
                    f"column {name!r} is new: {self.readers[0].name} has none",
                    where=_place(reader),
                    remedy=remedy,
                )

    def _both(
        self,
        known: Column,
        column: Column,
        reader: CountedReader,
    ) -> Column:
        """Return a column that has the rows of two."""
        missing = -1
        if min(known.missing, column.missing) >= 0:
            missing = known.missing + column.missing
        both = replace(
            known,
            against=known.against + column.against,
            missing=missing,
            examples=(known.examples + column.examples)[:5],
        )
        type_ = common_type(known.type, column.type)
        if type_ is not None:
            return replace(both, type=type_)
        if self.drift == "union":
            reason = f"{known.type} in some files, {column.type} in others"
            return replace(
                both,
                type=pl.String(),
                reason=reason,
            )
        raise DataError(
            f"column {known.name!r} is {column.type}, but {known.type} in"
            f" {self.readers[0].name}",
            where=_place(reader),
            remedy=(
                f"write it in one way, set types={{{known.name!r}: ...}}, or"
                " drift='union' to read it as text"
            ),
        )


def common_type(
    one: pl.DataType,
    other: pl.DataType,
) -> pl.DataType | None:
    """Return a type that holds the values of both exactly; None if there is none."""
    if one == other:
        return one
    if one == pl.Null():
        return other
    if other == pl.Null():
        return one
    if one in _DATES and other in _DATES:
        return pl.Datetime("us")
    if not (one.is_numeric() and other.is_numeric()):
        return None
    if one.is_decimal() or other.is_decimal():
        return None
    if one.is_float() or other.is_float():
        return pl.Float64()
    if pl.UInt64() in (one, other):
        is_signed = one.is_signed_integer() or other.is_signed_integer()
        return None if is_signed else pl.UInt64()
    return pl.Int64()


def _place(reader: CountedReader) -> str:
    return str(getattr(reader, "stored", reader.name))


def _as_column(
    table: pl.DataFrame,
    column: Column,
) -> pl.Series:
    if column.name not in table.columns:
        return pl.Series(
            column.name,
            [None] * table.height,
            column.type,
        )
    return table[column.name].cast(column.type)

"""A reader and steps of the tests' own."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare import SPLIT, Fitted, Outcome, Step
from lepton_jax.data.readers.reader import (
    NOTES,
    ROW,
    SOURCE,
    Column,
    Piece,
    Reader,
    Rows,
)

PIECE_ROWS = 50


@dataclasses.dataclass
class Memory(Reader):
    """Rows of a table, some to a piece."""

    table: pl.DataFrame
    name: str = "memory"

    def columns(self) -> Sequence[Column]:
        kinds = self.table.schema.items()
        return [Column(name, kind, "of the table") for name, kind in kinds]

    def pieces(self, size: int) -> Sequence[Piece]:
        starts = range(0, self.table.height, PIECE_ROWS)
        return [self._piece(start) for start in starts]

    def _piece(self, start: int) -> Piece:
        rows = self.table.slice(start, PIECE_ROWS)
        digest = hashlib.sha256(rows.write_csv().encode()).hexdigest()
        return Piece("", start, start + rows.height, start, digest)

    def read(self, piece: Piece) -> Rows:
        rows = self.table.slice(piece.start, piece.stop - piece.start)
        numbers = pl.int_range(piece.start, piece.stop, dtype=pl.UInt64).alias(ROW)
        return Rows(rows.with_columns(numbers), pl.DataFrame(schema=NOTES))


def note(table: pl.LazyFrame, action: str, reason: str) -> pl.LazyFrame:
    """Return a note for each row of a table."""
    texts = [pl.lit(action).alias("action"), pl.lit(reason).alias("reason")]
    others = [
        pl.lit(None, kind).alias(name)
        for name, kind in NOTES.items()
        if name not in (SOURCE, ROW, "action", "reason")
    ]
    return table.select(SOURCE, ROW, *texts, *others).select(NOTES.names())


@dataclasses.dataclass(frozen=True)
class Above(Step):
    """Drop rows with a value that is not above a limit."""

    column: str
    limit: float

    def run(self, table: pl.LazyFrame, state: pl.DataFrame | None) -> Outcome:
        stays = (pl.col(self.column) > self.limit).fill_null(False)
        return Outcome(
            table.filter(stays), note(table.filter(~stays), "dropped", "not above")
        )


@dataclasses.dataclass(frozen=True)
class Tenth(Step):
    """Put every tenth row into the test split."""

    serves: ClassVar[bool] = False

    def run(self, table: pl.LazyFrame, state: pl.DataFrame | None) -> Outcome:
        name = pl.when(pl.col(ROW) % 10 == 0).then(pl.lit("test"))
        return Outcome(table.with_columns(name.otherwise(pl.lit("train")).alias(SPLIT)))


@dataclasses.dataclass(frozen=True)
class Center(Fitted):
    """Take the mean off a column."""

    column: str

    def writes(self) -> list[str]:
        return [self.column]

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        value = pl.col(self.column)
        return table.select(value.sum().alias("sum"), value.count().alias("count"))

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(partials).sum()

    def finish(self, partial: pl.DataFrame) -> pl.DataFrame:
        return partial.select((pl.col("sum") / pl.col("count")).alias("mean"))

    def run(self, table: pl.LazyFrame, state: pl.DataFrame | None) -> Outcome:
        mean = 0.0 if state is None else state["mean"][0]
        return Outcome(table.with_columns(pl.col(self.column).cast(float) - mean))


@dataclasses.dataclass(frozen=True)
class Once(Fitted):
    """Keep the first row of each value of a column."""

    column: str
    fits_on: ClassVar = "all"
    serves: ClassVar[bool] = False

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        value = pl.col(self.column).alias("value")
        return table.select(value, SOURCE, ROW)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return pl.concat(partials)

    def finish(self, partial: pl.DataFrame) -> pl.DataFrame:
        first = partial.group_by("value", maintain_order=True).first()
        return first.select("value", first=ROW)

    def run(self, table: pl.LazyFrame, state: pl.DataFrame | None) -> Outcome:
        if state is None:
            return Outcome(table)
        joined = table.join(
            state.lazy(),
            left_on=self.column,
            right_on="value",
            how="left",
            maintain_order="left",
        )
        is_first = pl.col("first") == pl.col(ROW)
        notes = note(joined.filter(~is_first), "dropped", "seen before")
        partner = joined.filter(~is_first).select("first")
        notes = pl.concat([notes, partner], how="horizontal")
        notes = notes.with_columns(pl.col("first").alias("partner_row")).drop("first")
        return Outcome(joined.filter(is_first).drop("first"), notes)

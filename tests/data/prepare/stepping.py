"""Running of a single step over pieces, as an engine would."""

from collections.abc import Sequence
from itertools import pairwise

import polars as pl
import pytest

from lepton_jax.data import readers
from lepton_jax.data.prepare.step import Fitted, Step
from lepton_jax.data.readers.reader import NOTES, ROW, SOURCE


def rows(columns: dict, source: int = 0, first: int = 0) -> pl.DataFrame:
    """Return a table with SOURCE and ROW."""
    table = pl.DataFrame(columns)
    numbers = pl.int_range(first, first + pl.len(), dtype=pl.UInt64)
    return table.with_columns(
        pl.lit(source, dtype=pl.UInt32).alias(SOURCE), numbers.alias(ROW)
    )


def cut(table: pl.DataFrame, bounds: Sequence[int]) -> list[pl.DataFrame]:
    """Return the pieces of a table between some bounds."""
    edges = [0, *sorted(bound % (len(table) + 1) for bound in bounds), len(table)]
    return [table[start:stop] for start, stop in pairwise(edges)]


def fitted(step: Fitted, pieces: Sequence[pl.DataFrame]) -> pl.DataFrame:
    partials = [step.partial(piece.lazy()).collect() for piece in pieces]
    return step.finish(step.merge(partials))


def applied(step: Step, table: pl.DataFrame, state: pl.DataFrame | None = None):
    """Return the rows that stay and the notes; a fitted step is fitted on the rows."""
    if isinstance(step, Fitted) and state is None:
        state = fitted(step, [table])
    expected = step.check(table.schema)
    outcome = step.run(table.lazy(), state)
    frames = [outcome.table]
    if outcome.notes is not None:
        frames.append(outcome.notes)
    result = pl.collect_all(frames)
    assert result[0].schema == expected
    if len(result) == 2:
        assert result[1].schema == NOTES
    return result if len(result) == 2 else (result[0], None)


def row_numbers(table: pl.DataFrame) -> list[int]:
    return table[ROW].to_list()


class Table:
    """A reader's stand-in: a table in memory, in pieces of two rows."""

    def __init__(self, table: pl.DataFrame):
        self.table = table

    def columns(self) -> Sequence[readers.Column]:
        return [
            readers.Column(name, kind, "as it is")
            for name, kind in self.table.schema.items()
        ]

    def pieces(self, size: int) -> Sequence[readers.Piece]:
        return [
            readers.Piece("", start, start + 2, start, f"{start}")
            for start in range(0, len(self.table), 2)
        ]

    def read(self, piece: readers.Piece) -> readers.Rows:
        part = self.table[piece.start : piece.stop]
        numbers = pl.int_range(piece.start, piece.start + pl.len(), dtype=pl.UInt64)
        return readers.Rows(part.with_columns(numbers.alias(ROW)), pl.DataFrame())


@pytest.fixture
def existing(monkeypatch):
    """Let `reader_of` find a table under the name "published.csv"."""

    def put(columns: dict):
        tables = {"published.csv": Table(pl.DataFrame(columns))}
        monkeypatch.setattr(readers, "reader_of", tables.__getitem__, raising=False)

    return put

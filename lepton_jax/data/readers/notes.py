"""Tables of notes: rows that could not be read, and cells that became missing."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from lepton_jax.data.readers.reader import NOTES, ROW, Column
from lepton_jax.data.readers.records import Refused

LONGEST_TEXT = 2**16  # bytes of a refused row that a note keeps; assumption


def refused_rows(refused: Sequence[Refused], first_row: int) -> pl.DataFrame:
    """Return notes of rows that could not be read.

    Args:
      refused: the rows, numbered among the records of a piece.
      first_row: number of the piece's first record.
    """
    notes = [
        {
            ROW: first_row + each.number,
            "action": "dropped",
            "reason": each.fault,
            "before": each.text[:LONGEST_TEXT].decode("utf-8", "replace"),
        }
        for each in refused
    ]
    return pl.DataFrame(notes, schema=NOTES)


def changed_cells(
    column: Column,
    cells: pl.Series,
    wrong: pl.Series,
    numbers: pl.Series,
) -> pl.DataFrame:
    """Return notes of cells that became missing values, as they argue against a type.

    Args:
      column: theirs.
      cells: as they are written.
      wrong: which of them argue against the type.
      numbers: of the rows.
    """
    notes = pl.DataFrame(
        {
            ROW: numbers.filter(wrong),
            "before": cells.filter(wrong),
        }
    )
    return notes.with_columns(
        pl.lit("changed").alias("action"),
        pl.lit(f"no {column.type}, as other cells of the column").alias("reason"),
        pl.lit(column.name).alias("column"),
    ).select(
        pl.col(name).cast(type_)
        if name in (ROW, "before", "action", "reason", "column")
        else pl.lit(None, type_).alias(name)
        for name, type_ in NOTES.items()
    )

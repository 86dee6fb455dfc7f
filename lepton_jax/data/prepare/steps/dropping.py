"""Dropping rows that a fitted state lists, and rows of an existing set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from lepton_jax.data import readers
from lepton_jax.data.prepare.step import Outcome
from lepton_jax.data.readers.reader import NOTES, ROW, SOURCE, no_notes
from lepton_jax.errors import DataError, nearest

# State of a step that drops rows because of another row, one line a dropped row, in the
# order of (SOURCE, ROW). The partner of a row is the one that stays; its source is null
# where it is a row of an existing set, which the reason then names.
DROPPED = pl.Schema(
    {
        SOURCE: pl.UInt32(),
        ROW: pl.UInt64(),
        "partner_source": pl.UInt32(),
        "partner_row": pl.UInt64(),
        "reason": pl.String(),
    }
)
ROW_BITS = 44  # of a row's number in one key; rows are numbered below 2**44
PIECE_BYTES = 2**25  # of an existing set that are read at once (assumption)
_PLACE = "lepton.place"  # a row's line in the state; null: it is not listed


def without(
    table: pl.LazyFrame,
    state: pl.DataFrame | None,
) -> Outcome:
    """Drop the rows that a state with the columns DROPPED lists."""
    if state is None or state.is_empty():
        return Outcome(table, no_notes())
    placed = table.with_columns(_place(state))
    lines = state.select(
        pl.int_range(
            pl.len(),
            dtype=pl.UInt32,
        ).alias(_PLACE),
        "partner_source",
        "partner_row",
        "reason",
    )
    dropped = placed.filter(pl.col(_PLACE).is_not_null()).select(
        SOURCE,
        ROW,
        _PLACE,
    )
    notes = dropped.join(
        lines.lazy(),
        on=_PLACE,
        how="left",
        maintain_order="left",
    ).select(
        SOURCE,
        ROW,
        pl.lit("dropped").alias("action"),
        "reason",
        pl.lit(None).alias("column"),
        pl.lit(None).alias("before"),
        pl.lit(None).alias("after"),
        "partner_source",
        "partner_row",
    )
    kept = placed.filter(pl.col(_PLACE).is_null()).drop(_PLACE)
    return Outcome(kept, notes.cast(NOTES))


def with_existing(
    dropped: pl.DataFrame,
    existing: str | None,
) -> pl.DataFrame:
    """Let the reason name the existing set where the partner is one of its rows."""
    named = pl.col("reason") + pl.lit(f" of a row of {existing}")
    is_known = pl.col("partner_source").is_null()
    reason = pl.when(is_known).then(named).otherwise("reason")
    return dropped.with_columns(reason.alias("reason"))


def row_keys(rows: pl.DataFrame) -> np.ndarray:
    """Return a UInt64 for each row, in the order of (SOURCE, ROW)."""
    sources = rows[SOURCE].to_numpy().astype(np.uint64)
    return (sources << np.uint64(ROW_BITS)) | rows[ROW].to_numpy()


def existing_rows(
    path: str,
    columns: Sequence[str],
) -> Iterator[pl.DataFrame]:
    """Read an existing set: tables of columns and ROW, its pieces in their order.

    Raises:
      DataError: it can't be read, or a column is not there.
    """
    reader = readers.reader_of(path)
    for piece in reader.pieces(PIECE_BYTES):
        table = reader.read(piece).table
        for name in columns:
            if name not in table.columns:
                raise DataError(
                    f"the existing set has no column {name!r}"
                    f"{nearest(name, table.columns)}",
                    where=path,
                    remedy="name columns that the rows and the existing set both have",
                )
        yield table.select(*columns, ROW)


def existing_digest(path: str) -> str:
    """Return a digest of an existing set, which changes where its content does."""
    reader = readers.reader_of(path)
    pieces = reader.pieces(PIECE_BYTES)
    return "-".join(piece.digest for piece in pieces)


# ---- internals ----


def _place(state: pl.DataFrame) -> pl.Expr:
    """Return the line of each row in the state, which is sorted; null: in none."""
    keys = row_keys(state)

    def place(rows: pl.Series) -> pl.Series:
        wanted = row_keys(rows.struct.unnest())
        places = np.searchsorted(keys, wanted)
        found = (
            keys[
                np.minimum(
                    places,
                    len(keys) - 1,
                )
            ]
            == wanted
        )
        lines = pl.Series(
            _PLACE,
            places,
            dtype=pl.UInt32,
        )
        return lines.set(
            pl.Series(~found),
            None,
        )

    return (
        pl.struct(SOURCE, ROW)
        .map_batches(place, return_dtype=pl.UInt32, is_elementwise=True)
        .alias(_PLACE)
    )

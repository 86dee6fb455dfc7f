"""Raw rows in the forms that people hold them in, as a table."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from lepton_jax.data import readers
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError

WHERE = "raw rows"
FORMS = (
    "give a dict of column and value, a list of these, a table of pandas, Polars or"
    " Arrow, a dict of columns, or the path of a file"
)
PLAIN = (str, bytes, int, float, bool, type(None))
PIECE_BYTES = 2**30  # read at once of a file of raw rows; assumption


def as_table(
    raw: Any,
    dialect: Mapping[str, Any],
) -> pl.DataFrame:
    """Return raw rows as a table, in their order.

    Args:
      raw: see `Serving.arrays`.
      dialect: settings of `reader_of`, for a path.

    Raises:
      DataError: these are no rows, there is none, or a file can't be read.
    """
    if isinstance(raw, str | os.PathLike):
        table = _read(Path(raw), dialect)
    else:
        table = _in_memory(raw)
    if not table.height:
        raise DataError("there is no row", where=WHERE, remedy=FORMS)
    return table.drop(SOURCE, ROW, strict=False)


# ---- internals ----


def _is_row(raw: Any) -> bool:
    is_dict = isinstance(raw, Mapping) and bool(raw)
    return is_dict and all(_is_single(value) for value in raw.values())


def _is_single(value: Any) -> bool:
    if isinstance(value, PLAIN):
        return True
    return getattr(
        value,
        "ndim",
        0,
    ) == 0 and not isinstance(
        value,
        list | tuple,
    )


def _read(
    path: Path,
    dialect: Mapping[str, Any],
) -> pl.DataFrame:
    reader = readers.reader_of(path, **dialect)
    parts = [reader.read(piece) for piece in reader.pieces(PIECE_BYTES)]
    for part in parts:
        if part.refused.height:
            note = part.refused.row(0, named=True)
            raise DataError(
                f"row {note[ROW]} can't be read: {note['reason']}",
                where=path,
                remedy="correct the row, or leave it out",
            )
    return pl.concat(
        [part.table for part in parts],
        how="vertical_relaxed",
    )


def _in_memory(raw: Any) -> pl.DataFrame:
    try:
        table = _as_polars(raw)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        message = str(error).partition("\n")[0]
        raise DataError(
            f"the rows make no table: {message}",
            where=WHERE,
            remedy=FORMS,
        ) from error
    if table is None:
        raise DataError(f"a {type(raw).__name__} is no row", where=WHERE, remedy=FORMS)
    return table


def _as_polars(raw: Any) -> pl.DataFrame | None:
    """Return a table; None: this is none, nor rows of one."""
    if isinstance(raw, pl.DataFrame):
        return raw
    if isinstance(raw, pl.LazyFrame):
        return raw.collect()
    if _is_row(raw):
        return pl.DataFrame(
            [dict(raw)],
            infer_schema_length=None,
        )
    if isinstance(raw, Mapping):
        return pl.DataFrame(dict(raw))
    library = type(raw).__module__.partition(".")[0]
    if library == "pandas":
        return pl.from_pandas(raw)
    if library == "pyarrow":
        return pl.DataFrame(pl.from_arrow(raw))
    if isinstance(
        raw,
        Sequence,
    ) and all(_is_row(row) for row in raw):
        rows = [dict(row) for row in raw]
        return (
            pl.from_dicts(
                rows,
                infer_schema_length=None,
            )
            if rows
            else None
        )
    return None

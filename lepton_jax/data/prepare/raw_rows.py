"""Raw rows in the forms that people hold them in, as a table of the training types."""

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
PIECE_BYTES = 2**30  # read at once of a file of raw rows; assumption
FORMS = (
    "give a dict of column and value, a list of these, a table of pandas, Polars or"
    " Arrow, a dict of columns, or the path of a file"
)
PLAIN = (str, bytes, int, float, bool, type(None))
# Words for a missing value where a number is expected, next to the empty one.
MISSING = ("", "NA", "N/A", "n/a", "#N/A", "nan", "NaN", "NULL", "null", "None", "?")
LONGEST_VALUE = 40  # characters of a message


def is_row(raw: Any) -> bool:
    """Whether this is a single raw row: a dict whose values are no arrays."""
    if not isinstance(raw, Mapping):
        return False
    return bool(raw) and all(_is_single(value) for value in raw.values())


def as_table(raw: Any, dialect: Mapping[str, Any]) -> pl.DataFrame:
    """Return raw rows as a table, with SOURCE and ROW in front.

    Args:
      raw: see `Serving.rows`.
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
    places = [
        pl.lit(0, pl.UInt32).alias(SOURCE),
        pl.int_range(pl.len(), dtype=pl.UInt64).alias(ROW),
    ]
    kept = [name for name in table.columns if name not in (SOURCE, ROW)]
    return table.select(*places, *kept)


def conform(table: pl.DataFrame, schema: pl.Schema) -> pl.DataFrame:
    """Return the columns of a schema with its types; what is not there is missing.

    Args:
      table: raw rows, with SOURCE and ROW.
      schema: the columns that training has read.

    Raises:
      DataError: a cell can't be of its column's type.
    """
    columns = [table[SOURCE], table[ROW]]
    for name, kind in schema.items():
        if name in table.columns:
            columns.append(_cast(table[name], kind))
        else:
            columns.append(pl.Series(name, [None] * table.height, dtype=kind))
    return pl.DataFrame(columns)


# ---- internals ----


def _is_single(value: Any) -> bool:
    if isinstance(value, PLAIN):
        return True
    return getattr(value, "ndim", 0) == 0 and not isinstance(value, list | tuple)


def _is_table(raw: Any) -> bool:
    kind = type(raw)
    module = kind.__module__.partition(".")[0]
    is_frame = kind.__name__ in ("DataFrame", "LazyFrame", "Table", "RecordBatch")
    return is_frame and module in ("pandas", "polars", "pyarrow")


def _read(path: Path, dialect: Mapping[str, Any]) -> pl.DataFrame:
    reader = readers.reader_of(path, **dialect)
    parts = [reader.read(piece) for piece in reader.pieces(PIECE_BYTES)]
    refused = [part.refused for part in parts if part.refused.height]
    if refused:
        note = refused[0].row(0, named=True)
        raise DataError(
            f"row {note[ROW]} can't be read: {note['reason']}",
            where=path,
            remedy="correct the row, or leave it out: there is no prediction for it",
        )
    return pl.concat([part.table for part in parts], how="vertical_relaxed")


def _in_memory(raw: Any) -> pl.DataFrame:
    try:
        if is_row(raw):
            return pl.DataFrame([dict(raw)], infer_schema_length=None)
        if isinstance(raw, Mapping):
            return pl.DataFrame(dict(raw))
        if isinstance(raw, pl.LazyFrame):
            return raw.collect()
        if isinstance(raw, pl.DataFrame):
            return raw
        if _is_table(raw):
            return _of_library(raw)
        if isinstance(raw, Sequence) and all(is_row(row) for row in raw):
            return pl.from_dicts([dict(row) for row in raw], infer_schema_length=None)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as error:
        message = str(error).partition("\n")[0]
        raise DataError(
            f"the rows make no table: {message}", where=WHERE, remedy=FORMS
        ) from error
    raise DataError(f"a {type(raw).__name__} is no row", where=WHERE, remedy=FORMS)


def _of_library(raw: Any) -> pl.DataFrame:
    if type(raw).__module__.startswith("pandas"):
        return pl.from_pandas(raw)
    table = pl.from_arrow(raw)
    return table if isinstance(table, pl.DataFrame) else table.to_frame()


def _cast(series: pl.Series, kind: pl.DataType) -> pl.Series:
    """Return a column with the type that training has read.

    Raises:
      DataError: a cell can't be.
    """
    if series.dtype == kind:
        return series
    is_number = kind.is_numeric()
    if series.dtype == pl.String and is_number:
        series = _numbers(series)
    elif series.dtype.is_float() and kind == pl.String:
        # pandas makes floats of whole numbers where one is missing
        series = _whole(series)

    result = series.cast(kind, strict=False)
    lost = result.is_null() & series.is_not_null()
    if kind.is_integer() and series.dtype.is_float():
        lost |= (series != series.round()).fill_null(False)
        lost &= series.is_not_nan()
    if lost.any():
        row = int(lost.arg_max() or 0)
        value = str(series[row])[:LONGEST_VALUE]
        raise DataError(
            f"{value!r} is no {_word(kind)}",
            where=f"raw rows, row {row}, column {series.name!r}",
            remedy="correct the cell, or give None where the value is not known",
        )
    return result


def _numbers(series: pl.Series) -> pl.Series:
    """Return text without the words for a missing value."""
    text = series.str.strip_chars()
    return text.set(text.is_in(MISSING), None)


def _whole(series: pl.Series) -> pl.Series:
    values = series.drop_nulls().drop_nans()
    if (values == values.round()).all():
        return series.fill_nan(None).cast(pl.Int64)
    return series


def _word(kind: pl.DataType) -> str:
    if kind.is_integer():
        return "whole number"
    if kind.is_numeric():
        return "number"
    return str(kind)

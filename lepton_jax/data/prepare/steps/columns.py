"""Checks of columns, missing cells, dropped rows and notes, which all steps share.

A missing cell is null or, in a column of floats, NaN: both mean that there is no value.

Nothing here divides a column by a constant: Polars then multiplies by the inverse, but
in a table of few rows it divides, and the last bit differs. A row has to come out the
same alone, at prediction, as among others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from lepton_jax.data.prepare.step import SPLIT, Outcome
from lepton_jax.data.readers.reader import NOTES, ROW, SOURCE, no_notes
from lepton_jax.errors import DataError, nearest

SHOWN = 12  # columns that a message lists (assumption: more is not read)


class Kind(NamedTuple):
    """Types of columns that a step can work on.

    Attributes:
      words: of a message, such as "a number".
      fits: whether a type is one of them.
      remedy: how to make such a column of another.
    """

    words: str
    fits: Callable[[pl.DataType], bool]
    remedy: str


def is_number(dtype: pl.DataType) -> bool:
    """Whether values of a type count as numbers; booleans are 0 and 1."""
    return dtype.is_numeric() or dtype in (pl.Boolean, pl.Null)


def is_text(dtype: pl.DataType) -> bool:
    """Whether values of a type are text."""
    return dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)


def is_key(dtype: pl.DataType) -> bool:
    """Whether values of a type can be told apart exactly, and have one spelling."""
    is_exact = dtype.is_integer() or dtype.is_temporal()
    return is_exact or is_text(dtype) or dtype == pl.Boolean


def is_day(dtype: pl.DataType) -> bool:
    """Whether values of a type are dates, or dates with a time."""
    return dtype in (pl.Date, pl.Datetime, pl.Null)


def is_position(dtype: pl.DataType) -> bool:
    """Whether values of a type have an order and a distance."""
    return is_number(dtype) or is_day(dtype)


def is_any(dtype: pl.DataType) -> bool:
    """Whether a type is one of all types: true."""
    return True


_CAST = "CheckSchema casts columns; put it before this step"
ANY = Kind("anything", is_any, _CAST)
NUMBER = Kind("a number", is_number, _CAST + ", or leave the column out")
KEY = Kind(
    "text, an integer, a boolean or a date",
    is_key,
    "fractions make no categories: put Bins, or CheckSchema with int64, before it",
)
DAY = Kind("a date, with a time or without", is_day, _CAST + " (date, datetime)")
POSITION = Kind("a number or a date", is_position, _CAST)


def listed(
    columns: str | Iterable[str],
    what: str = "columns",
) -> tuple[str, ...]:
    """Return names of columns as a tuple; one name may stand alone.

    Raises:
      DataError: there is none, or one stands twice.
    """
    names = (columns,) if isinstance(columns, str) else tuple(columns)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not names:
        fault = f"{twice[0]!r} stands twice" if twice else "there is no name"
        raise DataError(
            f"{fault} in {what}",
            where=what,
            remedy="name each column once, and at least one",
        )
    return names


def list_columns(step: Any) -> None:
    """Make the columns of a frozen step a tuple, as `listed` does."""
    object.__setattr__(step, "columns", listed(step.columns))


def require(
    step: Any,
    schema: Mapping[str, pl.DataType],
    names: Iterable[str],
    kind: Kind = ANY,
) -> None:
    """Check that columns are there, with a type that a step can work on.

    Raises:
      DataError: one is not; the message names the nearest that there is.
    """
    where = type(step).__name__
    for name in names:
        if name not in schema:
            raise DataError(
                f"there is no column {name!r}{nearest(name, schema)}",
                where=where,
                remedy=f"use one of the columns before this step: {_names(schema)}",
            )
        if not kind.fits(schema[name]):
            raise DataError(
                f"the column {name!r} has the type {schema[name]}, but must be"
                f" {kind.words}",
                where=where,
                remedy=kind.remedy,
            )


def require_free(
    step: Any,
    schema: Mapping[str, pl.DataType],
    names: Iterable[str],
) -> None:
    """Check that columns which a step adds are not there.

    Raises:
      DataError: one is.
    """
    for name in names:
        if name in schema:
            raise DataError(
                f"there is a column {name!r} already, which this step would add",
                where=type(step).__name__,
                remedy="rename or drop that column before it",
            )


def require_choice(
    step: Any,
    argument: str,
    choices: Sequence[str],
) -> None:
    """Check that an argument is one of several words.

    Raises:
      DataError: it is none of them.
    """
    value = getattr(step, argument)
    if value not in choices:
        raise DataError(
            f"{argument} is {value!r}{nearest(str(value), choices)}",
            where=type(step).__name__,
            remedy=f"use one of {', '.join(choices)}",
        )


def require_range(
    step: Any,
    argument: str,
    low: float,
    high: float,
) -> None:
    """Check that an argument is a number from `low` to `high`, both included.

    Raises:
      DataError: it is not.
    """
    value = getattr(step, argument)
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_real or not low <= value <= high:
        raise DataError(
            f"{argument} is {value!r}",
            where=type(step).__name__,
            remedy=f"give a number from {low:g} to {high:g}",
        )


def nothing_to_learn(
    step: Any,
    name: str,
    what: str = "value",
) -> DataError:
    """Return the error of a column without a value in the rows that a step fits on."""
    return DataError(
        f"the column {name!r} has no {what} in the rows to fit on",
        where=type(step).__name__,
        remedy="drop the column before this step, fill it with FillWith, or give the"
        " training split rows that have one",
    )


def float_of(dtype: pl.DataType) -> pl.DataType:
    """Return the type of a column of numbers after arithmetic.

    That is Float32 for Float32, else Float64.
    """
    return pl.Float32() if dtype == pl.Float32 else pl.Float64()


def floats_of(schema: pl.Schema, columns: Iterable[str]) -> dict[str, pl.DataType]:
    """Return the type of each column after arithmetic, see `float_of`."""
    return {name: float_of(schema[name]) for name in columns}


def number(name: str) -> pl.Expr:
    """Return a column of numbers as Float64; a missing cell is null, and -0 is 0."""
    value = pl.col(name).cast(pl.Float64).fill_nan(None)
    return pl.when(value == 0).then(0.0).otherwise(value)


def as_text(name: str) -> pl.Expr:
    """Return a column as text."""
    return pl.col(name).cast(pl.String)


def is_missing(name: str, dtype: pl.DataType) -> pl.Expr:
    """Whether cells of a column are missing: null or NaN."""
    column = pl.col(name)
    if dtype.is_float():
        return column.is_null() | column.is_nan().fill_null(True)
    return column.is_null()


def without_nan(name: str, dtype: pl.DataType) -> pl.Expr:
    """Return a column in which every missing cell is null."""
    column = pl.col(name)
    return column.fill_nan(None) if dtype.is_float() else column


def text_of(name: str, dtype: pl.DataType) -> pl.Expr:
    """Return the spelling of a column of keys, the same wherever it was read."""
    column = pl.col(name)
    if dtype == pl.Datetime:
        return column.dt.timestamp("us").cast(pl.String)
    if dtype.is_temporal():
        return column.to_physical().cast(pl.String)
    return column.cast(pl.String)


def in_train(table: pl.LazyFrame) -> pl.Expr:
    """Whether rows are of the training split; all are before there are splits."""
    if SPLIT in table.collect_schema():
        return pl.col(SPLIT).eq_missing(pl.lit("train"))
    return pl.lit(True)


class Fault(NamedTuple):
    """A reason to drop, change or flag some rows.

    Attributes:
      column: name of the column that is at fault; "": the whole row.
      where: which rows, Boolean.
      reason: of each such row, String.
    """

    column: str
    where: pl.Expr
    reason: pl.Expr


def fault(
    column: str,
    where: pl.Expr,
    reason: str | pl.Expr,
) -> Fault:
    """Return a reason to drop, change or flag some rows; null in `where` is false."""
    words = pl.lit(reason) if isinstance(reason, str) else reason
    return Fault(column, where.fill_null(False), words)


def dropped(table: pl.LazyFrame, faults: Sequence[Fault]) -> Outcome:
    """Drop the rows with a fault; one note a row gives the first."""
    if not faults:
        return Outcome(table, no_notes())
    bad = pl.any_horizontal([each.where for each in faults])
    reason = _first(
        faults,
        [each.reason for each in faults],
    )
    column = _first(
        faults,
        [_column_name(each) for each in faults],
    )
    before = _first(
        faults,
        [_before(each) for each in faults],
    )
    notes = _notes(
        table.filter(bad),
        "dropped",
        reason,
        column,
        before,
        _nothing(),
    )
    return Outcome(table.filter(~bad), notes)


def noted(
    table: pl.LazyFrame,
    action: str,
    faults: Sequence[Fault],
    after: Mapping[str, pl.Expr] | None = None,
) -> pl.LazyFrame:
    """Return a note of each cell with a fault.

    Args:
      table: the rows as they are before the step.
      action: "changed" or "flagged".
      faults: at most one of each column.
      after: of each column its value after the step.
    """
    if not faults:
        return no_notes()
    after = after or {}
    bad = pl.any_horizontal([each.where for each in faults])
    touched = table.filter(bad)
    tables = []
    for each in faults:
        value = after.get(each.column)
        text = _nothing() if value is None else value.cast(pl.String)
        tables.append(
            _notes(
                touched.filter(each.where),
                action,
                each.reason,
                _column_name(each),
                _before(each),
                text,
            )
        )
    return pl.concat(tables)


# ---- internals ----


def _names(schema: Mapping[str, pl.DataType]) -> str:
    names = [name for name in schema if name not in (SOURCE, ROW)]
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _nothing() -> pl.Expr:
    return pl.lit(None, dtype=pl.String)


def _column_name(each: Fault) -> pl.Expr:
    return pl.lit(
        each.column or None,
        dtype=pl.String,
    )


def _before(each: Fault) -> pl.Expr:
    if not each.column:
        return _nothing()
    return as_text(each.column)


def _first(
    faults: Sequence[Fault],
    values: Sequence[pl.Expr],
) -> pl.Expr:
    """Return the value of the first fault of each row."""
    result = _nothing()
    pairs = zip(faults, values, strict=True)
    for each, value in reversed(list(pairs)):
        result = pl.when(each.where).then(value).otherwise(result)
    return result


def _notes(
    table: pl.LazyFrame,
    action: str,
    reason: pl.Expr,
    column: pl.Expr,
    before: pl.Expr,
    after: pl.Expr,
) -> pl.LazyFrame:
    return table.select(
        pl.col(SOURCE),
        pl.col(ROW),
        pl.lit(action).alias("action"),
        reason.alias("reason"),
        column.alias("column"),
        before.alias("before"),
        after.alias("after"),
        pl.lit(None).alias("partner_source"),
        pl.lit(None).alias("partner_row"),
    ).cast(NOTES)

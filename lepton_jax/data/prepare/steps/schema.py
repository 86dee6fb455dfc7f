"""The declared schema: which columns there are, of which types, with which values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from lepton_jax.data.prepare.step import SPLIT, Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    Fault,
    as_text,
    dropped,
    fault,
    is_missing,
    is_number,
    is_text,
    noted,
    require_choice,
    without_nan,
)
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError, nearest

TYPES: dict[str, pl.DataType] = {
    "boolean": pl.Boolean(),
    "date": pl.Date(),
    "datetime": pl.Datetime("us"),
    "float32": pl.Float32(),
    "float64": pl.Float64(),
    "int8": pl.Int8(),
    "int16": pl.Int16(),
    "int32": pl.Int32(),
    "int64": pl.Int64(),
    "text": pl.String(),
    "uint8": pl.UInt8(),
    "uint16": pl.UInt16(),
    "uint32": pl.UInt32(),
    "uint64": pl.UInt64(),
}
TRUE = ("true", "t", "yes", "y", "1")
FALSE = ("false", "f", "no", "n", "0")
# Forms of dates in text, where none is given: ISO 8601 with a space or a T.
DATE_FORMS: tuple[str, ...] = ("%Y-%m-%d",)
DATETIME_FORMS = (
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
)
INNER = (SOURCE, ROW, SPLIT)
SHOWN = 8  # values that a message lists (assumption: more is not read)


@dataclass(frozen=True)
class Field:
    """Declaration of a column.

    Attributes:
      type: "boolean", "date", "datetime", "float32", "float64", "int8" to "int64",
        "text", "uint8" to "uint64": cells of another type are cast, if that loses
        nothing; "": the type stays as it is.
      least: least number; None: no limit.
      most: largest number.
      allowed: values that there may be; None: any.
      missing: whether cells may be missing.
      optional: whether the column may be absent, as the target is at prediction; it is
        added then, with missing cells.
      form: of dates in text, such as "%d.%m.%Y"; "": ISO 8601.
    """

    type: str = ""
    least: float | None = None
    most: float | None = None
    allowed: Sequence[Any] | None = None
    missing: bool = True
    optional: bool = False
    form: str = ""

    def __post_init__(self) -> None:
        if self.type and self.type not in TYPES:
            raise DataError(
                f"there is no type {self.type!r}{nearest(self.type, TYPES)}",
                where="Field",
                remedy=f"use one of {', '.join(TYPES)}",
            )
        if self.optional and not self.type:
            raise DataError(
                "an optional column has no type",
                where="Field",
                remedy="give its type: it is needed where the column is absent",
            )
        if self.allowed is not None:
            object.__setattr__(self, "allowed", tuple(self.allowed))


@dataclass(frozen=True)
class CheckSchema(Step):
    """Check columns against a declaration, and cast them to its types.

    A cell argues against it if it can't be cast without loss (3.7 is no int64, "abc" no
    float64, 130 no int8), if it is out of range or not allowed, or if it is missing and
    must not be.

    Args:
      columns: declaration of each column: a Field, or its type alone.
      unexpected: what to do about columns that are not declared: "keep", "drop", or
        "error".
      otherwise: what to do about cells that argue against the declaration: "error";
        "drop" the row, with a note; or "missing": the cell becomes missing, with a
        note, and the row is dropped if it must not be.
    """

    columns: Mapping[str, Field | str]
    unexpected: str = "keep"
    otherwise: str = "error"

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        fields = {name: _field(value) for name, value in self.columns.items()}
        object.__setattr__(self, "columns", fields)
        require_choice(self, "unexpected", ("keep", "drop", "error"))
        require_choice(self, "otherwise", ("error", "drop", "missing"))

    def check(self, schema: pl.Schema) -> pl.Schema:
        self._check_names(schema)
        types = {}
        for name, dtype in schema.items():
            if name in INNER or name in self.columns or self.unexpected == "keep":
                types[name] = dtype
        for name, field in self._fields():
            before = schema.get(name, pl.Null())
            after = TYPES[field.type] if field.type else before
            _check_cast(name, before, after)
            _check_limits(name, field, after)
            types[name] = after
        return pl.Schema(types)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        table = self._complete(table)
        types = table.collect_schema()
        cells = {}
        faults = []
        for name, field in self._fields():
            cells[name] = _cast(
                name,
                types[name],
                field,
            ).alias(name)
            faults.append(
                _cell_fault(
                    name,
                    types[name],
                    field,
                    cells[name],
                )
            )
            if not field.missing:
                missing = is_missing(name, types[name])
                faults.append(fault(name, missing, "missing, which it must not be"))

        if self.otherwise == "missing":
            return self._without_cells(table, cells, faults)
        if self.otherwise == "drop":
            outcome = dropped(table, faults)
        else:
            outcome = Outcome(_guarded(table, faults))
        return Outcome(
            outcome.table.with_columns(cells.values()),
            outcome.notes,
        )

    def _fields(self) -> list[tuple[str, Field]]:
        return [(name, _field(value)) for name, value in self.columns.items()]

    def _check_names(self, schema: pl.Schema) -> None:
        names = [name for name in schema if name not in INNER]
        for name, field in self._fields():
            if name not in schema and not field.optional:
                raise DataError(
                    f"the declared column {name!r} is not there{nearest(name, names)}",
                    where="CheckSchema",
                    remedy="correct the data or the declaration; the columns are"
                    f" {', '.join(names[:SHOWN])}",
                )
        for name in names:
            if name not in self.columns and self.unexpected == "error":
                near = nearest(name, self.columns)
                raise DataError(
                    f"the column {name!r} is not declared{near}",
                    where="CheckSchema",
                    remedy='declare it, or set unexpected to "drop" or "keep"',
                )

    def _complete(self, table: pl.LazyFrame) -> pl.LazyFrame:
        """Add the optional columns that are absent; drop those that are unexpected."""
        names = table.collect_schema().names()
        added = [
            pl.lit(
                None,
                dtype=TYPES[field.type],
            ).alias(name)
            for name, field in self._fields()
            if name not in names
        ]
        if self.unexpected == "drop":
            kept = [name for name in names if name in INNER or name in self.columns]
            table = table.select(kept)
        return table.with_columns(added)

    def _without_cells(
        self,
        table: pl.LazyFrame,
        cells: Mapping[str, pl.Expr],
        faults: Sequence[Fault],
    ) -> Outcome:
        """Make bad cells missing, and drop the rows where they must not be."""
        changed: list[Fault] = []
        fatal: list[Fault] = []
        for each in faults:
            field = _field(self.columns[each.column])
            (changed if field.missing else fatal).append(each)
        stays = {each.column: ~each.where for each in changed}
        corrected = [
            pl.when(
                stays.get(
                    name,
                    pl.lit(True),
                )
            )
            .then(value)
            .alias(name)
            for name, value in cells.items()
        ]
        outcome = dropped(table, fatal)
        notes = noted(outcome.table, "changed", changed)
        if outcome.notes is not None:
            notes = pl.concat([outcome.notes, notes])
        return Outcome(outcome.table.with_columns(corrected), notes)


# ---- internals ----


def _field(value: Any) -> Field:
    """Return a declaration; JSON has a table of its arguments."""
    if isinstance(value, str):
        return Field(value)
    return Field(**value) if isinstance(value, Mapping) else value


def _check_cast(
    name: str,
    before: pl.DataType,
    after: pl.DataType,
) -> None:
    is_day = before.is_temporal() and after.is_temporal() and before != pl.Time
    is_possible = (
        before == after
        or (is_number(before) and is_number(after))
        or is_text(before)
        or (after == pl.String and not before.is_nested() and before != pl.Binary)
        or is_day
    )
    if not is_possible:
        raise DataError(
            f"the column {name!r} has the type {before}, which can't be cast to"
            f" {after}",
            where="CheckSchema",
            remedy="declare the type that it has, or convert it with Derive before",
        )


def _check_limits(
    name: str,
    field: Field,
    dtype: pl.DataType,
) -> None:
    has_limits = field.least is not None or field.most is not None
    if has_limits and not is_number(dtype):
        raise DataError(
            f"the column {name!r} has limits, but the type {dtype}",
            where="CheckSchema",
            remedy="give least and most of columns of numbers alone",
        )
    for value in field.allowed or ():
        is_fitting = isinstance(value, str) == is_text(dtype) or dtype == pl.Null
        if not is_fitting or dtype.is_temporal():
            raise DataError(
                f"the column {name!r} of type {dtype} is allowed {value!r}",
                where="CheckSchema",
                remedy="allow values of the column's type: text, numbers, booleans",
            )


def _cast(
    name: str,
    before: pl.DataType,
    field: Field,
) -> pl.Expr:
    """Return a column in its declared type; what can't be cast is null."""
    after = TYPES[field.type] if field.type else before
    value = without_nan(name, before)
    if before == after or before == pl.Null:
        return value.cast(after)
    if is_text(before):
        return _cast_text(
            value.cast(pl.String),
            after,
            field,
        )
    if after == pl.Boolean:
        is_bit = pl.when(value.is_in([0, 1]))
        return is_bit.then(value == 1)
    cast = value.cast(after, strict=False)
    if after == pl.String or after.is_float():
        return cast
    return pl.when(
        cast.cast(
            before,
            strict=False,
        )
        == value
    ).then(cast)


def _cast_text(
    value: pl.Expr,
    after: pl.DataType,
    field: Field,
) -> pl.Expr:
    if after == pl.String:
        return value
    text = value.str.strip_chars()
    if after == pl.Boolean:
        word = text.str.to_lowercase()
        is_true = pl.when(word.is_in(TRUE)).then(True)
        return is_true.otherwise(pl.when(word.is_in(FALSE)).then(False))
    if after == pl.Date:
        forms = (field.form,) if field.form else DATE_FORMS
        return pl.coalesce(
            [
                text.str.to_date(
                    form,
                    strict=False,
                )
                for form in forms
            ]
        )
    if after == pl.Datetime:
        forms = (field.form,) if field.form else DATETIME_FORMS
        moments = [
            text.str.to_datetime(
                form,
                time_unit="us",
                strict=False,
            )
            for form in forms
        ]
        return pl.coalesce(moments)
    return text.cast(after, strict=False)


def _cell_fault(
    name: str,
    before: pl.DataType,
    field: Field,
    cast: pl.Expr,
) -> Fault:
    """Return what is wrong with the cells of a column that are not missing."""
    there = ~is_missing(name, before)
    text = as_text(name)
    uncast = cast.is_null()
    rules = [(uncast, f"{{}} is no {field.type}")]
    if field.least is not None:
        rules.append((cast < field.least, f"{{}} is below {field.least:g}"))
    if field.most is not None:
        rules.append((cast > field.most, f"{{}} is above {field.most:g}"))
    if field.allowed is not None:
        shown = ", ".join(
            map(
                repr,
                field.allowed[:SHOWN],
            )
        )
        rules.append((~cast.is_in(list(field.allowed)), f"{{}} is none of {shown}"))
    reason = pl.lit("")
    for where, words in reversed(rules):
        reason = (
            pl.when(where)
            .then(
                pl.format(
                    words,
                    text,
                )
            )
            .otherwise(reason)
        )
    bad = pl.any_horizontal([where.fill_null(False) for where, _ in rules])
    return fault(name, there & bad, reason)


def _guarded(table: pl.LazyFrame, faults: Sequence[Fault]) -> pl.LazyFrame:
    """Return the rows; reading them raises a DataError if one has a fault."""
    # A function of the whole table: Polars runs one of a column on parts of it in
    # parallel, so which row is named, and how many there are, would be chance.
    return table.map_batches(
        _Guard(tuple(faults)),
        schema=table.collect_schema(),
    )


@dataclass(frozen=True)
class _Guard:
    """Raise an error about the first row with a fault."""

    faults: tuple[Fault, ...]

    def __call__(self, rows: pl.DataFrame) -> pl.DataFrame:
        for each in self.faults:
            bad = rows.filter(each.where)
            if not bad.is_empty():
                raise self._error(each, bad, len(rows))
        return rows

    def _error(
        self,
        each: Fault,
        bad: pl.DataFrame,
        count: int,
    ) -> DataError:
        place = f"column {each.column!r}"
        if ROW in bad.columns:
            place += f", row {bad[ROW][0]}"
        if SOURCE in bad.columns:
            place += f" of source {bad[SOURCE][0]}"
        reason = bad.select(each.reason).item(
            0,
            0,
        )
        return DataError(
            f"{reason}; {len(bad)} such cells among {count} rows",
            where=place,
            remedy="correct the cell or the declaration, or set otherwise to"
            ' "drop" or "missing"',
        )

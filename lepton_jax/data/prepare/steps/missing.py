"""Missing cells: drop their rows, mark them, fill them.

A missing cell is null or, in a column of floats, NaN. What a step fills is noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State, Step
from lepton_jax.data.prepare.steps import statistics
from lepton_jax.data.prepare.steps.columns import (
    NUMBER,
    Fault,
    dropped,
    fault,
    float_of,
    floats_of,
    is_missing,
    list_columns,
    noted,
    nothing_to_learn,
    require,
    require_choice,
    require_free,
    without_nan,
)
from lepton_jax.errors import DataError

FILLS = ("mean", "median", "most_frequent")


@dataclass(frozen=True)
class DropMissing(Step):
    """Drop rows with a missing cell; not at prediction.

    Args:
      columns: names of columns that must have a value.
    """

    columns: str | Sequence[str]

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns)
        return pl.Schema(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return dropped(
            table,
            _faults(table, self.columns, "missing"),
        )


@dataclass(frozen=True)
class MarkMissing(Step):
    """Add for each column x a boolean column x_missing.

    It goes before the step that fills x.

    Args:
      columns: names of columns.
    """

    columns: str | Sequence[str]

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns)
        marks = {f"{name}_missing": pl.Boolean() for name in self.columns}
        require_free(self, schema, marks)
        return pl.Schema({**schema, **marks})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        types = table.collect_schema()
        marks = [
            is_missing(name, types[name]).alias(f"{name}_missing")
            for name in self.columns
        ]
        return Outcome(table.with_columns(marks))


@dataclass(frozen=True)
class FillWith(Step):
    """Fill missing cells with a constant.

    Args:
      columns: names of columns.
      value: the constant; of the columns' type.
    """

    columns: str | Sequence[str]
    value: str | float | bool

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns)
        types = {
            name: self._type(
                name,
                schema[name],
            )
            for name in self.columns
        }
        return pl.Schema({**schema, **types})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        types = table.collect_schema()
        fills = {
            name: pl.lit(self.value).cast(
                self._type(
                    name,
                    types[name],
                )
            )
            for name in self.columns
        }
        return _filled(table, fills, f"missing: filled with {self.value!r}")

    def _type(
        self,
        name: str,
        dtype: pl.DataType,
    ) -> pl.DataType:
        """Return the type of a column that is filled.

        Raises:
          DataError: the constant is no value of it.
        """
        constant = pl.Series([self.value])
        if dtype == pl.Null:
            return constant.dtype
        is_same_kind = constant.dtype.is_numeric() == dtype.is_numeric()
        try:
            fill = constant.cast(dtype)
            back = fill.cast(constant.dtype)
            is_kept = is_same_kind and back.item() == self.value
        except pl.exceptions.PolarsError:
            is_kept = False
        is_rounded = dtype.is_float() and constant.dtype.is_numeric()
        if not is_kept and not is_rounded:
            raise DataError(
                f"{self.value!r} is no value of the column {name!r}, whose type is"
                f" {dtype}",
                where="FillWith",
                remedy="give a constant of that type, or cast the column with"
                " CheckSchema before",
            )
        return dtype


@dataclass(frozen=True)
class FillMissing(Fitted):
    """Fill missing cells with a statistic of the training values.

    Args:
      columns: names of columns.
      by: "mean" or "median": of numbers, which become Float64 (Float32 stays);
        "most_frequent": the least of the most frequent values, of any type.
    """

    columns: str | Sequence[str]
    by: str

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_choice(self, "by", FILLS)

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        if self.by == "most_frequent":
            require(self, schema, self.columns)
            return pl.Schema(schema)
        require(self, schema, self.columns, NUMBER)
        types = floats_of(schema, self.columns)
        return pl.Schema({**schema, **types})

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        if self.by == "mean":
            return statistics.moments(table, self.columns)
        if self.by == "median":
            return statistics.value_counts(table, self.columns)
        types = table.collect_schema()
        return table.select(
            [
                _counted(
                    name,
                    types[name],
                )
                for name in self.columns
            ]
        )

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        if self.by == "mean":
            return statistics.merged_moments(partials)
        if self.by == "median":
            return statistics.merged_counts(partials, self)
        counts = pl.concat(partials)
        return pl.DataFrame([_summed(counts[name]) for name in self.columns])

    def finish(self, partial: Partial) -> State:
        if self.by == "most_frequent":
            values = [self._most_frequent(partial[name]) for name in self.columns]
            return pl.DataFrame(values)
        return pl.DataFrame(self._numbers(partial))

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        fills = {}
        for name in self.columns:
            dtype = types[name]
            if self.by != "most_frequent":
                dtype = float_of(dtype)
            fills[name] = pl.lit(
                state[name].item(),
                dtype=dtype,
            )
        words = self.by.replace("_", " ")
        reason = f"missing: filled with the {words} of the training split"
        return _filled(table, fills, reason)

    def _numbers(self, partial: pl.DataFrame) -> dict[str, list[float]]:
        if self.by == "mean":
            table = statistics.finite_moments(self, partial)
            return {row["column"]: [row["mean"]] for row in table.to_dicts()}
        medians = statistics.quantiles(
            self,
            partial,
            self.columns,
            (0.5,),
        )
        return {name: values.tolist() for name, values in medians}

    def _most_frequent(self, counts: pl.Series) -> pl.Series:
        rows = _rows_of(counts)
        if rows.is_empty():
            raise nothing_to_learn(self, counts.name)
        count = pl.col("count")
        most = rows.filter(count == count.max())
        first = most["value"].sort().head(1)
        return first.alias(counts.name)


# ---- internals ----


def _faults(
    table: pl.LazyFrame,
    columns: Sequence[str],
    reason: str,
) -> list[Fault]:
    types = table.collect_schema()
    return [
        fault(
            name,
            is_missing(name, types[name]),
            reason,
        )
        for name in columns
    ]


def _filled(
    table: pl.LazyFrame,
    fills: dict[str, pl.Expr],
    reason: str,
) -> Outcome:
    types = table.collect_schema()
    cells = [
        _cell(
            name,
            types[name],
            fill,
        )
        for name, fill in fills.items()
    ]
    notes = noted(
        table,
        "changed",
        _faults(table, tuple(fills), reason),
        fills,
    )
    return Outcome(table.with_columns(cells), notes)


def _cell(
    name: str,
    dtype: pl.DataType,
    fill: pl.Expr,
) -> pl.Expr:
    value = without_nan(name, dtype)
    filled = pl.when(value.is_null()).then(fill).otherwise(value)
    return filled.alias(name)


def _counted(name: str, dtype: pl.DataType) -> pl.Expr:
    """Count the distinct values of a column of any type: a list of structs."""
    value = without_nan(name, dtype)
    if dtype.is_float():
        value = pl.when(value == 0).then(0.0).otherwise(value)  # -0 is 0
    counts = value.drop_nulls().cast(dtype).value_counts()
    fields = counts.struct.rename_fields(["value", "count"])
    ordered = fields.sort_by(fields.struct.field("value"))
    return ordered.implode().alias(name)


def _rows_of(counts: pl.Series) -> pl.DataFrame:
    """Return the structs of lists of counts as rows of "value" and "count"."""
    fields = counts.explode(empty_as_null=False).drop_nulls()
    return fields.struct.unnest()


def _summed(counts: pl.Series) -> pl.Series:
    rows = _rows_of(counts)
    count = pl.col("count").sum()
    summed = rows.group_by("value").agg(count).sort("value")
    fields = summed.to_struct(counts.name)
    return fields.implode().alias(counts.name)

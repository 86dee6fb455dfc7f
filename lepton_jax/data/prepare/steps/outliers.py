"""Outliers of columns of numbers: drop their rows, clip them, flag them.

A value is an outlier below or above a limit of its column, which is fitted:

    by="zscore"    mean -+ limit standard deviations (divided by n); 3 by default
    by="iqr"       quartiles -+ limit times their distance; 1.5 by default (J. W. Tukey:
                   Exploratory data analysis, 1977)
    by="quantile"  the quantiles at limit and 1 - limit; 0.01 by default

A missing cell is no outlier.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State
from lepton_jax.data.prepare.steps import statistics
from lepton_jax.data.prepare.steps.columns import (
    NUMBER,
    Fault,
    dropped,
    fault,
    float_of,
    floats_of,
    in_train,
    list_columns,
    noted,
    number,
    require,
    require_choice,
    require_free,
    require_range,
)

# Default limits: the rule of three standard deviations, Tukey's fences, and one percent
# on each side (assumption).
LIMITS = {"zscore": 3.0, "iqr": 1.5, "quantile": 0.01}
# Largest limits.
HIGHEST = {"zscore": 1e9, "iqr": 1e9, "quantile": 0.5}
BOUNDS = pl.Schema(
    {
        "column": pl.String(),
        "low": pl.Float64(),
        "high": pl.Float64(),
    }
)


@dataclass(frozen=True)
class _Outliers(Fitted):
    """Base of the steps on outliers: their limits."""

    columns: str | Sequence[str]
    by: str = "iqr"
    limit: float | None = None

    order_independent: ClassVar[bool] = True
    idempotent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_choice(self, "by", tuple(LIMITS))
        if self.limit is None:
            object.__setattr__(self, "limit", LIMITS[self.by])
        require_range(
            self,
            "limit",
            0,
            HIGHEST[self.by],
        )

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        return pl.Schema(schema)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        if self.by == "zscore":
            return statistics.moments(table, self.columns)
        return statistics.value_counts(table, self.columns)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        if self.by == "zscore":
            return statistics.merged_moments(partials)
        return statistics.merged_counts(partials, self)

    def finish(self, partial: Partial) -> State:
        assert self.limit is not None
        if self.by == "zscore":
            table = statistics.finite_moments(self, partial)
            distance = self.limit * pl.col("deviation")
            low = pl.col("mean") - distance
            high = pl.col("mean") + distance
            return table.select(
                "column",
                low.alias("low"),
                high.alias("high"),
            )

        shares = (0.25, 0.75)
        if self.by == "quantile":
            shares = (self.limit, 1 - self.limit)
        rows = []
        for name, values in statistics.quantiles(
            self,
            partial,
            self.columns,
            shares,
        ):
            low, high = values.tolist()
            widening = 0.0
            if self.by == "iqr":
                widening = self.limit * (high - low)
            rows.append((name, low - widening, high + widening))
        return pl.DataFrame(
            rows,
            schema=BOUNDS,
            orient="row",
        )

    def _faults(self, state: pl.DataFrame | None) -> list[Fault]:
        assert state is not None
        return [self._fault(row) for row in state.to_dicts()]

    def _fault(self, row: dict[str, Any]) -> Fault:
        value = number(row["column"])
        low = row["low"]
        high = row["high"]
        rule = f"({self.by}, limit {self.limit:g})"
        below = pl.format("outlier: {} is below " + f"{low:.9g} {rule}", value)
        above = pl.format("outlier: {} is above " + f"{high:.9g} {rule}", value)
        is_below = value < low
        return fault(
            row["column"],
            is_below | (value > high),
            pl.when(is_below).then(below).otherwise(above),
        )


@dataclass(frozen=True)
class DropOutliers(_Outliers):
    """Drop training rows with an outlier.

    Rows of other splits stay, and so does every row at prediction: there the model has
    to give an answer, too.

    Args:
      columns: names of columns of numbers.
      by: "zscore", "iqr" or "quantile".
      limit: see above; None: the default of `by`.
    """

    serves: ClassVar[bool] = False

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        is_train = in_train(table)
        faults = [
            Fault(
                each.column,
                each.where & is_train,
                each.reason,
            )
            for each in self._faults(state)
        ]
        return dropped(table, faults)


@dataclass(frozen=True)
class ClipOutliers(_Outliers):
    """Replace outliers by the limit that they are beyond.

    Columns become Float64; Float32 stays.

    Args:
      columns: names of columns of numbers.
      by: "zscore", "iqr" or "quantile".
      limit: see above; None: the default of `by`.
    """

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        super().check(schema)
        types = floats_of(schema, self.columns)
        return pl.Schema({**schema, **types})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        clipped = {}
        for row in state.to_dicts():
            name = row["column"]
            value = number(name).clip(
                row["low"],
                row["high"],
            )
            dtype = float_of(types[name])
            clipped[name] = value.cast(dtype).alias(name)
        notes = noted(
            table,
            "changed",
            self._faults(state),
            clipped,
        )
        return Outcome(
            table.with_columns(clipped.values()),
            notes,
        )


@dataclass(frozen=True)
class FlagOutliers(_Outliers):
    """Add for each column x a boolean column x_outlier; false where x is missing.

    Args:
      columns: names of columns of numbers.
      by: "zscore", "iqr" or "quantile".
      limit: see above; None: the default of `by`.
    """

    def writes(self) -> Sequence[str]:
        return [f"{name}_outlier" for name in self.columns]

    def check(self, schema: pl.Schema) -> pl.Schema:
        super().check(schema)
        flags = {f"{name}_outlier": pl.Boolean() for name in self.columns}
        require_free(self, schema, flags)
        return pl.Schema({**schema, **flags})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        faults = self._faults(state)
        flags = [each.where.alias(f"{each.column}_outlier") for each in faults]
        return Outcome(
            table.with_columns(flags),
            noted(table, "flagged", faults),
        )

"""Interpolation of missing values of series."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State
from lepton_jax.data.prepare.steps.columns import (
    KEY,
    NUMBER,
    POSITION,
    fault,
    float_of,
    floats_of,
    is_missing,
    list_columns,
    noted,
    number,
    require,
    require_choice,
    text_of,
)
from lepton_jax.data.prepare.steps.splitting import position_of
from lepton_jax.errors import DataError

# Known points of all columns together that a state holds: 50 bytes each, in a few
# copies while they merge: about 2 GB (assumption).
MOST_POINTS = 2**23

POINTS = pl.Schema(
    {
        "column": pl.String(),
        "group": pl.String(),
        "at": pl.Float64(),
        "value": pl.Float64(),
        "count": pl.UInt64(),  # of cells with that value there
    }
)
KEYS = ["column", "group", "at", "value"]
# Names of columns while a column is filled.
PLACE = "lepton.place"
AT = "lepton.at"
GROUP = "lepton.group"


@dataclass(frozen=True)
class Interpolate(Fitted):
    """Fill missing values of series on the line between their neighbours in order.

    The neighbours are the nearest known values of the same group in the training split,
    so that a row is filled in the same way at prediction, and no test row tells of
    another. Several values at one place count as their mean. Rows without a place or a
    group, and of groups without a known value, stay missing.

    Columns become Float64; Float32 stays.

    Args:
      columns: names of columns of numbers.
      order: name of the column, of dates or numbers, that says the places.
      group: name of a column that says which series a row is of; None: one series.
      ends: before the first and after the last known value: "missing" stays, "nearest"
        takes that value.
    """

    columns: str | Sequence[str]
    order: str
    group: str | None = None
    ends: str = "missing"

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_choice(self, "ends", ("missing", "nearest"))

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        require(self, schema, [self.order], POSITION)
        if self.group is not None:
            require(self, schema, [self.group], KEY)
        types = floats_of(schema, self.columns)
        return pl.Schema({**schema, **types})

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        placed = table.select(
            *[number(name).alias(name) for name in self.columns],
            *self._place(table.collect_schema()),
        )
        points = placed.unpivot(
            on=list(self.columns),
            index=[GROUP, AT],
            variable_name="column",
        )
        points = points.drop_nulls()
        points = points.rename({GROUP: "group", AT: "at"})
        count = pl.len().alias("count")
        counts = points.group_by(KEYS).agg(count)
        return counts.cast(POINTS).sort(KEYS)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        counts = pl.concat(partials).group_by(KEYS)
        count = pl.col("count").sum()
        points = counts.agg(count).sort(KEYS)
        if len(points) > MOST_POINTS:
            raise DataError(
                f"there are {len(points)} known values to interpolate between; at most"
                f" {MOST_POINTS} are held",
                where="Interpolate",
                remedy="fill the columns with FillMissing, or interpolate fewer",
            )
        return points

    def finish(self, partial: Partial) -> State:
        count = pl.col("count")
        total = (pl.col("value") * count).sum()
        mean = (total / count.sum()).alias("value")
        places = partial.group_by(
            KEYS[:3],
            maintain_order=True,
        )
        return places.agg(mean)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        filled = table.with_row_index(PLACE).with_columns(self._place(types))
        for name in self.columns:
            filled = self._with_guess(
                filled,
                name,
                types[name],
                state,
            )
        values = {
            name: pl.coalesce(
                number(name),
                pl.col(_guess(name)),
            )
            .cast(float_of(types[name]))
            .alias(name)
            for name in self.columns
        }
        faults = []
        for name in self.columns:
            found = (
                is_missing(
                    name,
                    types[name],
                )
                & pl.col(_guess(name)).is_not_null()
            )
            faults.append(fault(name, found, "missing: interpolated"))
        notes = noted(filled, "changed", faults, values)
        return Outcome(
            filled.with_columns(values.values()).select(types.names()), notes
        )

    def _place(self, types: pl.Schema) -> list[pl.Expr]:
        group = pl.lit("")
        if self.group is not None:
            group = text_of(
                self.group,
                types[self.group],
            )
        at = position_of(
            self.order,
            types[self.order],
        )
        return [group.alias(GROUP), at.alias(AT)]

    def _with_guess(
        self,
        table: pl.LazyFrame,
        name: str,
        dtype: pl.DataType,
        state: pl.DataFrame,
    ) -> pl.LazyFrame:
        """Add the interpolated value of each missing cell of a column."""
        known = state.lazy().filter(pl.col("column") == name)
        before = known.select(
            pl.col("group").alias(GROUP),
            pl.col("at").alias("before_at"),
            pl.col("value").alias("before"),
        )
        after = before.rename({"before_at": "after_at", "before": "after"})
        cells = table.filter(
            is_missing(
                name,
                dtype,
            )
        ).select(
            PLACE,
            GROUP,
            AT,
        )
        cells = cells.drop_nulls().sort(AT, PLACE)
        cells = _nearest(cells, before, "before_at", "backward")
        cells = _nearest(cells, after, "after_at", "forward")
        guesses = cells.select(
            PLACE,
            self._between().alias(_guess(name)),
        )
        return table.join(
            guesses,
            on=PLACE,
            how="left",
            maintain_order="left",
        )

    def _between(self) -> pl.Expr:
        before = pl.col("before")
        after = pl.col("after")
        distance = pl.col("after_at") - pl.col("before_at")
        share = (pl.col(AT) - pl.col("before_at")) / distance
        line = before + (after - before) * share
        value = pl.when(distance == 0).then(before).otherwise(line)
        if self.ends == "nearest":
            return pl.coalesce(value, before, after)
        return value


# ---- internals ----


def _guess(name: str) -> str:
    return f"lepton.guess.{name}"


def _nearest(
    cells: pl.LazyFrame,
    known: pl.LazyFrame,
    at: str,
    strategy: str,
) -> pl.LazyFrame:
    return cells.join_asof(
        known,
        left_on=AT,
        right_on=at,
        by=GROUP,
        strategy=strategy,  # type: ignore[arg-type]
        check_sortedness=False,
        coalesce=False,
    )

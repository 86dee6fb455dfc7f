"""Normalization of columns of numbers.

Missing cells stay missing. Float32 stays Float32; every other type becomes Float64.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import polars as pl
from scipy.special import ndtri

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State, Step
from lepton_jax.data.prepare.steps import statistics
from lepton_jax.data.prepare.steps.columns import (
    NUMBER,
    Fault,
    fault,
    float_of,
    floats_of,
    list_columns,
    noted,
    number,
    require,
    require_choice,
    require_range,
)
from lepton_jax.errors import DataError

EPSILON = sys.float_info.epsilon
# A spread below this many EPSILON is rounding: the column counts as constant, and is
# not divided. As in scikit-learn's `_handle_zeros_in_scale`.
LEAST_SPREAD = 10
# Ranks so near to 0 and 1 are clipped before they become normal quantiles, which are
# +-5.2 there: scikit-learn's BOUNDS_THRESHOLD.
LEAST_RANK = 1e-7

LINE = pl.Schema(
    {
        "column": pl.String(),
        "center": pl.Float64(),
        "scale": pl.Float64(),
    }
)


@dataclass(frozen=True)
class _Scale(Fitted):
    """Base of the steps that make (x - center) / scale of each x."""

    columns: str | Sequence[str]

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        types = floats_of(schema, self.columns)
        return pl.Schema({**schema, **types})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        scaled = []
        for row in state.iter_rows(named=True):
            name = row["column"]
            dtype = float_of(types[name])
            column = self._scaled(row).cast(dtype).alias(name)
            scaled.append(column)
        return Outcome(table.with_columns(scaled))

    def _scaled(self, row: dict[str, Any]) -> pl.Expr:
        centered = number(row["column"]) - row["center"]
        # Not a division: see columns.py.
        return centered * (1 / row["scale"])


@dataclass(frozen=True)
class Standardize(_Scale):
    """Subtract the mean, and divide by the standard deviation (divided by n).

    A constant column becomes 0.

    Args:
      columns: names of columns of numbers.
    """

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return statistics.moments(table, self.columns)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return statistics.merged_moments(partials)

    def finish(self, partial: Partial) -> State:
        table = statistics.finite_moments(self, partial)
        # The variance of a constant column is rounding, of this size at most
        # (scikit-learn's `_is_constant_feature`).
        count = pl.col("count").cast(pl.Float64)
        variance = pl.col("squares") / count
        rounding = count * EPSILON * variance
        rounding += (count * pl.col("mean") * EPSILON) ** 2
        deviation = pl.col("deviation")
        scale = pl.when(variance <= rounding).then(1.0).otherwise(deviation)
        return table.select(
            "column",
            pl.col("mean").alias("center"),
            scale.alias("scale"),
        )


@dataclass(frozen=True)
class MinMaxScale(_Scale):
    """Map the least training value to `low` and the largest to `high`.

    Args:
      columns: names of columns of numbers.
      low: what the least training value becomes; so does each value of a constant one.
      high: what the largest becomes.
      clip: whether values beyond the training range become `low` or `high`.
    """

    low: float = 0.0
    high: float = 1.0
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise DataError(
                f"low is {self.low}, and high {self.high}",
                where="MinMaxScale",
                remedy="give a low that is less than high",
            )

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return statistics.moments(table, self.columns)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return statistics.merged_moments(partials)

    def finish(self, partial: Partial) -> State:
        table = statistics.finite_moments(self, partial)
        spread = pl.col("most") - pl.col("least")
        return table.select(
            "column",
            pl.col("least").alias("center"),
            _divisor(spread).alias("scale"),
        )

    def _scaled(self, row: dict[str, Any]) -> pl.Expr:
        share = super()._scaled(row)
        value = share * (self.high - self.low) + self.low
        return (
            value.clip(
                self.low,
                self.high,
            )
            if self.clip
            else value
        )


@dataclass(frozen=True)
class RobustScale(_Scale):
    """Subtract the median, and divide by the distance of two quantiles.

    Outliers don't move either much.

    Args:
      columns: names of columns of numbers.
      low: share of the values below the lower quantile.
      high: share of the values below the upper one.
    """

    low: float = 0.25
    high: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range(self, "low", 0, 1)
        require_range(self, "high", self.low, 1)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return statistics.value_counts(table, self.columns)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return statistics.merged_counts(partials, self)

    def finish(self, partial: Partial) -> State:
        shares = (self.low, 0.5, self.high)
        rows = []
        for name, values in statistics.quantiles(
            self,
            partial,
            self.columns,
            shares,
        ):
            low, median, high = values.tolist()
            spread = high - low
            if not np.isfinite([spread, median]).all():
                raise _endless(self, name)
            rows.append({"column": name, "center": median, "scale": spread})
        lines = pl.DataFrame(rows, schema=LINE)
        return lines.with_columns(_divisor(pl.col("scale")).alias("scale"))


@dataclass(frozen=True)
class LogScale(Step):
    """Take the logarithm: ln(1 + x).

    Args:
      columns: names of columns of numbers.
      negative: "missing": an x of -1 or less has no logarithm, and its cell becomes
        missing, with a note; "mirror": x becomes sign(x) ln(1 + |x|), which loses none.
    """

    columns: str | Sequence[str]
    negative: str = "missing"

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_choice(self, "negative", ("missing", "mirror"))

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        types = floats_of(schema, self.columns)
        return pl.Schema({**schema, **types})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        types = table.collect_schema()
        logs = [
            self._log(name).cast(float_of(types[name])).alias(name)
            for name in self.columns
        ]
        notes = noted(table, "changed", self._without_logarithm())
        return Outcome(table.with_columns(logs), notes)

    def _log(self, name: str) -> pl.Expr:
        value = number(name)
        if self.negative == "mirror":
            return value.sign() * value.abs().log1p()
        return pl.when(value > -1).then(value.log1p())

    def _without_logarithm(self) -> list[Fault]:
        if self.negative == "mirror":
            return []
        return [
            fault(
                name,
                number(name) <= -1,
                pl.format("ln(1 + x) of {} does not exist", number(name)),
            )
            for name in self.columns
        ]


@dataclass(frozen=True)
class QuantileScale(Fitted):
    """Replace each value by its rank among the training values, from 0 to 1.

    Between two of `count` quantiles the rank is interpolated; within a run of equal
    values it is the middle of theirs. Values beyond the training range have the ranks 0
    and 1.

    Args:
      columns: names of columns of numbers.
      count: of quantiles; at most as many as there are training values.
      onto: "uniform": ranks; "normal": the quantiles of the standard normal
        distribution at these ranks.
    """

    columns: str | Sequence[str]
    count: int = 1000
    onto: str = "uniform"

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_choice(self, "onto", ("uniform", "normal"))
        require_range(self, "count", 2, 2**20)

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        types = floats_of(schema, self.columns)
        return pl.Schema({**schema, **types})

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        return statistics.value_counts(table, self.columns)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return statistics.merged_counts(partials, self)

    def finish(self, partial: Partial) -> State:
        tables = []
        for name in self.columns:
            rows = partial.filter(pl.col("column") == name)
            count = min(
                self.count,
                int(rows["count"].sum()),
            )
            shares = np.linspace(
                0,
                1,
                max(1, count),
            )
            each = statistics.quantiles(
                self,
                rows,
                [name],
                shares,
            )
            edges = next(each)[1]
            if not np.isfinite(edges).all():
                raise _endless(self, name)
            tables.append(_edges_table(name, edges))
        return pl.concat(tables)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        ranks = []
        for name in self.columns:
            edges = edges_of(state, name)
            rank = number(name).map_batches(
                _Ranks(edges, self.onto),
                return_dtype=pl.Float64,
                is_elementwise=True,
            )
            dtype = float_of(types[name])
            ranks.append(rank.cast(dtype).alias(name))
        return Outcome(table.with_columns(ranks))


@dataclass(frozen=True)
class Bins(Fitted):
    """Replace each value by the number of its bin, from 0; UInt32.

    A value on an edge is in the upper bin; values beyond the training range are in the
    first and the last.

    Args:
      columns: names of columns of numbers.
      count: of bins; fewer where quantiles coincide.
      by: "quantile": bins with about as many training values; "width": of one width.
    """

    columns: str | Sequence[str]
    count: int = 10
    by: str = "quantile"

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_choice(self, "by", ("quantile", "width"))
        require_range(self, "count", 2, 2**20)

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, NUMBER)
        types = dict.fromkeys(
            self.columns,
            pl.UInt32(),
        )
        return pl.Schema({**schema, **types})

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        if self.by == "width":
            return statistics.moments(table, self.columns)
        return statistics.value_counts(table, self.columns)

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        if self.by == "width":
            return statistics.merged_moments(partials)
        return statistics.merged_counts(partials, self)

    def finish(self, partial: Partial) -> State:
        if self.by == "width":
            table = statistics.finite_moments(self, partial)
            tables = [
                _edges_table(
                    row["column"],
                    np.linspace(
                        row["least"],
                        row["most"],
                        self.count + 1,
                    ),
                )
                for row in table.iter_rows(named=True)
            ]
            return pl.concat(tables)

        shares = np.linspace(
            0,
            1,
            self.count + 1,
        )
        tables = []
        for name, edges in statistics.quantiles(
            self,
            partial,
            self.columns,
            shares,
        ):
            if not np.isfinite(edges).all():
                raise _endless(self, name)
            tables.append(
                _edges_table(
                    name,
                    np.unique(edges),
                )
            )
        return pl.concat(tables)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        bins = []
        for name in self.columns:
            edges = edges_of(state, name)
            code = number(name).map_batches(
                _Bins(edges[1:-1]),
                return_dtype=pl.UInt32,
                is_elementwise=True,
            )
            bins.append(code.alias(name))
        return Outcome(table.with_columns(bins))


def edges_of(state: pl.DataFrame, name: str) -> np.ndarray:
    """Return the ascending edges of a column in a state of QuantileScale or Bins."""
    return state.filter(pl.col("column") == name)["edge"].to_numpy()


# ---- internals ----


def _divisor(spread: pl.Expr) -> pl.Expr:
    """Return a spread, or 1 where it is rounding."""
    return pl.when(spread < LEAST_SPREAD * EPSILON).then(1.0).otherwise(spread)


def _endless(step: Any, name: str) -> DataError:
    return DataError(
        f"a quantile of the column {name!r} is infinite",
        where=type(step).__name__,
        remedy=statistics.without_infinity(name),
    )


def _edges_table(name: str, edges: np.ndarray) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "column": [name] * len(edges),
            "edge": np.maximum.accumulate(edges),
        },
        schema={
            "column": pl.String(),
            "edge": pl.Float64(),
        },
    )


@dataclass(frozen=True)
class _Ranks:
    """Ranks of values, as scikit-learn's QuantileTransformer has them."""

    edges: np.ndarray
    onto: str

    def __call__(self, series: pl.Series) -> pl.Series:
        value = series.cast(pl.Float64).to_numpy()
        edges = self.edges
        ranks = np.linspace(
            0,
            1,
            len(edges),
        )
        # From below and from above: a run of equal edges has a rank at each end.
        below = np.interp(value, edges, ranks)
        above = -np.interp(
            -value,
            -edges[::-1],
            -ranks[::-1],
        )
        rank = (below + above) / 2
        rank = np.where(
            value >= edges[-1],
            1.0,
            rank,
        )
        rank = np.where(
            value <= edges[0],
            0.0,
            rank,
        )
        rank = np.where(
            np.isnan(value),
            np.nan,
            rank,
        )
        if self.onto == "normal":
            rank = ndtri(
                np.clip(
                    rank,
                    LEAST_RANK,
                    1 - LEAST_RANK,
                )
            )
        return pl.Series(
            series.name,
            rank,
        ).fill_nan(None)


@dataclass(frozen=True)
class _Bins:
    """Numbers of the bins of values."""

    inner: np.ndarray

    def __call__(self, series: pl.Series) -> pl.Series:
        value = series.cast(pl.Float64).to_numpy()
        code = np.searchsorted(
            self.inner,
            value,
            side="right",
        )
        codes = pl.Series(
            series.name,
            code,
            dtype=pl.UInt32,
        )
        present = pl.DataFrame(
            {
                "code": codes,
                "is": series.is_not_null(),
            }
        )
        kept = pl.when(pl.col("is")).then(pl.col("code"))
        column = present.select(kept.alias(series.name))
        return column.to_series()

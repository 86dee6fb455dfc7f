"""Statistics of columns as partials that merge in any grouping.

Moments merge by Chan's formula (Chan, Golub, LeVeque: Algorithms for computing the
sample variance, 1983), in float64. With n values, mean m, and sum of squared deviations
s in each of two parts a and b:

    n = na + nb        d = mb - ma
    m = ma + d nb / n
    s = sa + sb + d**2 na nb / n

    [1, 2] and [6]:  na = 2, ma = 1.5, sa = 0.5;  nb = 1, mb = 6, sb = 0;  d = 4.5
    m = 1.5 + 4.5 / 3 = 3      s = 0.5 + 4.5**2 * 2 / 3 = 14

Medians and quantiles are exact: they are read off the counts of all distinct values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.prepare.steps.columns import nothing_to_learn, number
from lepton_jax.errors import DataError

# Distinct values of all columns of a step together whose counts are held to find exact
# quantiles. 16 bytes each and the name of its column, a few copies while they merge:
# about 2 GB (assumption).
MOST_VALUES = 2**25

MOMENTS = pl.Schema(
    {
        "column": pl.String(),
        "count": pl.UInt64(),  # of finite values
        "mean": pl.Float64(),
        "squares": pl.Float64(),  # sum of squared deviations from the mean
        "least": pl.Float64(),
        "most": pl.Float64(),
        "infinite": pl.UInt64(),  # count of infinite values
    }
)
COUNTS = pl.Schema(
    {
        "column": pl.String(),
        "value": pl.Float64(),
        "count": pl.UInt64(),
    }
)


def moments(table: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """Return MOMENTS of columns of numbers, one row a column, missing cells left out.

    `least` is +inf and `most` -inf where there is no value.
    """
    structs = [_moments_of(name) for name in columns]
    return _one_a_row(
        table.select(structs),
        columns,
    ).cast(MOMENTS)


def merged_moments(partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Return the MOMENTS of the rows of several tables of MOMENTS."""
    total = partials[0]
    for part in partials[1:]:
        total = _chan(total, part)
    return total


def finite_moments(step: Any, partial: pl.DataFrame) -> pl.DataFrame:
    """Return MOMENTS with "deviation", the standard deviation, divided by n.

    Raises:
      DataError: a column has no finite value, an infinite one, or one so large that its
        square is none.
    """
    for row in partial.iter_rows(named=True):
        name = row["column"]
        if row["infinite"]:
            raise DataError(
                f"the column {name!r} has {row['infinite']} infinite values, which have"
                " no mean",
                where=type(step).__name__,
                remedy=without_infinity(name),
            )
        if row["count"] == 0:
            raise nothing_to_learn(step, name)
        if not np.isfinite(row["squares"]):
            raise DataError(
                f"values of the column {name!r} are too large to be squared: the"
                f" largest is {row['most']:g}, the least {row['least']:g}",
                where=type(step).__name__,
                remedy="scale the column with LogScale, or drop such rows with Filter",
            )
    deviation = (pl.col("squares") / pl.col("count")).sqrt()
    return partial.with_columns(deviation.alias("deviation"))


def value_counts(table: pl.LazyFrame, columns: Sequence[str]) -> pl.LazyFrame:
    """Return COUNTS of the distinct values of columns of numbers, in their order."""
    names = sorted(columns)
    structs = [_counts_of(name) for name in names]
    rows = _one_a_row(
        table.select(structs),
        names,
        is_list=True,
    )
    return rows.select(
        "column",
        "value",
        pl.col("len").alias("count"),
    ).cast(COUNTS)


def merged_counts(partials: Sequence[pl.DataFrame], step: Any = None) -> pl.DataFrame:
    """Return the COUNTS of the rows of several tables of COUNTS.

    Raises:
      DataError: there are more than MOST_VALUES distinct values.
    """
    table = pl.concat(partials)
    if len(partials) > 1:
        names = sorted(table["column"].unique())
        parts = [table.filter(pl.col("column") == name) for name in names]
        table = pl.concat([table[:0], *map(_added, parts)])
    if len(table) > MOST_VALUES:
        raise DataError(
            f"there are {len(table)} distinct values; exact medians and quantiles hold"
            f" at most {MOST_VALUES}",
            where=type(step).__name__,
            remedy="round the columns with Derive, divide them among several such"
            " steps, or use a step that needs means alone",
        )
    return table


def quantiles(
    step: Any,
    counts: pl.DataFrame,
    columns: Sequence[str],
    shares: Sequence[float] | np.ndarray,
) -> Iterator[tuple[str, np.ndarray]]:
    """Return (column, its quantiles at `shares`), interpolated linearly.

    They are those of `numpy.quantile` and of Polars' `interpolation="linear"`.

    Raises:
      DataError: a column has no value.
    """
    for name in columns:
        rows = counts.filter(pl.col("column") == name)
        if rows.is_empty():
            raise nothing_to_learn(step, name)
        yield name, _quantiles_of(rows, np.asarray(shares))


def without_infinity(name: str) -> str:
    """Return the remedy for infinite values of a column."""
    column = f'col("{name}")'
    return (
        "make them missing before, with"
        f" Derive({name!r}, '{column} if abs({column}) < 1e300 else None')"
    )


# ---- internals ----


def _one_a_row(
    table: pl.LazyFrame,
    columns: Sequence[str],
    is_list: bool = False,
) -> pl.LazyFrame:
    """Turn a row of structs, one a column, into rows of "column" and the fields."""
    rows = table.unpivot(
        on=list(columns),
        variable_name="column",
        value_name="fields",
    )
    if is_list:
        rows = rows.explode("fields").filter(pl.col("fields").is_not_null())
    return rows.unnest("fields")


def _moments_of(name: str) -> pl.Expr:
    value = number(name)
    finite = value.filter(value.is_finite())
    count = finite.count()
    return pl.struct(
        count.alias("count"),
        finite.mean().fill_null(0.0).alias("mean"),
        (finite.var(ddof=0) * count).fill_null(0.0).alias("squares"),
        finite.min().fill_null(np.inf).alias("least"),
        finite.max().fill_null(-np.inf).alias("most"),
        value.is_infinite().sum().alias("infinite"),
    ).alias(name)


def _counts_of(name: str) -> pl.Expr:
    # Sorting and counting runs takes a sixth of the time of `value_counts`, and sorts.
    runs = number(name).drop_nulls().sort().rle()
    return runs.implode().alias(name)


def _added(rows: pl.DataFrame) -> pl.DataFrame:
    """Add the counts of the same value of one column."""
    # A stable sort is fast here: it merges runs, and each partial is one.
    order = np.argsort(rows["value"].to_numpy(), kind="stable")
    values = rows["value"].to_numpy()[order]
    counts = rows["count"].to_numpy()[order]
    is_first = np.append(True, values[1:] != values[:-1])
    starts = np.flatnonzero(is_first)
    return pl.DataFrame(
        {
            "column": pl.repeat(rows["column"][0], len(starts), eager=True),
            "value": values[starts],
            "count": np.add.reduceat(counts, starts),
        },
        schema=COUNTS,
    )


def _chan(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    a = {name: first[name].to_numpy() for name in MOMENTS}
    b = {name: second[name].to_numpy() for name in MOMENTS}
    mean, squares = _mean_and_squares(a, b)
    return pl.DataFrame(
        {
            "column": first["column"],
            "count": a["count"] + b["count"],
            "mean": mean,
            "squares": squares,
            "least": np.minimum(a["least"], b["least"]),
            "most": np.maximum(a["most"], b["most"]),
            "infinite": a["infinite"] + b["infinite"],
        },
        schema=MOMENTS,
    )


def _mean_and_squares(
    a: dict[str, np.ndarray],
    b: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and squares of two parts; an empty part's 0 says nothing."""
    count_a = a["count"].astype(np.float64)
    count_b = b["count"].astype(np.float64)
    share = count_b / np.maximum(count_a + count_b, 1)
    distance = b["mean"] - a["mean"]
    with np.errstate(over="ignore", invalid="ignore"):
        mean = a["mean"] + distance * share
        between = distance**2 * count_a * share

    is_one_empty = count_a * count_b == 0
    alone = np.where(count_a == 0, b["mean"], a["mean"])
    squares = a["squares"] + b["squares"]
    return (
        np.where(is_one_empty, alone, mean),
        np.where(is_one_empty, squares, squares + between),
    )


def _quantiles_of(rows: pl.DataFrame, shares: np.ndarray) -> np.ndarray:
    values = rows["value"].to_numpy()
    ends = np.cumsum(rows["count"].to_numpy())
    position = shares * float(ends[-1] - 1)
    lower = np.floor(position)
    upper = np.ceil(position)
    low = values[
        np.searchsorted(
            ends,
            lower,
            side="right",
        )
    ]
    high = values[
        np.searchsorted(
            ends,
            upper,
            side="right",
        )
    ]
    with np.errstate(invalid="ignore"):
        between = low + (high - low) * (position - lower)
    # Between two infinities of one sign there is nothing to interpolate.
    return np.where(low == high, low, between)

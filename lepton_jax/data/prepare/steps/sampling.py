"""Sampling and class balance: which training rows are seen, and how often.

They change the training split alone, and nothing at prediction. Whether a row stays
depends on the hash of (seed, source, row): the same rows on any machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State, Step
from lepton_jax.data.prepare.steps import hashing
from lepton_jax.data.prepare.steps.columns import (
    KEY,
    dropped,
    fault,
    in_train,
    noted,
    nothing_to_learn,
    require,
    require_free,
    require_range,
    text_of,
)

MOST_REPEATS = 10_000  # copies of one row at most (assumption: beyond it is a mistake)


@dataclass(frozen=True)
class Sample(Step):
    """Keep a share of the training rows.

    Args:
      share: about how many of the rows stay, from 0 to 1.
      seed: another one keeps other rows.
    """

    share: float
    seed: int = 0

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_range(self, "share", 0, 1)

    def check(self, schema: pl.Schema) -> pl.Schema:
        return pl.Schema(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        stays = hashing.is_below(
            hashing.of_row(self.seed),
            self.share,
        )
        reason = f"not in the sample of {self.share:g} of the training rows"
        return dropped(
            table,
            [
                fault(
                    "",
                    in_train(table) & ~stays,
                    reason,
                )
            ],
        )


@dataclass(frozen=True)
class _Balance(Fitted):
    """Base of the steps on classes: their counts in the training split."""

    column: str

    serves: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, [self.column], KEY)
        return pl.Schema(schema)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        value = self._class(table).alias("value")
        classes = table.select(value).drop_nulls().group_by("value")
        count = pl.len().cast(pl.UInt64).alias("count")
        return classes.agg(count).sort("value")

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        classes = pl.concat(partials).group_by("value")
        count = pl.col("count").sum()
        return classes.agg(count).sort("value")

    def finish(self, partial: Partial) -> State:
        if partial.is_empty():
            raise nothing_to_learn(self, self.column)
        count = pl.col("count").cast(pl.Float64)
        factor = self._factor(count).alias("factor")
        return partial.with_columns(factor)

    def _class(self, table: pl.LazyFrame) -> pl.Expr:
        return text_of(
            self.column,
            table.collect_schema()[self.column],
        )

    def _factor(self, count: pl.Expr) -> pl.Expr:
        raise NotImplementedError

    def _factors(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame,
    ) -> pl.Expr:
        """Return the factor of each row; 1 outside of train and without a class."""
        factor = self._class(table).replace_strict(
            state["value"],
            state["factor"],
            default=1.0,
            return_dtype=pl.Float64,
        )
        return pl.when(in_train(table)).then(factor).otherwise(1.0)


@dataclass(frozen=True)
class Undersample(_Balance):
    """Drop training rows of the frequent classes.

    Of a class with n rows about min(n, ratio m) stay, where m is the size of the
    smallest class.

    Args:
      column: name of the column of classes.
      ratio: how many times as large as the smallest class another may be, from 1.
      seed: another one keeps other rows.
    """

    ratio: float = 1.0
    seed: int = 0

    idempotent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_range(self, "ratio", 1, 2**53)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        factor = self._factors(table, state)
        stays = hashing.is_below(
            hashing.of_row(self.seed),
            factor,
        )
        words = "undersampled: {} of the training rows of this class stay"
        reason = pl.format(
            words,
            factor.round(4),
        )
        return dropped(
            table,
            [fault(self.column, ~stays, reason)],
        )

    def _factor(self, count: pl.Expr) -> pl.Expr:
        share = self.ratio * count.min() / count
        return share.clip(0, 1)


@dataclass(frozen=True)
class Oversample(_Balance):
    """Repeat training rows of the rare classes.

    A class with n rows has about max(n, ratio m) afterwards, where m is the size of the
    largest class. The copies of a row follow it, and have its number.

    Args:
      column: name of the column of classes.
      ratio: size, as a share of the largest class, up to which another is repeated.
      seed: another one repeats other rows once more.
    """

    ratio: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_range(self, "ratio", 0, 1)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        factor = self._factors(table, state)
        rest = factor - factor.floor()
        more = hashing.is_below(
            hashing.of_row(self.seed),
            rest,
        )
        whole = factor.floor().cast(pl.Int64)
        times = whole + more.cast(pl.Int64)
        names = table.collect_schema().names()
        copies = pl.int_ranges(
            0,
            times,
        ).alias(COPIES)
        rows = table.with_columns(copies).explode(COPIES)
        reason = pl.format("oversampled: stands here {} times", times)
        repeated = fault(self.column, times > 1, reason)
        return Outcome(
            rows.select(names),
            noted(table, "flagged", [repeated]),
        )

    def _factor(self, count: pl.Expr) -> pl.Expr:
        repeats = self.ratio * count.max() / count
        return repeats.clip(1, MOST_REPEATS)


@dataclass(frozen=True)
class Weigh(_Balance):
    """Add a column of weights with which the classes count equally, Float64.

    A training row of a class with n of N rows weighs N / (k n), where k is the number
    of classes: 1 on average. Rows of other splits, and rows without a class, weigh 1.

    Args:
      column: name of the column of classes.
      weight: name of the column that is added.
    """

    weight: str = "weight"

    def writes(self) -> Sequence[str]:
        return [self.weight]

    def check(self, schema: pl.Schema) -> pl.Schema:
        super().check(schema)
        require_free(self, schema, [self.weight])
        return pl.Schema({**schema, self.weight: pl.Float64()})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        weights = self._factors(
            table,
            state,
        ).alias(self.weight)
        return Outcome(table.with_columns(weights))

    def _factor(self, count: pl.Expr) -> pl.Expr:
        return count.sum() / (count.count() * count)


COPIES = "lepton.copies"  # name of a column while rows are repeated

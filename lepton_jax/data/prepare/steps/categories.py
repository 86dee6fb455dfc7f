"""Categories as numbers: a vocabulary, columns of zeros and ones, or a hash.

A category is text, an integer, a boolean or a date. Categories are told apart by their
spelling: 7 and "7" are the same one.
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
    list_columns,
    nothing_to_learn,
    require,
    require_range,
    text_of,
)
from lepton_jax.errors import DataError

MOST_CODES = 2**31 - 1  # a code fits into int32, which models take
# Categories that OneHot gives a place of their own, unless somebody says otherwise
# (assumption: beyond it an embedding of Vocabulary's codes is smaller).
MOST_PLACES = 256

COUNTS = pl.Schema(
    {
        "column": pl.String(),
        "value": pl.String(),  # null: missing
        "count": pl.UInt64(),
    }
)


@dataclass(frozen=True)
class Vocabulary(Fitted):
    """Replace categories by codes, UInt32: 1 for the most frequent one, and so on.

    0 stands for a category that training did not see, and for one that is too rare, so
    that what 0 means can be learned. Missing is a category like any other. Of two that
    are as frequent the lesser spelling comes first.

    Args:
      columns: names of columns of categories.
      least: training rows with a category that gets a code of its own.
      most: categories of a column that get a code of their own; None: all.
    """

    columns: str | Sequence[str]
    least: int = 1
    most: int | None = None

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_range(self, "least", 1, MOST_CODES)
        if self.most is not None:
            require_range(self, "most", 1, MOST_CODES - 1)

    def writes(self) -> Sequence[str]:
        return self.columns

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, KEY)
        return pl.Schema(
            {
                **schema,
                **dict.fromkeys(
                    self.columns,
                    pl.UInt32(),
                ),
            }
        )

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        types = table.collect_schema()
        texts = [
            text_of(
                name,
                types[name],
            ).alias(name)
            for name in self.columns
        ]
        rows = table.select(texts).unpivot(
            on=list(self.columns),
            variable_name="column",
        )
        counts = rows.group_by(
            "column",
            "value",
        ).agg(pl.len().alias("count"))
        return counts.cast(COUNTS).sort("column", "value")

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        counts = pl.concat(partials).group_by(
            "column",
            "value",
        )
        return counts.agg(pl.col("count").sum()).sort(
            "column",
            "value",
        )

    def finish(self, partial: Partial) -> State:
        tables = []
        for name in self.columns:
            rows = partial.filter(pl.col("column") == name)
            if rows["value"].is_null().all():
                raise nothing_to_learn(self, name)
            tables.append(self._coded(rows))
        return pl.concat(tables)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        codes = [
            self._code(
                name,
                types,
                state,
            )
            for name in self.columns
        ]
        return Outcome(table.with_columns(codes))

    def _coded(self, rows: pl.DataFrame) -> pl.DataFrame:
        kept = rows.filter(pl.col("count") >= self.least)
        ordered = kept.sort(
            "count",
            descending=True,
            maintain_order=True,
        )
        head = ordered.head(self.most or MOST_CODES - 1)
        return head.with_row_index("code", offset=1)

    def _code(
        self,
        name: str,
        types: pl.Schema,
        state: pl.DataFrame,
    ) -> pl.Expr:
        rows = state.filter(pl.col("column") == name)
        code = text_of(name, types[name]).replace_strict(
            rows["value"],
            rows["code"],
            default=0,
            return_dtype=pl.UInt32,
        )
        return code.alias(name)


@dataclass(frozen=True)
class OneHot(Vocabulary):
    """Replace categories by lists of zeros and a one, List(UInt8), at their code.

    The codes are those of Vocabulary: the first place is that of an unseen or too rare
    category.

    Args:
      columns: names of columns of categories.
      least: training rows with a category that gets a place of its own.
      most: categories of a column that get a place of their own.
    """

    most: int | None = MOST_PLACES

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, KEY)
        lists = dict.fromkeys(
            self.columns,
            pl.List(pl.UInt8),
        )
        return pl.Schema({**schema, **lists})

    def _code(
        self,
        name: str,
        types: pl.Schema,
        state: pl.DataFrame,
    ) -> pl.Expr:
        code = super()._code(name, types, state)
        count = len(state.filter(pl.col("column") == name))
        places = [(code == place).cast(pl.UInt8) for place in range(count + 1)]
        return pl.concat_list(places).alias(name)


@dataclass(frozen=True)
class HashCategories(Step):
    """Replace categories by 1 + hash modulo (buckets - 1), UInt32; 0 for missing.

    There is no state: a category that training did not see has a code, too, which it
    may share with others.

    Args:
      columns: names of columns of categories.
      buckets: count of codes, 0 included.
      seed: of the hash; another one makes others share a code.
    """

    columns: str | Sequence[str]
    buckets: int
    seed: int = 0

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        require_range(self, "buckets", 2, MOST_CODES)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, KEY)
        return pl.Schema(
            {
                **schema,
                **dict.fromkeys(
                    self.columns,
                    pl.UInt32(),
                ),
            }
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        types = table.collect_schema()
        codes = []
        for name in self.columns:
            code = (
                hashing.of_values(
                    [name],
                    types,
                    self.seed,
                )
                % (self.buckets - 1)
                + 1
            )
            is_present = pl.col(name).is_not_null()
            present = pl.when(is_present).then(code).otherwise(0)
            codes.append(present.cast(pl.UInt32).alias(name))
        return Outcome(table.with_columns(codes))


@dataclass(frozen=True)
class Classes(Fitted):
    """Replace the values of a target by the numbers of their classes, Int32 from 0.

    The classes are in the order of their values: of numbers if all are numbers, else of
    their spelling. A value that training did not see, or a missing one, is no class:
    its row is dropped, with a note.

    Args:
      column: name of the target.
    """

    column: str

    order_independent: ClassVar[bool] = True

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, [self.column], KEY)
        return pl.Schema({**schema, self.column: pl.Int32()})

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        dtype = table.collect_schema()[self.column]
        text = text_of(
            self.column,
            dtype,
        ).alias("value")
        values = table.select(text).drop_nulls()
        count = pl.len().cast(pl.UInt64).alias("count")
        counts = values.group_by("value").agg(count)
        return counts.sort("value")

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        classes = pl.concat(partials).group_by("value")
        count = pl.col("count").sum()
        return classes.agg(count).sort("value")

    def finish(self, partial: Partial) -> State:
        if partial.is_empty():
            raise nothing_to_learn(self, self.column)
        if len(partial) == 1:
            raise DataError(
                f"the column {self.column!r} has one value,"
                f" {partial['value'].item()!r}, in the rows to fit on",
                where="Classes",
                remedy="give rows of at least two classes; there is nothing to learn"
                " from one",
            )
        size = pl.col("value").cast(
            pl.Float64,
            strict=False,
        )
        numbers = partial.select(size).to_series()
        order = [pl.col("value")]
        if not numbers.has_nulls():
            order = [size, *order]
        return partial.sort(order).with_row_index("code")

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        text = text_of(
            self.column,
            table.collect_schema()[self.column],
        )
        code = text.replace_strict(
            state["value"],
            state["code"],
            default=None,
            return_dtype=pl.Int32,
        )
        known = ", ".join(
            map(
                repr,
                state["value"].head(8),
            )
        )
        words = pl.format(f"{{}} is no class of the training split ({known})", text)
        missing = pl.lit("missing")
        reason = pl.when(text.is_null()).then(missing).otherwise(words)
        outcome = dropped(
            table,
            [
                fault(
                    self.column,
                    code.is_null(),
                    reason,
                )
            ],
        )
        coded = outcome.table.with_columns(code.alias(self.column))
        return Outcome(coded, outcome.notes)

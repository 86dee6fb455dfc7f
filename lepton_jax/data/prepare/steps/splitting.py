"""Splitting rows into train, validation and test: each step writes the column SPLIT.

Where a row goes depends on its hash, of (seed, source, row) or of its values, never on
the order in which rows are read. The rows with the least hashes are the test, those
with the next ones the validation:

    hash of the row, as a share of 2**64   0.03  0.11  0.26  0.48  0.52  0.77  0.93
    test=0.3, validation=0.3, 7 rows       test  test  val.  val.  train train train
    folds=3, fold=1, 7 rows                train train train test  test  train train

With folds, the test is one of that many equal parts, and each row is in the test of one
fold. The validation then is what follows the test.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl

from lepton_jax.data.prepare.step import SPLIT, Fitted, Outcome, Partial, State, Step
from lepton_jax.data.prepare.steps import folding, hashing, statistics
from lepton_jax.data.prepare.steps.columns import (
    KEY,
    POSITION,
    fault,
    list_columns,
    listed,
    noted,
    require,
    require_free,
    require_range,
    text_of,
)
from lepton_jax.data.readers.reader import SOURCE
from lepton_jax.errors import DataError

# Rows, or groups, whose hashes a split holds: 32 bytes each, in a few copies while they
# merge: some 3 GB (assumption).
MOST_HASHES = 2**25

HASHES = pl.Schema(
    {
        "stratum": pl.String(),
        "hash": pl.UInt64(),
        "rows": pl.UInt64(),
    }
)
THRESHOLDS = pl.Schema(
    {
        "stratum": pl.String(),
        "rows": pl.UInt64(),
        "test": pl.UInt64(),  # largest hash of the test; null: it is empty
        "validation": pl.UInt64(),  # largest hash of the validation
    }
)
# With folds the test is a run of hashes, and the validation what follows it: another
# run, which may go on at the least hash.
RUNS = pl.Schema(
    {
        **THRESHOLDS,
        "after": pl.UInt64(),  # largest hash before the test; null: there is none
        "again": pl.UInt64(),  # largest hash of the validation that begins anew
    }
)
FOLDS = pl.Schema({"hash": pl.UInt64(), "split": pl.String()})  # of groups
# Between the values of a stratum: the unit separator of ASCII, made for it.
SEPARATOR = "\x1f"


@dataclass(frozen=True)
class _Shares(Step):
    """Base of the splits by shares."""

    test: float = 0.0
    validation: float = 0.0

    serves: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_range(self, "test", 0, 1)
        require_range(self, "validation", 0, 1 - self.test)
        if not self.test and not self.validation and not self._has_folds():
            raise DataError(
                "test and validation are both 0",
                where=type(self).__name__,
                remedy="give the share of one of them, such as test=0.2",
            )

    def _has_folds(self) -> bool:
        return False

    def check(self, schema: pl.Schema) -> pl.Schema:
        return _with_split(self, schema)


@dataclass(frozen=True)
class _Folds(_Shares):
    """Base of the splits whose test may be one of several folds."""

    folds: int | None = field(default=None, kw_only=True)
    fold: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        folding.check(self)

    def _has_folds(self) -> bool:
        return self.folds is not None


@dataclass(frozen=True)
class Split(_Folds, Fitted):
    """Split rows at random, in exact shares or equal folds.

    Of n rows, round(n test) are in the test and round(n validation) in the validation,
    or what is left; with `stratify` this holds for each class up to one row. With
    `folds`, each row is in the test of one fold; their sizes differ by one row at most,
    and those of each class in them too.

    Args:
      test: share of the rows, from 0 to 1.
      validation: share of the rows.
      stratify: names of columns whose values are the classes; none: no classes.
      seed: another one makes another split.
      folds: the test is one of so many equal parts, in place of a share.
      fold: which one, from 0.
    """

    stratify: str | Sequence[str] = ()
    seed: int = 0

    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        names = (
            listed(
                self.stratify,
                "stratify",
            )
            if self.stratify
            else ()
        )
        object.__setattr__(self, "stratify", names)

    def writes(self) -> Sequence[str]:
        return [SPLIT]

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.stratify, KEY)
        return super().check(schema)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        hashes = table.select(
            _stratum(self.stratify, table).alias("stratum"),
            hashing.of_row(self.seed).alias("hash"),
            pl.lit(1).alias("rows"),
        )
        return hashes.cast(HASHES).sort("stratum", "hash")

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return _limited(
            self,
            pl.concat(partials).sort("stratum", "hash"),
        )

    def finish(self, partial: Partial) -> State:
        strata = partial.partition_by("stratum", maintain_order=True)
        sizes = [len(rows) for rows in strata]
        _check_rows(self, sum(sizes))
        if self.folds is not None:
            return self._runs(strata)
        test = _apportioned(sizes, self.test)
        validation = _apportioned(sizes, self.validation)
        rows = []
        for table, tested, validated in zip(
            strata,
            test,
            validation,
            strict=True,
        ):
            hashes = table["hash"]
            last = min(tested + validated, len(hashes))
            rows.append(
                {
                    "stratum": table["stratum"][0],
                    "rows": len(hashes),
                    "test": hashes[tested - 1] if tested else None,
                    "validation": hashes[last - 1] if last else None,
                }
            )
        return pl.DataFrame(rows, schema=THRESHOLDS)

    def _runs(self, strata: list[pl.DataFrame]) -> pl.DataFrame:
        """Return the hashes between which the rows of a fold lie, for each class."""
        assert self.folds is not None
        sizes = [len(rows) for rows in strata]
        folding.check_enough(self, sum(sizes), "rows")
        tests = folding.runs(sizes, self.folds, self.fold)
        validated = _apportioned(sizes, self.validation)
        rows = []
        for table, test, count in zip(strata, tests, validated, strict=True):
            hashes = table["hash"]
            next_run, first_run = folding.after(test, len(hashes), count)
            rows.append(
                {
                    "stratum": table["stratum"][0],
                    "rows": len(hashes),
                    "after": hashes[test.start - 1] if test.start else None,
                    "test": hashes[test.stop - 1] if test.stop else None,
                    "validation": hashes[next_run.stop - 1] if next_run.stop else None,
                    "again": hashes[first_run.stop - 1] if first_run.stop else None,
                }
            )
        return pl.DataFrame(rows, schema=RUNS)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        stratum = _stratum(self.stratify, table)
        row = hashing.of_row(self.seed)
        is_test = row <= _threshold(stratum, state, "test")
        is_validation = row <= _threshold(stratum, state, "validation")
        if self.folds is not None:
            is_before = row <= _threshold(stratum, state, "after")
            is_again = row <= _threshold(stratum, state, "again")
            # a run that does not exist ends at a null, of which nothing is known
            is_before = is_before.fill_null(False)
            is_test = is_test & ~is_before
            is_validation = is_validation & ~is_before | is_again
        return Outcome(
            table.with_columns(
                _split(
                    is_test,
                    is_validation,
                )
            )
        )


@dataclass(frozen=True)
class SplitByGroup(_Folds, Fitted):
    """Split groups of rows at random: all rows of a group are in one split.

    The shares, of rows, are those that are nearest to the wanted ones; each split has a
    group at least. Rows without a group are a group. With `folds`, each group is in the
    test of one fold, and the folds have about as many rows.

    Args:
      test: share of the rows, from 0 to 1.
      validation: share of the rows.
      group: names of columns whose values say the group.
      seed: another one makes another split.
      folds: the test is one of so many parts, in place of a share.
      fold: which one, from 0.
    """

    group: str | Sequence[str] = ()
    seed: int = 0

    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(
            self,
            "group",
            listed(self.group, "group"),
        )

    def writes(self) -> Sequence[str]:
        return [SPLIT]

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.group, KEY)
        return super().check(schema)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        types = table.collect_schema()
        group = hashing.of_values(
            self.group,
            types,
            self.seed,
        ).alias("hash")
        count = pl.len().alias("rows")
        rows = table.select(group).group_by("hash").agg(count)
        stratum = pl.lit(None).alias("stratum")
        return (
            rows.select(
                stratum,
                "hash",
                "rows",
            )
            .cast(HASHES)
            .sort("hash")
        )

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        groups = pl.concat(partials).group_by(
            "stratum",
            "hash",
        )
        return _limited(
            self,
            groups.agg(pl.col("rows").sum()).sort("hash"),
        )

    def finish(self, partial: Partial) -> State:
        sizes = partial["rows"].to_numpy()
        _check_rows(self, sizes.sum())
        if self.folds is not None:
            return self._fold(partial["hash"], sizes)
        tested, taken = _cut(self, sizes, "groups")
        hashes = partial["hash"]
        return pl.DataFrame(
            {
                "stratum": [None],
                "rows": [int(sizes.sum())],
                "test": [hashes[tested - 1] if tested else None],
                "validation": [hashes[taken - 1]],
            },
            schema=THRESHOLDS,
        )

    def _fold(self, hashes: pl.Series, sizes: np.ndarray) -> pl.DataFrame:
        """Return the groups that are in the test or the validation of a fold."""
        assert self.folds is not None
        folding.check_enough(self, len(sizes), "groups")
        is_test = folding.of_groups(sizes, self.folds) == self.fold
        others = np.flatnonzero(~is_test)
        wanted = self.validation * sizes.sum()
        before = np.cumsum(sizes[others]) - sizes[others]
        chosen = others[before < wanted]
        if len(chosen) == len(others):
            raise DataError(
                "the groups besides the test's all go to the validation",
                where=type(self).__name__,
                remedy="give a smaller validation, or fewer folds",
            )
        validated = hashes.gather(chosen)
        splits = [(hashes.filter(pl.Series(is_test)), "test")]
        splits.append((validated, "validation"))
        tables = [
            pl.DataFrame({"hash": chosen, "split": [name] * len(chosen)}, schema=FOLDS)
            for chosen, name in splits
        ]
        return pl.concat(tables)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        types = table.collect_schema()
        group = hashing.of_values(
            self.group,
            types,
            self.seed,
        )
        if self.folds is not None:
            parts = {
                name: group.is_in(rows["hash"].implode())
                for (name,), rows in state.group_by("split")
            }
            is_test = parts["test"]
            is_validation = parts.get("validation", pl.lit(False))
            return Outcome(table.with_columns(_split(is_test, is_validation)))
        is_test = group <= pl.lit(
            state["test"].item(),
            dtype=pl.UInt64,
        )
        is_validation = group <= pl.lit(
            state["validation"].item(),
            dtype=pl.UInt64,
        )
        return Outcome(
            table.with_columns(
                _split(
                    is_test,
                    is_validation,
                )
            )
        )


@dataclass(frozen=True)
class SplitByTime(_Shares, Fitted):
    """Split by time: the test has the latest rows, the validation those before them.

    Rows of the same time stay together; the shares, of rows, are those that are nearest
    to the wanted ones. Rows without a time go to train, and are flagged.

    Args:
      test: share of the rows, from 0 to 1.
      validation: share of the rows.
      column: name of a column of dates or of numbers.
    """

    column: str = ""

    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def writes(self) -> Sequence[str]:
        return [SPLIT]

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, [self.column], POSITION)
        return super().check(schema)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        position = position_of(
            self.column,
            table.collect_schema()[self.column],
        )
        rows = table.select(position.alias(self.column))
        return statistics.value_counts(rows, [self.column])

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        return statistics.merged_counts(partials, self)

    def finish(self, partial: Partial) -> State:
        latest = partial.sort("value", descending=True)
        sizes = latest["count"].to_numpy()
        _check_rows(self, sizes.sum())
        tested, taken = _cut(self, sizes, "times")
        times = latest["value"]
        return pl.DataFrame(
            {
                "test": [times[tested - 1] if tested else None],
                "validation": [times[taken - 1]],
            },
            schema={
                "test": pl.Float64(),
                "validation": pl.Float64(),
            },
        )

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        assert state is not None
        position = position_of(
            self.column,
            table.collect_schema()[self.column],
        )
        is_test = position >= pl.lit(
            state["test"].item(),
            dtype=pl.Float64,
        )
        is_validation = position >= pl.lit(state["validation"].item())
        return _split_by_time(
            table,
            self.column,
            position,
            is_test,
            is_validation,
        )


@dataclass(frozen=True)
class SplitAt(Step):
    """Split at dates, or at numbers, that are given.

    Rows without a value go to train, and are flagged.

    Args:
      column: name of a column of dates or of numbers.
      test: rows from there on are the test: a date such as "2016-01-31" or
        "2016-01-31 12:00", or a number.
      validation: rows from there on, and before the test, are the validation; None:
        there is no validation.
    """

    column: str
    test: str | float
    validation: str | float | None = None

    serves: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        test = _position(self, self.test)
        if self.validation is None:
            return
        if not _position(self, self.validation) < test:
            raise DataError(
                f"the validation begins at {self.validation}, the test at {self.test}",
                where="SplitAt",
                remedy="let the validation begin before the test",
            )

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, [self.column], POSITION)
        is_date = schema[self.column].is_temporal()
        for value in (self.test, self.validation):
            if value is not None and isinstance(value, str) != is_date:
                raise DataError(
                    f"the column {self.column!r} has the type {schema[self.column]},"
                    f" but it is to be split at {value!r}",
                    where="SplitAt",
                    remedy='give a date such as "2016-01-31" for dates, else a number',
                )
        return _with_split(self, schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        position = position_of(
            self.column,
            table.collect_schema()[self.column],
        )
        is_test = position >= _position(self, self.test)
        is_validation = pl.lit(False)
        if self.validation is not None:
            is_validation = position >= _position(self, self.validation)
        return _split_by_time(
            table,
            self.column,
            position,
            is_test,
            is_validation,
        )


@dataclass(frozen=True)
class SplitByHash(_Folds):
    """Split by the values of columns: the same values are in the same split, for ever.

    New rows move no others. The shares are met as chance has it: of n different values
    the test has n test, give or take two or three times sqrt(n test (1 - test)). With
    `folds`, the same values are in the test of the same fold, for ever.

    Args:
      test: share of the values, from 0 to 1.
      validation: share of the values.
      columns: names of the columns.
      seed: another one makes another split.
      folds: the test is one of so many parts, in place of a share.
      fold: which one, from 0.
    """

    columns: str | Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        list_columns(self)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, KEY)
        return super().check(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        value = hashing.of_values(
            self.columns,
            table.collect_schema(),
            self.seed,
        )
        first = 0.0
        last = self.test
        if self.folds is not None:
            first = self.fold / self.folds
            last = (self.fold + 1) / self.folds
        is_before = hashing.is_below(value, first)
        is_test = hashing.is_below(value, last) & ~is_before
        end = last + self.validation
        is_validation = hashing.is_below(value, end) & ~is_before
        if end > 1:
            # it goes on at the least hash
            is_validation = is_validation | hashing.is_below(value, end - 1)
        return Outcome(
            table.with_columns(
                _split(
                    is_test,
                    is_validation,
                )
            )
        )


@dataclass(frozen=True)
class SplitBySource(Step):
    """Split by source, for data that comes in files of training and of test.

    Args:
      test: numbers of the sources that are the test, from 0 in the order of the
        preparation's sources.
      validation: numbers of those that are the validation.
    """

    test: Sequence[int]
    validation: Sequence[int] = ()

    serves: ClassVar[bool] = False
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "test", tuple(self.test))
        object.__setattr__(self, "validation", tuple(self.validation))
        both = sorted(set(self.test) & set(self.validation))
        if both:
            raise DataError(
                f"source {both[0]} is both test and validation",
                where="SplitBySource",
                remedy="name each source once",
            )

    def check(self, schema: pl.Schema) -> pl.Schema:
        return _with_split(self, schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        source = pl.col(SOURCE).cast(pl.Int64)
        is_test = source.is_in(
            pl.Series(
                self.test,
                dtype=pl.Int64,
            ).implode()
        )
        named = pl.Series(
            self.validation,
            dtype=pl.Int64,
        ).implode()
        return Outcome(
            table.with_columns(
                _split(
                    is_test,
                    source.is_in(named),
                )
            )
        )


def position_of(name: str, dtype: pl.DataType) -> pl.Expr:
    """Return the microseconds of dates since 1970, or numbers as they are; Float64.

    Dates without a zone count as UTC's.
    """
    if dtype == pl.Date or dtype == pl.Datetime:
        moment = pl.col(name)
        if dtype == pl.Date:
            moment = moment.cast(pl.Datetime("us"))
        return moment.dt.timestamp("us").cast(pl.Float64)
    return statistics.number(name)


# ---- internals ----


def _with_split(step: Any, schema: pl.Schema) -> pl.Schema:
    require_free(step, schema, [SPLIT])
    return pl.Schema({**schema, SPLIT: pl.String()})


def _split(is_test: pl.Expr, is_validation: pl.Expr) -> pl.Expr:
    """Return SPLIT; null is no."""
    train = pl.lit("train")
    validation = pl.lit("validation")
    test = pl.lit("test")
    rest = pl.when(is_validation).then(validation).otherwise(train)
    return pl.when(is_test).then(test).otherwise(rest).alias(SPLIT)


def _split_by_time(
    table: pl.LazyFrame,
    column: str,
    position: pl.Expr,
    is_test: pl.Expr,
    is_validation: pl.Expr,
) -> Outcome:
    missing = fault(column, position.is_null(), "no time: goes to train")
    return Outcome(
        table.with_columns(_split(is_test, is_validation)),
        noted(table, "flagged", [missing]),
    )


def _stratum(columns: Sequence[str], table: pl.LazyFrame) -> pl.Expr:
    """Return the spelling of the class of each row; null without columns."""
    if not columns:
        return pl.lit(None, dtype=pl.String)
    types = table.collect_schema()
    # Missing is a value: the unit separator alone is no spelling of another.
    texts = [
        text_of(
            name,
            types[name],
        ).fill_null(SEPARATOR + "missing")
        for name in columns
    ]
    return pl.concat_str(texts, separator=SEPARATOR)


def _threshold(
    stratum: pl.Expr,
    state: pl.DataFrame,
    split: str,
) -> pl.Expr:
    if state["stratum"].is_null().all():
        return pl.lit(
            state[split].item(),
            dtype=pl.UInt64,
        )
    return stratum.replace_strict(
        state["stratum"],
        state[split],
        default=None,
        return_dtype=pl.UInt64,
    )


def _apportioned(sizes: Sequence[int], share: float) -> list[int]:
    """Divide round(share n) among parts of `sizes`, by the largest remainders.

    Each part gets its share, rounded down or up; of equal remainders the first part's
    counts as larger.
    """
    quotas = [size * share for size in sizes]
    counts = [math.floor(quota) for quota in quotas]
    left = round(sum(sizes) * share) - sum(counts)

    def remainder(part: int) -> float:
        return counts[part] - quotas[part]

    for part in sorted(
        range(len(sizes)),
        key=remainder,
    )[:left]:
        counts[part] += 1
    return counts


def _cut(
    step: Any,
    sizes: np.ndarray,
    what: str,
) -> tuple[int, int]:
    """Return how many of the first parts are the test, and how many test or validation.

    Raises:
      DataError: a split would have no part.
    """
    ends = np.cumsum(sizes).astype(np.float64)
    wanted = [step.test, step.validation, 1 - step.test - step.validation]
    splits = sum(share > 0 for share in wanted)
    if splits > len(ends):
        raise DataError(
            f"there are {len(ends)} {what}, fewer than splits",
            where=type(step).__name__,
            remedy=f"give more {what}, or another split",
        )

    # Each split that comes after has a part at least.
    tested = 0
    if step.test:
        splits -= 1
        tested = _nearest_end(
            ends,
            0,
            len(ends) - splits,
            step.test,
        )
    if not step.validation:
        return tested, tested
    splits -= 1
    both = step.test + step.validation
    return tested, _nearest_end(
        ends,
        tested,
        len(ends) - splits,
        both,
    )


def _nearest_end(
    ends: np.ndarray,
    start: int,
    stop: int,
    share: float,
) -> int:
    """Return the count of parts whose end is nearest to a share: start + 1 to stop."""
    distance = np.abs(ends[start:stop] - share * ends[-1])
    return start + 1 + int(np.argmin(distance))


def _check_rows(step: Any, count: int) -> None:
    if count == 0:
        raise DataError(
            "there is no row to split",
            where=type(step).__name__,
            remedy="look at the notes of the steps before it, which dropped all rows",
        )


def _limited(step: Any, table: pl.DataFrame) -> pl.DataFrame:
    if len(table) > MOST_HASHES:
        raise DataError(
            f"there are {len(table)} rows or groups; exact shares need at most"
            f" {MOST_HASHES}",
            where=type(step).__name__,
            remedy="use SplitByHash, which holds none",
        )
    return table


def _position(step: Any, value: str | float) -> float:
    """Return a date, or a number, as `position_of` does."""
    if not isinstance(value, str):
        return float(value)
    try:
        day = datetime.datetime.fromisoformat(value)
    except ValueError as error:
        raise DataError(
            f"{value!r} is no date",
            where=type(step).__name__,
            remedy='write it as "2016-01-31" or "2016-01-31 12:00"',
        ) from error
    if day.tzinfo is None:
        day = day.replace(tzinfo=datetime.UTC)
    start = datetime.datetime(
        1970,
        1,
        1,
        tzinfo=datetime.UTC,
    )
    return float((day - start) // datetime.timedelta(microseconds=1))

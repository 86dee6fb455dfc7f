"""Dates as features: their parts, parts on a circle, and time since a date."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import polars as pl

from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    DAY,
    list_columns,
    require,
    require_free,
)
from lepton_jax.errors import DataError, nearest

# Parts of a date, and on a circle how many there are of each; None: no circle.
PERIODS: dict[str, float | None] = {
    "year": None,
    "quarter": 4,
    "month": 12,
    "week": 52.1775,  # 365.2425 days / 7, the mean of the Gregorian calendar
    "day": 31,
    "day_of_year": 365.2425,
    "day_of_week": 7,
    "hour": 24,
    "minute": 60,
    "second": 60,
}
TIMES = ("hour", "minute", "second")  # parts that a date without a time has not
FROM_ZERO = (*TIMES,)  # parts that count from 0; the others do from 1
MICROSECONDS_A_DAY = 24 * 60 * 60 * 1_000_000
EPOCH = datetime.datetime(
    1970,
    1,
    1,
    tzinfo=datetime.UTC,
)


@dataclass(frozen=True)
class DateFeatures(Step):
    """Add features of dates: for a column x, say, x_year, x_month and x_day_of_week.

    A date with a time zone has the parts of the local time there. The parts of a
    missing date are missing.

    Args:
      columns: names of columns of dates.
      parts: of "year", "quarter", "month", "week" (ISO), "day", "day_of_year",
        "day_of_week" (1 is Monday), "hour", "minute", "second": Int32 columns.
      cyclic: parts, all but the year, each of which becomes x_month_sin and
        x_month_cos, Float32: a point on the unit circle, so that December is next to
        January.
      since: a date such as "2020-01-31", or the name of another column of dates:
        x_elapsed is the time since then in days, Float64; None: no such column.
    """

    columns: str | Sequence[str]
    parts: Sequence[str] = ("year", "month", "day", "day_of_week")
    cyclic: Sequence[str] = ()
    since: str | None = None

    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        list_columns(self)
        object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "cyclic", tuple(self.cyclic))
        circles = [part for part, period in PERIODS.items() if period is not None]
        _check_words("parts", self.parts, list(PERIODS))
        _check_words("cyclic", self.cyclic, circles)

    def check(self, schema: pl.Schema) -> pl.Schema:
        require(self, schema, self.columns, DAY)
        if self.since is not None and _day(self.since) is None:
            require(self, schema, [self.since], DAY)
        self._check_times(schema)
        added: dict[str, pl.DataType] = {}
        for name in self.columns:
            for part in self.parts:
                added[f"{name}_{part}"] = pl.Int32()
            for part in self.cyclic:
                added[f"{name}_{part}_sin"] = pl.Float32()
                added[f"{name}_{part}_cos"] = pl.Float32()
            if self.since is not None:
                added[f"{name}_elapsed"] = pl.Float64()
        require_free(self, schema, added)
        return pl.Schema({**schema, **added})

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        types = table.collect_schema()
        features = []
        for name in self.columns:
            features += self._features(name, types)
        return Outcome(table.with_columns(features))

    def _features(
        self,
        name: str,
        types: pl.Schema,
    ) -> list[pl.Expr]:
        moment = _moment(name, types[name])
        features = [
            _part(
                moment,
                part,
            )
            .cast(pl.Int32)
            .alias(f"{name}_{part}")
            for part in self.parts
        ]
        for part in self.cyclic:
            angle = _angle(moment, part)
            sine = angle.sin().cast(pl.Float32)
            cosine = angle.cos().cast(pl.Float32)
            features.append(sine.alias(f"{name}_{part}_sin"))
            features.append(cosine.alias(f"{name}_{part}_cos"))
        if self.since is not None:
            elapsed = _microseconds(
                name,
                types[name],
            ) - self._start(types)
            days = elapsed.cast(pl.Float64) * (1 / MICROSECONDS_A_DAY)
            features.append(days.alias(f"{name}_elapsed"))
        return features

    def _start(self, types: pl.Schema) -> pl.Expr:
        """Return the microseconds from 1970 to `since`."""
        assert self.since is not None
        day = _day(self.since)
        if day is None:
            return _microseconds(self.since, types[self.since])
        if day.tzinfo is None:
            day = day.replace(tzinfo=datetime.UTC)
        return pl.lit((day - EPOCH) // datetime.timedelta(microseconds=1))

    def _check_times(self, schema: pl.Schema) -> None:
        wanted = [part for part in (*self.parts, *self.cyclic) if part in TIMES]
        for name in self.columns:
            if wanted and schema[name] == pl.Date:
                raise DataError(
                    f"the column {name!r} has dates without a time, so there is no"
                    f" {wanted[0]}",
                    where="DateFeatures",
                    remedy=f"leave {', '.join(wanted)} out, or cast the column to"
                    " datetime with CheckSchema before",
                )


# ---- internals ----


def _check_words(
    argument: str,
    words: Sequence[str],
    known: Sequence[str],
) -> None:
    for word in words:
        if word not in known:
            raise DataError(
                f"{argument} has {word!r}{nearest(word, known)}",
                where="DateFeatures",
                remedy=f"use some of {', '.join(known)}",
            )


def _day(text: str) -> datetime.datetime | None:
    """Return the date that a text spells; None: it spells none."""
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return None


def _moment(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if dtype in (pl.Null, pl.Date):
        return column.cast(pl.Datetime("us"))
    return column


def _part(moment: pl.Expr, part: str) -> pl.Expr:
    if part == "day_of_week":
        return moment.dt.weekday()
    if part == "day_of_year":
        return moment.dt.ordinal_day()
    return getattr(moment.dt, part)()


def _angle(moment: pl.Expr, part: str) -> pl.Expr:
    period = PERIODS[part]
    assert period is not None
    first = 0 if part in FROM_ZERO else 1
    return (
        _part(
            moment,
            part,
        ).cast(pl.Float64)
        - first
    ) * (2 * math.pi / period)


def _microseconds(name: str, dtype: pl.DataType) -> pl.Expr:
    """Return the microseconds from 1970 to a date, Int64."""
    return _moment(name, dtype).dt.timestamp("us")

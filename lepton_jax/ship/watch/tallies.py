"""Counting a server's rows beside its work.

A request's rows are put in a short line; a thread of low duty turns them into a table
each half second, counts it and forgets it. A server that is asked for more rows than
the line holds counts a sample of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime
from threading import Lock
from typing import Any

import numpy as np
import polars as pl

from lepton_jax.data.prepare.profile import ColumnProfile
from lepton_jax.ship.watch.reference import LARGEST, Reference, summaries
from lepton_jax.ship.watch.window import Moved, Window

# Rows and bytes that wait to be counted. Assumptions: a window is filled in a second,
# and sixteen megabytes are no part of a server's memory.
LONGEST_LINE = 2_048
LARGEST_LINE = 16 * 2**20
# Cells that wait: reading and counting so many takes some 15 ms of each half second
# (by time.thread_time, 16 columns on the machine of our figures).
MOST_CELLS = 32_000

Waiting = tuple[int, Any]  # count of rows, and they


class Tallies:
    """The rows of one model that wait to be counted, and the window of those that were.

    Args:
      reference: the rows of training.
      window: where they are counted; None: one of the usual size.
    """

    def __init__(
        self,
        reference: Reference,
        window: Window | None = None,
    ) -> None:
        self.reference = reference
        self.window = window or Window(reference)
        self.skipped = 0
        columns = max(1, len(reference.profile.columns))
        self._longest = max(1, min(LONGEST_LINE, MOST_CELLS // columns))
        self._waiting: deque[Waiting] = deque()
        self._rows = 0
        self._bytes = 0
        self._put = Lock()
        self._count = Lock()

    def add_rows(self, raw: Any) -> None:
        """Put raw rows in line; those of a model of arrays are its arrays."""
        if self.reference.arrays:
            if _are_arrays(raw):
                self.add_arrays(raw)
            return
        rows = _rows_of(raw)
        if rows and not self._is_known(raw):
            self.skipped += rows  # tensors that somebody else prepared
            return
        self._add(rows, 0, raw)

    def add_arrays(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Put input arrays in line; of a model of raw rows they mean nothing."""
        if self.reference.arrays:
            size = sum(array.nbytes for array in inputs.values())
            rows = max((len(array) for array in inputs.values()), default=0)
            self._add(rows, size, inputs)

    def count(self) -> None:
        """Count what waits."""
        with self._count:
            with self._put:
                waiting = list(self._waiting)
                self._waiting.clear()
                self._rows = 0
                self._bytes = 0
            for _, rows in waiting if self.reference.arrays else ():
                self.window.count(self._table(summaries(rows)))
            if waiting and not self.reference.arrays:
                self.window.count(self._joined([rows for _, rows in waiting]))

    def moved(self) -> list[Moved]:
        """Count what waits, and compare the window with training."""
        self.count()
        with self._count:
            return self.window.moved()

    @property
    def counted(self) -> int:
        """Rows in the window."""
        with self._count:
            return self.window.counted

    # ---- internals ----

    def _is_known(self, raw: Any) -> bool:
        """Whether rows have any column of the reference."""
        names: Any = raw if isinstance(raw, Mapping) else None
        if names is None:
            names = raw.columns if isinstance(raw, pl.DataFrame) else raw[0]
        return any(name in names for name in self.reference.profile.columns)

    def _add(
        self,
        rows: int,
        size: int,
        waiting: Any,
    ) -> None:
        with self._put:
            is_full = self._rows >= self._longest or self._bytes >= LARGEST_LINE
            if is_full or not rows:
                self.skipped += rows
                return
            self._waiting.append((rows, waiting))
            self._rows += rows
            self._bytes += size

    def _joined(self, requests: Sequence[Any]) -> pl.DataFrame:
        """Return the rows of requests as one table of the reference's columns."""
        columns = self.reference.profile.columns
        requests = _merged(requests)
        series = []
        for name, column in columns.items():
            values: list[Any] = []
            for raw in requests:
                values += _cells(raw, name)
            series.append(_series(name, values, column))
        return pl.DataFrame(series)

    def _table(self, table: pl.DataFrame) -> pl.DataFrame:
        """Return a table with the columns of the reference, missing ones empty."""
        return table.select(
            pl.col(name) if name in table.columns else pl.lit(None).alias(name)
            for name in self.reference.profile.columns
        )


def _are_arrays(raw: Any) -> bool:
    if not isinstance(raw, Mapping):
        return False
    return all(isinstance(values, np.ndarray) for values in raw.values())


def _rows_of(raw: Any) -> int:
    if isinstance(raw, Mapping):
        return max((len(values) for values in raw.values()), default=0)
    return len(raw)


def _merged(requests: Sequence[Any]) -> list[Any]:
    """Return requests with all those that are lists of rows as one."""
    rows: list[Any] = []
    others = []
    for raw in requests:
        if isinstance(raw, list):
            rows += raw
        elif isinstance(raw, pl.DataFrame):
            others.append(raw.to_dict(as_series=False))
        else:
            others.append(raw)
    return [rows, *others] if rows else others


def _cells(raw: Any, name: str) -> list[Any]:
    """Return a column of raw rows; missing cells where there is no such column."""
    if isinstance(raw, Mapping):
        values = raw.get(name)
        return [None] * _rows_of(raw) if values is None else list(values)
    return [row.get(name) for row in raw]


def _series(
    name: str,
    values: list[Any],
    column: ColumnProfile,
) -> pl.Series:
    """Return cells as their column's kind is counted; what can't be one is missing."""
    read, dtype = READERS[column.kind]
    return pl.Series(name, [read(value) for value in values], dtype)


def _word(value: Any) -> str | None:
    """Return a cell as Polars writes a category."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return str(value)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if math.isnan(number):
        return None
    return min(max(number, -LARGEST), LARGEST)


def _time(value: Any) -> datetime | None:
    """Return a time without its zone, as columns of times have it."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return value.replace(tzinfo=None)
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day)
    return None


def _bytes(value: Any) -> bytes | None:
    return value if isinstance(value, bytes) else None


def _list(value: Any) -> list[int] | None:
    """Return a list as long as a cell, of which the length alone is counted."""
    if isinstance(value, list | tuple | np.ndarray):
        return [0] * np.size(value)
    return None


# How a cell is read, by the kind of its column in a profile.
READERS: dict[str, tuple[Callable[[Any], Any], Any]] = {
    "number": (_number, pl.Float64),
    "category": (_word, pl.String),
    "text": (_word, pl.String),
    "time": (_time, pl.Datetime("us")),
    "bytes": (_bytes, pl.Binary),
    "list": (_list, pl.List(pl.Int8)),
}

"""The rows that a server saw lately, as counts.

    5,000 rows, in ten parts of 500; the oldest part falls out as a new one begins

    part     0      1      2    ...     9
    age    [3 9 4] [2 8 5] [4 7 4]    [1 2 0]      rows in each bin of training's
    job    [7 1 0] ...                             rows with each word, with others
    job        2      0      1    ...     0        rows with a word never seen

A part holds nothing else: no value of any row, and no word that training did not have.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import polars as pl
from scipy.stats import binom

from lepton_jax.data.prepare.drift import SIGNIFICANT, Drift, drift
from lepton_jax.data.prepare.profile import ColumnProfile, Profile, profile
from lepton_jax.ship.watch.reference import Reference

# Rows of a window: enough to tell a population stability index of 0.1 from noise, which
# is (bins - 1) / rows. Assumption; `python -m tools.drift` says what it finds.
ROWS = 5_000
PARTS = 10
# Seconds after which a part no longer counts. Assumption: a day's rows are one season.
LONGEST = 86_400.0
# Shares of rows above training's that matter, of missing cells and of words that
# training never saw. Assumptions: a filled-in cell misleads a model less than a word
# that stands for nothing.
MISSING_MATTERS = 0.05
UNSEEN_MATTERS = 0.02

LEVELS = {"none": 0, "small": 1, "large": 2}


@dataclass
class Part:
    """Counts of some rows.

    Attributes:
      counts: in the bins of the reference.
      unseen: rows by column whose word training never saw.
      began: when the first of them came, seconds.
    """

    counts: Profile
    unseen: Counter[str]
    began: float


@dataclass(frozen=True)
class Moved:
    """How far a column of the window has moved from training's.

    Attributes:
      column: its name.
      psi: population stability index.
      noise: the index that this many rows have without any drift.
      level: 0 for none, 1 for a small drift (the true index is above 0.1), 2 for a
        large one (above 0.25); each is wrong once in a thousand times.
      missing: share of missing cells, in the window and in training.
      is_missing: whether more cells are missing than in training, by 5 points.
      unseen: share of rows with a word that training never saw; None: not known.
      is_unseen: whether that is more than 2 points.
    """

    column: str
    psi: float
    noise: float
    level: int
    missing: tuple[float, float]
    is_missing: bool
    unseen: float | None
    is_unseen: bool

    @property
    def alarms(self) -> dict[str, bool]:
        """Whether a person must look, by what has moved."""
        return {
            "distribution": self.level > 0,
            "missing": self.is_missing,
            "unseen": self.is_unseen,
        }


@dataclass
class Window:
    """The rows that were counted lately.

    Attributes:
      reference: the rows of training.
      rows: at most this many, give or take a part.
      clock: returns seconds.
    """

    reference: Reference
    rows: int = ROWS
    clock: Callable[[], float] = time.monotonic
    _parts: deque[Part] = field(default_factory=deque)

    def count(self, table: pl.DataFrame) -> None:
        """Count rows.

        Args:
          table: with all columns of the reference.
        """
        for piece in self._pieces(table):
            part = self._parts[-1]
            counts = profile(partial(list, [piece]), like=part.counts)
            part.counts = added(part.counts, counts)
            part.unseen.update(self._unseen(piece))

    @property
    def counted(self) -> int:
        """Rows in the window."""
        self._drop_old()
        return sum(part.counts.rows for part in self._parts)

    def moved(self) -> list[Moved]:
        """Compare the window with training, column by column, most moved first."""
        self._drop_old()
        if not self._parts:
            return []
        whole = Profile(0, self._empty())
        unseen: Counter[str] = Counter()
        for part in self._parts:
            whole = added(whole, part.counts)
            unseen.update(part.unseen)
        return [
            self._compared(one, whole, unseen)
            for one in drift(self.reference.profile, whole)
        ]

    # ---- internals ----

    def _pieces(self, table: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Yield rows that fit the newest part, which there is by then."""
        size = max(1, self.rows // PARTS)
        while table.height:
            self._drop_old()
            if not self._parts or self._parts[-1].counts.rows >= size:
                self._begin()
            room = size - self._parts[-1].counts.rows
            yield table.head(room)
            table = table.slice(room)

    def _begin(self) -> None:
        counts = Profile(0, self._empty())
        self._parts.append(Part(counts, Counter(), self.clock()))
        while len(self._parts) > PARTS:
            self._parts.popleft()

    def _empty(self) -> dict[str, ColumnProfile]:
        columns = self.reference.profile.columns
        return {name: column.empty() for name, column in columns.items()}

    def _drop_old(self) -> None:
        limit = self.clock() - LONGEST
        while self._parts and self._parts[0].began < limit:
            self._parts.popleft()

    def _unseen(self, table: pl.DataFrame) -> dict[str, int]:
        found = {}
        for name, words in self.reference.words.items():
            counts = Counter(table[name].drop_nulls().cast(pl.String).to_list())
            found[name] = sum(
                count for word, count in counts.items() if word not in words
            )
        return found

    def _compared(
        self,
        one: Drift,
        whole: Profile,
        unseen: Counter[str],
    ) -> Moved:
        column = whole.columns[one.column]
        its_unseen: float | None = None
        if one.column in self.reference.words:
            its_unseen = unseen[one.column] / column.rows
        before, _ = one.missing
        return Moved(
            column=one.column,
            psi=one.psi,
            noise=one.noise,
            level=LEVELS[one.verdict],
            missing=one.missing,
            is_missing=_is_above(
                column.missing,
                column.rows,
                before + MISSING_MATTERS,
            ),
            unseen=its_unseen,
            is_unseen=_is_above(
                unseen[one.column],
                column.rows,
                UNSEEN_MATTERS,
            ),
        )


def added(one: Profile, other: Profile) -> Profile:
    """Return the counts of two tables that were profiled with the same edges."""
    columns = {
        name: _added(column, other.columns[name])
        for name, column in one.columns.items()
    }
    return Profile(one.rows + other.rows, columns)


# ---- internals ----


def _added(one: ColumnProfile, other: ColumnProfile) -> ColumnProfile:
    whole = one.empty()
    whole.rows = one.rows + other.rows
    whole.missing = one.missing + other.missing
    whole.others = one.others + other.others
    whole.outliers = one.outliers + other.outliers
    whole.counts = _sums(one.counts, other.counts)
    whole.part_counts = _sums(one.part_counts, other.part_counts)
    whole.word_counts = _sums(one.word_counts, other.word_counts)
    return whole


def _sums(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip(one, other, strict=True)]


def _is_above(
    count: int,
    rows: int,
    share: float,
) -> bool:
    """Whether the true share is above one: a smaller one has as many once in 1,000."""
    chance = binom.sf(count - 1, rows, min(1.0, share))
    return bool(chance < SIGNIFICANT)

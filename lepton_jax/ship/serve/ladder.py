"""The compiled batch sizes of a model, and which of them to run next.

XLA compiles a program for one batch size. A batch of other rows is filled up to the
next size, or cut into several; the measured times decide:

    size      1      8     16        rows   cheapest   time
    time   1 ms   2 ms   6 ms           9   8, then 1  3 ms, rather than 16 in 6 ms
                                       12   8, then 8  4 ms
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping

EQUAL = 1e-6  # share by which times differ that are equal but for rounding


class Ladder:
    """Compiled sizes, by the time that each takes.

    Args:
      seconds: of a run, by compiled size; at least one.
    """

    def __init__(self, seconds: Mapping[int, float]):
        self.sizes = sorted(seconds)
        # a larger size that was quicker than a smaller one was so by chance
        quickest = itertools.accumulate((seconds[size] for size in self.sizes), max)
        self.seconds = dict(zip(self.sizes, quickest, strict=True))
        self.largest = self.sizes[-1]
        self.best = min(self.sizes, key=lambda size: self.seconds[size] / size)
        self._first: list[int] = [0]
        self._total: list[float] = [0.0]
        for rows in range(1, self.largest + 1):
            self._add(rows)

    def first(self, rows: int) -> int:
        """Return the size to run now, for the least time until all rows are done.

        Args:
          rows: that wait; at least one.
        """
        if rows > self.largest:
            return self.best
        return self._first[rows]

    def around(self, rows: int) -> int:
        """Return the smallest size that holds all of some rows, at most the largest."""
        return self.sizes[bisect.bisect_left(self.sizes, rows)]

    def is_quick(self, size: int, seconds: float) -> bool:
        """Whether a run of a size takes no longer than some seconds."""
        return self.seconds[size] <= seconds

    def total(self, rows: int) -> float:
        """Return the seconds that it takes to run some rows."""
        whole = max(0, -(-(rows - self.largest) // self.best))
        rest = rows - whole * self.best
        return whole * self.seconds[self.best] + self._total[rest]

    # ---- internals ----

    def _add(self, rows: int) -> None:
        """Find the cheapest way to run this many rows; that of fewer is known."""
        totals = {
            size: self.seconds[size] + self._total[max(0, rows - size)]
            for size in self.sizes
        }
        least = min(totals.values())
        # of equal ways the one that gives more rows their answer first
        equal = [size for size in self.sizes if totals[size] <= least * (1 + EQUAL)]
        self._first.append(equal[-1])
        self._total.append(totals[equal[-1]])

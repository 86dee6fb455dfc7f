"""The compiled batch sizes of a model, and which of them to run next.

XLA compiles a program for one batch size. A batch of other rows is filled up to the
next size, or cut into several; the measured times decide:

    size      1      8     16        rows   cheapest   time
    time   1 ms   2 ms   6 ms           9   8, then 1  3 ms, rather than 16 in 6 ms
                                       12   8, then 8  4 ms
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping


class Ladder:
    """Compiled sizes, by the time that each takes.

    Args:
      seconds: of a run, by compiled size; at least one.
    """

    def __init__(self, seconds: Mapping[int, float]):
        self.sizes = sorted(seconds)
        self.seconds = dict(seconds)
        self.largest = self.sizes[-1]
        self.best = min(self.sizes, key=lambda size: seconds[size] / size)
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
        """Return the quickest size that holds all of some rows, at most the largest."""
        start = bisect.bisect_left(self.sizes, rows)
        return min(self.sizes[start:], key=self.seconds.__getitem__)

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
        # of two equal ways the one that gives more rows their answer first
        first = min(totals, key=lambda size: (totals[size], -size))
        self._first.append(first)
        self._total.append(totals[first])

"""Which source each position of a mixture takes its sample from."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, nearest

PERIOD = 2**16  # positions up to which a pattern is computed whole, once
AHEAD = 2**10  # positions that a longer pattern is computed ahead


class Pattern:
    """The fixed sequence in which sources take turns: after any t positions, source i
    had w_i t / W of them, within 1.

    Source i's j-th sample is due in the positions from floor((j - 1) W / w_i) to before
    ceil(j W / w_i), W the sum of the weights; each position goes to the sample whose
    last chance comes first. That such a sequence exists, and that this rule finds it,
    is Baruah, Cohen, Plaxton and Varvel 1996, "Proportionate progress", for one
    processor. Random draws would wander from the proportions by sqrt(t), and batches
    would differ in their mixture by chance.

    The choice at a position depends on how many samples each source has given before
    it, and on nothing else.
    """

    def __init__(self, weights: Sequence[int]):
        self.weights = list(weights)
        self.total = sum(weights)
        self._period = (
            self._after([0] * len(weights), self.total)
            if self.total <= PERIOD
            else None
        )
        self._ahead = np.empty(0, np.int16)
        self.taken = [0] * len(weights)

    def peek(self, count: int) -> np.ndarray:
        """The next `count` choices, int16 (count,)."""
        if self._period is not None:
            return np.take(
                self._period,
                np.arange(count) + sum(self.taken) % self.total,
                mode="wrap",
            )
        if count > len(self._ahead):
            known = np.bincount(self._ahead, minlength=len(self.weights)).tolist()
            taken = [a + b for a, b in zip(self.taken, known, strict=True)]
            more = self._after(taken, max(count - len(self._ahead), AHEAD))
            self._ahead = np.concatenate([self._ahead, more])
        return self._ahead[:count]

    def advance(self, count: int) -> list[int]:
        """How many of the next `count` positions each source has; these are
        consumed.
        """
        counts = np.bincount(self.peek(count), minlength=len(self.weights)).tolist()
        self._ahead = self._ahead[count:]
        self.taken = [a + b for a, b in zip(self.taken, counts, strict=True)]
        return counts

    def restore(self, taken: Sequence[int]) -> None:
        self.taken = list(taken)
        self._ahead = np.empty(0, np.int16)

    def _after(
        self,
        taken: Sequence[int],
        count: int,
    ) -> np.ndarray:
        total = self.total
        weights = self.weights
        start = sum(taken)
        given = list(taken)
        due = [
            (-(-(n + 1) * total // w), i)
            for i, (n, w) in enumerate(zip(given, weights, strict=True))
            if n * total // w <= start
        ]
        later = [
            (n * total // w, i)
            for i, (n, w) in enumerate(zip(given, weights, strict=True))
            if n * total // w > start
        ]
        heapq.heapify(due)
        heapq.heapify(later)
        choices = np.empty(count, np.int16)
        for position in range(start, start + count):
            while later and later[0][0] <= position:
                i = heapq.heappop(later)[1]
                heapq.heappush(due, (-(-(given[i] + 1) * total // weights[i]), i))
            deadline, i = heapq.heappop(due)
            assert deadline > position
            choices[position - start] = i
            given[i] += 1
            heapq.heappush(later, (given[i] * total // weights[i], i))
        return choices


def proportions(names: Sequence[str], weights: Any) -> list[int]:
    """The weights as the smallest whole numbers in the same proportions; a float stands
    for the decimal that it prints as.

    Raises:
      DataError: the weights' names are not the sources', or a weight is no positive
        number.
    """
    if not isinstance(weights, Mapping):
        raise DataError(
            f"the weights are a {type(weights).__name__}",
            where="mix",
            remedy="give a dict with one weight for each source, by its name",
        )
    for name in weights:
        if name not in names:
            raise DataError(
                f"there is a weight for {name!r}, but no such"
                f" source{nearest(str(name), names)}",
                where="mix",
                remedy=f"give weights for {', '.join(names)}",
            )
    exact = []
    for name in names:
        if name not in weights:
            raise DataError(
                f"there is no weight for the source {name!r}",
                where="mix",
                remedy=f"give weights for {', '.join(names)}",
            )
        try:
            fraction = Fraction(str(weights[name]))
        except (ValueError, ZeroDivisionError):  # "nan" and "inf" too
            fraction = Fraction(0)
        if fraction <= 0 or isinstance(weights[name], str | bool):
            raise DataError(
                f"the weight of {name!r} is {weights[name]!r}",
                where="mix",
                remedy="give a number above 0; leave out a source that is not wanted",
            )
        exact.append(fraction)
    scale = math.lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    divisor = math.gcd(*whole)
    return [number // divisor for number in whole]

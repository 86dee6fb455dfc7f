"""Which source each position of a mixture takes its sample from."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, nearest

# Positions up to which a pattern is computed whole, once; a longer one is computed some
# positions ahead. Assumptions: 128 KiB are little; a batch has about 1,000 samples.
PERIOD = 2**16
AHEAD = 2**10


class Pattern:
    """The fixed sequence in which sources take turns.

    After any t positions, source i had w_i t / W of them, within 1; w_i is its weight
    and W the sum of the weights. Random draws would wander from the proportions by
    sqrt(t), and batches would differ in their mixture by chance.

    Source i's j-th sample is due in the positions from floor((j - 1) W / w_i) to before
    ceil(j W / w_i); each position goes to the due sample whose last chance comes first.
    That such a sequence exists, and that this rule finds it, is Baruah, Cohen, Plaxton
    and Varvel 1996, "Proportionate progress", for one processor.

    With the weights 3 and 2, source 0's samples are due in the positions 0 to 1, 1 to 3
    and 3 to 4, and source 1's in 0 to 2 and 2 to 4. Position 0 goes to source 0, whose
    last chance is 1, not 2; then source 1 has the nearest one; and so on. Where two are
    equally near, the source with the lower number goes first.

    >>> Pattern([3, 2]).peek(5).tolist()
    [0, 1, 0, 0, 1]

    The choice at a position depends on how many samples each source has given before
    it, and on nothing else.
    """

    def __init__(self, weights: Sequence[int]):
        self.weights = list(weights)
        self.total = sum(weights)
        self.taken = [0] * len(weights)
        self._ahead = np.empty(0, np.int16)
        self._period: np.ndarray | None = None
        if self.total <= PERIOD:
            self._period = self._choices(self.taken, self.total)

    def peek(self, count: int) -> np.ndarray:
        """Return the sources of the next `count` positions, int16 (count,)."""
        if self._period is not None:
            first = sum(self.taken) % self.total
            return np.take(
                self._period,
                np.arange(count) + first,
                mode="wrap",
            )

        missing = count - len(self._ahead)
        if missing > 0:
            taken = self._taken_after(self._ahead)
            more = self._choices(taken, max(missing, AHEAD))
            self._ahead = np.concatenate([self._ahead, more])
        return self._ahead[:count]

    def advance(self, count: int) -> list[int]:
        """Consume the next `count` positions, and return how many each source has."""
        choices = self.peek(count)
        before = self.taken
        self.taken = self._taken_after(choices)
        self._ahead = self._ahead[count:]
        return [now - then for now, then in zip(self.taken, before, strict=True)]

    def restore(self, taken: Sequence[int]) -> None:
        """Go on where each source has given as many samples as `taken` says."""
        self.taken = list(taken)
        self._ahead = np.empty(0, np.int16)

    def _taken_after(self, choices: np.ndarray) -> list[int]:
        counts = np.bincount(choices, minlength=len(self.weights)).tolist()
        return [taken + more for taken, more in zip(self.taken, counts, strict=True)]

    def _choices(
        self,
        taken: Sequence[int],
        count: int,
    ) -> np.ndarray:
        """Compute choices after each source has given as many samples as `taken` says.

        Of each source's next sample, `later` holds the first position in which it is
        due, and `due`, from then on, the position before which it has its last chance.
        """
        start = sum(taken)
        given = list(taken)
        due: list[tuple[int, int]] = []
        later = [(self._release(i, n), i) for i, n in enumerate(given)]
        heapq.heapify(later)

        choices = np.empty(count, np.int16)
        for position in range(start, start + count):
            while later and later[0][0] <= position:
                _, source = heapq.heappop(later)
                deadline = self._deadline(source, given[source])
                heapq.heappush(due, (deadline, source))
            deadline, source = heapq.heappop(due)
            assert deadline > position

            choices[position - start] = source
            given[source] += 1
            release = self._release(source, given[source])
            heapq.heappush(later, (release, source))
        return choices

    def _release(
        self,
        source: int,
        given: int,
    ) -> int:
        """Return the first position in which a source's next sample is due."""
        return given * self.total // self.weights[source]

    def _deadline(
        self,
        source: int,
        given: int,
    ) -> int:
        """Return the position before which a source's next sample must come."""
        return -(-(given + 1) * self.total // self.weights[source])


def proportions(names: Sequence[str], weights: Any) -> list[int]:
    """Return weights as the smallest whole numbers in the same proportions.

    >>> proportions(["a", "b"], {"a": 0.7, "b": 0.3})
    [7, 3]

    Args:
      names: of the sources.
      weights: by name; a float stands for the decimal that it prints as.

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

    fractions = [_fraction(name, names, weights) for name in names]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    whole = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*whole)
    return [number // divisor for number in whole]


def _fraction(
    name: str,
    names: Sequence[str],
    weights: Mapping[str, Any],
) -> Fraction:
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
    return fraction

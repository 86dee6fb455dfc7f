"""A logarithmic axis of times or prices, with ticks at round values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lepton_jax.planner.show.words import DAY, HOUR, MINUTE

# The numbers below were chosen by eye.

# seconds, or dollars, below which a value counts as this: zero has no logarithm
TINY = 1e-12
# factor of free space at each end: at least, and as a power of the whole range
LEAST_PAD = 1.25
PAD_POWER = 0.07
# factor that an axis spans, at least
LEAST_SPAN = 4
# ticks that a ladder has to give before a finer one is taken
LEAST_TICKS = 3

# Ladders of round values, from coarse to fine: factors of each power of ten.
PRICE_FACTORS = (
    (1,),
    (1, 2, 5),
    (1, 1.5, 2, 3, 4, 5, 7),
)
TIME_FACTORS = (
    (1,),
    (1, 3),
    (1, 1.5, 2, 3, 4, 5, 6, 8),
)
# (seconds of a unit, its count from which on the next unit is taken)
UNITS = (
    (1e-6, 1000),
    (1e-3, 1000),
    (1.0, 60),
    (MINUTE, 60),
    (HOUR, 24),
    (DAY, 1e5),
)


def _prices(factors: Sequence[float]) -> list[float]:
    powers = [10.0**k for k in range(-9, 12)]
    return sorted(factor * power for power in powers for factor in factors)


def _times(factors: Sequence[float]) -> list[float]:
    return sorted(
        factor * 10.0**k * unit
        for unit, most in UNITS
        for k in range(5)
        for factor in factors
        if factor * 10.0**k < most
    )


PRICES = [_prices(factors) for factors in PRICE_FACTORS]
TIMES = [_times(factors) for factors in TIME_FACTORS]


@dataclass(frozen=True)
class Log:
    """A logarithmic axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Log:
        """Return an axis over all values and some more; at least a factor of 4."""
        low = max(min(values), TINY)
        high = max(max(values), TINY)
        span = high / low
        to_least_span = (LEAST_SPAN / span) ** 0.5
        pad = max(LEAST_PAD, span**PAD_POWER, to_least_span)
        return cls(low / pad, high * pad)

    def at(self, value: float) -> float:
        """Return the place of a value: 0 at `low`, 1 at `high`."""
        from_low = math.log(max(value, TINY) / self.low)
        return from_low / math.log(self.high / self.low)

    def ticks(self, ladders: Sequence[Sequence[float]]) -> list[float]:
        """Return those of the first ladder that gives three, else of the last."""
        ticks: list[float] = []
        for ladder in ladders:
            ticks = [tick for tick in ladder if self.low <= tick <= self.high]
            if len(ticks) >= LEAST_TICKS:
                break
        return ticks

"""Time and price on each topology, as plain data that all ways of showing share."""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.show.words import duration, money


@dataclass(frozen=True)
class Point:
    """Time, price and memory on one topology.

    Attributes:
      topology: its name.
      name, mesh: of the plan; empty if there is none.
      seconds: in which it consumes all tokens; None: nothing fits, or the time is not
        known.
      price: US dollars for all tokens; None: not known.
      step_seconds: time of one step; None: not known.
      peak: bytes that a device holds, as predicted.
      memory: bytes that a device has.
      problem: why nothing fits, and the nearest change that does; empty if the plan
        fits.
      best: on the frontier: no other topology is both faster and cheaper.
      fastest, cheapest: of all that fit.
    """

    topology: str
    name: str
    mesh: str
    seconds: float | None
    price: float | None
    step_seconds: float | None
    peak: int
    memory: int
    problem: str = ""
    best: bool = False
    fastest: bool = False
    cheapest: bool = False

    @property
    def margin(self) -> int:
        """Bytes that stay free on a device."""
        return self.memory - self.peak

    @property
    def marks(self) -> str:
        """Words for a point that stands out: "fastest, cheapest", "on the frontier"."""
        words = ["fastest"] * self.fastest + ["cheapest"] * self.cheapest
        if not words and self.best:
            words = ["on the frontier"]
        return ", ".join(words)


# ---- words that each way of showing uses ----


def time_of(point: Point) -> str:
    """Return the time for all tokens in words."""
    return _known(point.seconds, duration)


def price_of(point: Point) -> str:
    """Return the price of all tokens in words."""
    return _known(point.price, money)


def step_of(point: Point) -> str:
    """Return the time of a step in words."""
    return _known(point.step_seconds, duration)


def margin_of(point: Point) -> str:
    """Return the memory that stays free in words."""
    if not point.memory:
        return "not known"
    return f"{size(point.margin)} ({point.margin / point.memory:.0%})"


def _known(
    value: float | None,
    words: Callable[[float], str],
) -> str:
    return "not known" if value is None else words(value)


def letters(points: Sequence[Point]) -> list[str]:
    """Return a letter for each point that fits (a to z, then aa, ab), else nothing."""
    names = (
        "".join(pair)
        for length in (1, 2)
        for pair in itertools.product(string.ascii_lowercase, repeat=length)
    )
    return ["" if point.problem else next(names) for point in points]

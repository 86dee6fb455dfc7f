"""Timing of several contenders, so that none of them is always disturbed.

In a round each contender runs a slice: some steps, about as long as all the others'.
The order rotates from round to round. Ratios are taken within a round, so that what
slows the machine down for a while slows both sides.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax

Run = Callable[[int], Any]  # a number of steps; returns when they are done

# The share of a slice that is run to find out how many steps make one.
PROBE = 1 / 4


def time_in_rounds(
    runs: Mapping[str, Run],
    steps: Mapping[str, int],
    rounds: int,
) -> dict[str, list[float]]:
    """Return milliseconds a step of each contender in each round."""
    ms: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            gc.collect()  # nobody pays for another's garbage
            seconds = seconds_of(runs[name], steps[name])
            ms[name].append(seconds / steps[name] * 1e3)
    return ms


def steps_of_slice(
    run: Run,
    seconds: float,
    multiple: int,
) -> int:
    """Return how many steps last about `seconds`: a multiple of `multiple`.

    Afterwards everything is compiled.
    """
    # what comes out of the first call may have another layout than what went in, and
    # compile again
    for _ in range(2):
        run(multiple)

    count = multiple
    took = seconds_of(run, count)
    while took < seconds * PROBE:
        count *= 2
        took = seconds_of(run, count)
    return math.ceil(count * seconds / took / multiple) * multiple


def seconds_of(run: Run, steps: int) -> float:
    """Return the seconds that some steps take."""
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Return median, least and greatest of the rounds, and all of them."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "rounds": list(values),
    }


def spread_of_ratios(
    values: Sequence[float], others: Sequence[float]
) -> dict[str, Any]:
    """Return the spread of the ratios, round by round."""
    return spread([a / b for a, b in zip(values, others, strict=True)])


@contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of all that XLA compiles in this context."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield names
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)

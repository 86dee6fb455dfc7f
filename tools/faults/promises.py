"""What must become of a run after a fault: one function for each promise.

Each returns None where the promise was kept, else what is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from tools.faults.ending import Ending
from tools.faults.kinds import Fault

STOP_SECONDS = 30  # limit for stopping, which the runs are given
STOP_MARGIN = 15  # seconds more, on two busy cores (assumption)
# Attempts after which a fault that comes again must have ended the run. Three of the
# same in the same phase are enough for the supervisors, but the phase may vary.
RECOVERIES = (2, 6)
# Relative difference of losses on fewer devices, which sum in another order.
ROUNDING = 1e-4


class Tried(Protocol):
    """The trial, as a promise sees it: when its faults happened, and going on."""

    rounding: float  # relative difference of losses on fewer devices

    @property
    def fired(self) -> list[float]: ...

    def on(self) -> Ending: ...


def difference(
    ending: Ending,
    reference: Ending,
) -> str | None:
    """Return how a run differs from the undisturbed one, to the bit, if it does."""
    if ending.checksums != reference.checksums:
        if not ending.checksums:
            return "there is no final checkpoint"
        return "the final parameters differ"
    if ending.samples != reference.samples:
        return "other samples were trained on"
    return "processes are left" if ending.left else None


def recovered(
    fault: Fault, first: Ending, reference: Ending, trial: Tried
) -> str | None:
    """Check that it went on by itself, as if nothing had happened."""
    if first.codes is None or first.codes[0] != 0:
        return f"exit codes {first.codes}"
    if not trial.fired:
        return "the fault did not happen"
    if not first.recoveries and not fault.apart:
        return "nothing was restarted"
    return difference(first, reference)


def unharmed(
    fault: Fault, first: Ending, reference: Ending, trial: Tried
) -> str | None:
    """Check that nothing was restarted at all."""
    if first.codes is None or any(first.codes):
        return f"exit codes {first.codes}"
    if first.recoveries:
        return "something was restarted"
    return difference(first, reference)


def refused(
    fault: Fault,
    first: Ending,
    reference: Ending,
    trial: Tried,
) -> str | None:
    """Check that it ended as a mistake before its first step."""
    if first.codes is None or first.codes[0] != 2:
        return f"exit codes {first.codes}"
    if first.samples:
        return "it trained"
    return "processes are left" if first.left else None


def ended(
    fault: Fault,
    first: Ending,
    reference: Ending,
    trial: Tried,
) -> str | None:
    """Check that it ended, and goes on once a person has fixed the cause."""
    if first.codes is None or first.codes[0] not in (1, 2):
        return f"exit codes {first.codes}"
    if first.left:
        return "processes are left"
    return difference(trial.on(), reference)


def interrupted(
    fault: Fault, first: Ending, reference: Ending, trial: Tried
) -> str | None:
    """Check that it stopped in time, unless it was through, and goes on."""
    if first.codes is None or first.codes[0] not in (0, 130):
        return f"exit codes {first.codes}"
    stopped = first.codes[0] == 130
    if stopped and not trial.fired:
        return "the fault did not happen"
    if stopped:
        seconds = first.at - trial.fired[-1]
        if seconds > STOP_SECONDS + STOP_MARGIN:
            return f"it took {seconds:.0f} s to stop"
    if first.left:
        return "processes are left"
    return difference(trial.on() if stopped else first, reference)


def given_up(
    fault: Fault, first: Ending, reference: Ending, trial: Tried
) -> str | None:
    """Check that it was tried again a few times, not for ever."""
    if first.codes is None or first.codes[0] not in (1, 2):
        return f"exit codes {first.codes}"
    least, most = RECOVERIES
    if not least <= len(first.recoveries) <= most:
        return f"it was tried again {len(first.recoveries)} times"
    if first.left:
        return "processes are left"
    return difference(trial.on(), reference)


def with_less(
    fault: Fault, first: Ending, reference: Ending, trial: Tried
) -> str | None:
    """Check that the other hosts trained the same samples, to rounding."""
    if first.codes is None or first.codes[0] != 0:
        return f"exit codes {first.codes}"
    if first.samples != reference.samples:
        return "samples were lost or repeated"
    if first.left:
        return "processes are left"
    away = apart(first.losses, reference.losses)
    return None if away < trial.rounding else f"the losses differ by {away:.2g}"


def apart(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Return the largest relative difference; infinity where a loss is missing."""
    away = [abs(float(x / y) - 1) for x, y in zip(losses, expected, strict=True)]
    return math.inf if any(map(math.isnan, away)) else max(away)


PROMISES: dict[str, Callable[[Fault, Ending, Ending, Tried], str | None]] = {
    "recovered": recovered,
    "unharmed": unharmed,
    "refused": refused,
    "ended, then goes on": ended,
    "interrupted, then goes on": interrupted,
    "given up": given_up,
    "went on with what is left": with_less,
}

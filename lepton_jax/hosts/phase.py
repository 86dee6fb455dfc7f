"""The present phase of this process, the step it has reached, and since when.

The training thread says what begins; a watchdog (see `launch/supervise/`) asks here,
from another thread.

>>> with phase("save"):
...     where().phase
'save'
>>> where().phase
'start'
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

# in "agreement" a host waits for another one's word
PHASES = (
    "start",
    "plan",
    "restore",
    "compile",
    "steps",
    "data",
    "evaluation",
    "save",
    "agreement",
    "pause",
    "shutdown",
)


class Where(NamedTuple):
    """State of this process.

    Args:
      phase: one of PHASES.
      step: the last step that was handed to the devices.
      done: the last step known to be done.
      since: time of the last change of any of these (monotonic, in seconds).
    """

    phase: str
    step: int
    done: int
    since: float


class _Account(NamedTuple):
    """Seconds in each phase up to `since`, when the present one began."""

    seconds: dict[str, float]
    phase: str
    since: float


# both are replaced as a whole, for other threads read them
_now = Where(
    "start",
    step=0,
    done=0,
    since=time.monotonic(),
)
_account = _Account(
    dict.fromkeys(PHASES, 0.0),
    _now.phase,
    _now.since,
)


def where() -> Where:
    """Return the present state; a snapshot that no other thread can tear."""
    return _now


def spent() -> dict[str, float]:
    """Return the seconds in each of PHASES since this process began.

    In "steps" and in most others the host also waits for its devices, and through them
    for other hosts; the time in "data" is its own.
    """
    seconds, present, since = _account
    total = seconds[present] + time.monotonic() - since
    return {**seconds, present: total}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Be in a phase inside the block, and in the one before after it.

    To enter the present phase anew counts as a change.
    """
    assert name in PHASES, name
    before = _now.phase
    _change(_now._replace(phase=name))
    try:
        yield
    finally:
        _change(_now._replace(phase=before))


def reached(
    step: int | None = None,
    done: int | None = None,
    phase: str | None = None,
) -> None:
    """Note progress; without any change, `since` stays.

    Args:
      step: the last step that was handed to the devices.
      done: the last step known to be done.
      phase: a phase that begins, and ends with the next one.
    """
    fresh = _now._replace(
        step=_now.step if step is None else step,
        done=_now.done if done is None else done,
        phase=phase or _now.phase,
    )
    if fresh != _now:
        _change(fresh)


def _change(fresh: Where) -> None:
    global _now, _account
    now = time.monotonic()
    seconds, present, since = _account
    if fresh.phase != present:
        total = seconds[present] + now - since
        _account = _Account(
            {**seconds, present: total},
            fresh.phase,
            now,
        )
    _now = fresh._replace(since=now)

"""What this process is doing: a phase, the step that it has reached, and since when
nothing has changed.

Whoever watches a run (see `launch/`) asks here, from another thread; whoever trains
only says what begins.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

# in "agreement" a host waits for what another one has to say
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
    """Phase, the last step that was handed to the devices, the last one known to be
    done, and the time (monotonic, in seconds) of the last change of any of these.
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


_now = Where(
    "start",
    0,
    0,
    time.monotonic(),
)
_account = _Account(
    dict.fromkeys(PHASES, 0.0),
    _now.phase,
    _now.since,
)


def where() -> Where:
    """How it stands; a snapshot that no other thread can tear."""
    return _now


def spent() -> dict[str, float]:
    """Seconds in each of PHASES since this process began, up to now. In "steps" and in
    most others the host also waits for its devices, and through them for other hosts;
    the time in "data" is its own.
    """
    seconds, present, since = _account
    return {**seconds, present: seconds[present] + time.monotonic() - since}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, this process is in another phase; after it, in the one before. To enter a
    phase anew counts as a change.
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
    """A step was handed over, or is known to be done, or a phase begins that ends with
    the next one.
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
    (seconds, present, since) = _account
    if fresh.phase != present:
        # replaced as a whole, for other threads read it
        _account = _Account(
            {**seconds, present: seconds[present] + now - since},
            fresh.phase,
            now,
        )
    _now = fresh._replace(since=now)

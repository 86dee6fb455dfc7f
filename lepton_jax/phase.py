"""What this process is doing: a phase, the step that it has reached, and since when nothing has changed.

Whoever watches a run (see `launch/`) asks here, from another thread; whoever trains only says what begins.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import NamedTuple

PHASES = ("start", "plan", "restore", "compile", "steps", "data", "evaluation", "save", "pause", "shutdown")


class Where(NamedTuple):
    """Phase, the last step that was handed to the devices, the last one known to be done, and the time (monotonic, in seconds)
    of the last change of any of these."""

    phase: str
    step: int
    done: int
    since: float


_now = Where("start", 0, 0, time.monotonic())


def where() -> Where:
    """How it stands; a snapshot that no other thread can tear."""
    return _now


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """Inside, this process is in another phase; after it, in the one before. To enter a phase anew counts as a change."""
    global _now
    assert name in PHASES, name
    before = _now.phase
    _now = _now._replace(phase=name, since=time.monotonic())
    try:
        yield
    finally:
        _now = _now._replace(phase=before, since=time.monotonic())


def reached(step: int | None = None, done: int | None = None, phase: str | None = None) -> None:
    """A step was handed over, or is known to be done, or a phase begins that ends with the next one."""
    global _now
    fresh = _now._replace(step=_now.step if step is None else step, done=_now.done if done is None else done,
                          phase=phase or _now.phase)
    if fresh != _now:
        _now = fresh._replace(since=time.monotonic())

"""Limits and restarts: how long each phase may take, and what happens after a fault.

The limits lie one inside the other. A worker's own is the innermost: when it is over,
the worker writes its stack. Its supervisor's is somewhat longer, and the head's longer
again, so that the inner one, which knows most, speaks first; the scheduler's must be
longer than all.

Example: no step may take more than 60 s. The worker writes its stack after 60 s, its
supervisor reports it after 64 s (`nested(60, 1)`), the head acts by itself after 68 s.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.errors import LeptonError, SettingError, nearest
from lepton_jax.hosts.phase import PHASES

# assumptions: seconds without any change; large models have taken 24 minutes to compile
DEFAULTS = {
    "start": 300.0,
    "plan": 600.0,
    "restore": 1800.0,
    "compile": 3600.0,
    "steps": 60.0,
    "data": 600.0,
    "evaluation": 1800.0,
    "save": 1800.0,
    "agreement": math.inf,
    "pause": math.inf,
    "shutdown": 120.0,
    "silence": 60.0,
    "stop": 90.0,
}
# assumptions about the limit of a step
UNKNOWN = 600.0  # seconds, until `KNOWN_AFTER` steps have been seen
KNOWN_AFTER = 3
TIMES = 10.0  # times the longest step seen
NAMES = (*PHASES, "silence", "stop")
assert set(DEFAULTS) == set(NAMES)
# assumption: of several hosts, in a day, without a checkpoint in between
RESTARTS = 10


class HostsError(LeptonError):
    """The hosts of a run can't go on.

    Attributes:
      exit_code: 1 if trying again may help, 2 if it will not.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str,
        exit_code: int = 1,
    ):
        super().__init__(what, where=where, remedy=remedy)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Rules:
    """Limits, restarts and patience of a run's supervisors.

    Args:
      limits: seconds by phase, and for "silence" and "stop", where they differ from
        `DEFAULTS`; inf: none.
      restarts: number of failures that are survived in a day, without those that were
        followed by a checkpoint; None: `RESTARTS` for several hosts.
      grace: seconds to wait for a host that is lost.
      least_hosts: number of hosts with which the run goes on if the others don't come
        back; None: only with all.
      lost: seconds without a word between supervisors after which the connection counts
        as lost.
      ending: seconds from SIGTERM to SIGKILL for a worker that can't go on anyway.
      settle: seconds after a first failure in which a better reason for it may come.
      pause: seconds before the first restart; twice as long before each further one, at
        most 60.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    restarts: int | None = None
    # assumptions
    grace: float = 300.0
    least_hosts: int | None = None
    lost: float = 10.0
    ending: float = 3.0
    settle: float = 0.5
    pause: float = 1.0

    def limit(self, name: str) -> float:
        """Return the seconds of a phase, of "silence" or of "stop"."""
        return self.limits.get(name, DEFAULTS[name])


class Limits:
    """Limits of one worker; that of "steps" adapts, unless it was given.

    It is ten times the longest pause between two changes within "steps", but at least
    60 s. Until three such changes have been seen it is 600 s, for the first steps may
    take any time.

    >>> limits = Limits({})
    >>> limits.of("steps")
    600.0
    >>> for seconds in (8.0, 9.0, 7.0):
    ...     limits.saw(seconds)
    >>> limits.of("steps")
    90.0
    """

    def __init__(self, given: Mapping[str, float]):
        self._limits = {**DEFAULTS, **given}
        self._adapts = "steps" not in given
        self.longest = 0.0
        self.seen = 0

    def saw(self, seconds: float) -> None:
        """Note the time between two changes within "steps"."""
        self.longest = max(self.longest, seconds)
        self.seen = self.seen + 1

    def of(self, phase: str) -> float:
        """Return the seconds of a phase; inf where there is no limit."""
        if phase != "steps" or not self._adapts:
            return self._limits[phase]
        if self.seen < KNOWN_AFTER:
            return UNKNOWN
        return max(self._limits["steps"], TIMES * self.longest)


def nested(limit: float, level: int) -> float:
    """Return the limit `level` steps further out: each is 1 s and a twentieth longer.

    >>> [nested(60.0, level) for level in (0, 1, 2)]
    [60.0, 64.0, 68.0]
    """
    return limit + level * (1.0 + limit / 20)


# ---- the command line ----


def add_options(group: Any) -> None:
    """Add the options about failures to an argparse group."""
    group.add_argument(
        "--limit",
        action="append",
        metavar="NAME=SECONDS",
        help=(
            f"how long nothing may change in a phase ({', '.join(PHASES)}), a process"
            " may say nothing (silence), and a stop take (stop); 0: forever"
        ),
    )
    group.add_argument(
        "--restarts",
        type=_whole,
        metavar="N",
        help=(
            "how many failures in a day are answered by a restart from the last"
            " checkpoint; those that a checkpoint followed don't count (default:"
            f" {RESTARTS} on several hosts; one host alone is only watched with this"
            " option)"
        ),
    )
    group.add_argument(
        "--grace",
        type=_seconds,
        default=Rules.grace,
        metavar="SECONDS",
        help=f"how long to wait for hosts that are lost (default: {Rules.grace:g})",
    )
    group.add_argument(
        "--least-hosts",
        type=_whole,
        metavar="K",
        help=(
            "go on with K hosts or more if the others don't come back within the grace,"
            " and take them in when they do (default: all, without which the run ends)"
        ),
    )


def read(options: argparse.Namespace) -> Rules:
    """Return the rules that the options say.

    Raises:
      SettingError: a limit has no such name or is no number of seconds, or
        --least-hosts is 0.
    """
    limits = dict(_limit(text) for text in options.limit or ())
    if options.least_hosts == 0:
        raise SettingError(
            "--least-hosts is 0",
            where="command line, --least-hosts",
            remedy="write a number from 1",
        )
    return Rules(
        limits=limits,
        restarts=options.restarts,
        grace=options.grace,
        least_hosts=options.least_hosts,
    )


def _limit(text: str) -> tuple[str, float]:
    """Return name and seconds of one --limit."""
    name, _, value = text.partition("=")
    if name not in NAMES:
        raise SettingError(
            f"--limit {text}: {name!r} has no limit{nearest(name, NAMES)}",
            where="command line, --limit",
            remedy=f"write NAME=SECONDS, with one of {', '.join(NAMES)}",
        )
    try:
        return name, _seconds(value) or math.inf
    except argparse.ArgumentTypeError as error:
        raise SettingError(
            f"--limit {text}: {error}",
            where="command line, --limit",
            remedy=f"write {name}=60, or {name}=0 for no limit",
        ) from error


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0")
    return int(text)

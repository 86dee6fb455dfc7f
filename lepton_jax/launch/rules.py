"""How long what may take, and what happens after a fault: the limits of each phase, one
inside the other, and the options.

A worker's own limit is the innermost: when it is over, the worker writes its stack. Its
supervisor's is somewhat longer, and the head's longer again, so that the inner one,
which knows most, speaks first; the scheduler's must be longer than all.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.errors import LeptonError, SettingError, nearest
from lepton_jax.hosts.phase import PHASES

# seconds without any change; large models have taken 24 minutes to compile
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
# of a step: while no one knows how long one takes; from how many; how many
UNKNOWN = 600.0
KNOWN_AFTER = 3
TIMES = 10.0
NAMES = (*PHASES, "silence", "stop")
assert set(DEFAULTS) == set(NAMES)
RESTARTS = 10  # of several hosts, in a day, without a checkpoint in between


class HostsError(LeptonError):
    """The hosts of a run can't go on; `exit_code` says whether trying again may help
    (1) or will not (2).
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        remedy: str,
        exit_code: int = 1,
    ):
        super().__init__(
            what,
            where=where,
            remedy=remedy,
        )
        self.exit_code = exit_code


@dataclass(frozen=True)
class Rules:
    """What the supervisors of a run go by.

    Args:
      limits: seconds by phase, and of "silence" and "stop", where they are not
        `DEFAULTS`; inf: none.
      restarts: how many failures are survived in a day, without those that were
        followed by a checkpoint; None: the usual.
      grace: seconds to wait for a host that is lost.
      least_hosts: with how many the run goes on if the others don't come back; None:
        with all only.
      lost: seconds without a word between supervisors after which the connection counts
        as lost.
      ending: seconds from SIGTERM to SIGKILL for a worker that can't go on anyway.
      settle: seconds after a first failure in which a better reason for it may come.
      pause: seconds before the first restart; twice as long before each further one, at
        most 60.
    """

    limits: Mapping[str, float] = field(default_factory=dict)
    restarts: int | None = None
    grace: float = 300.0
    least_hosts: int | None = None
    lost: float = 10.0
    ending: float = 3.0
    settle: float = 0.5
    pause: float = 1.0

    def limit(self, name: str) -> float:
        return self.limits.get(name, DEFAULTS[name])


class Limits:
    """The limits of one worker; that of "steps" follows the longest step seen so far,
    unless it was given.

    That limit is ten times the longest pause between two changes within "steps", but at
    least 60 s; and 600 s until three such changes have been seen, for the first steps
    may take any time.
    """

    def __init__(self, given: Mapping[str, float]):
        self._limits = {**DEFAULTS, **given}
        self._adapts = "steps" not in given
        self.longest = 0.0
        self.seen = 0

    def saw(self, seconds: float) -> None:
        """So long nothing changed between two changes within "steps"."""
        self.longest = max(self.longest, seconds)
        self.seen = self.seen + 1

    def of(self, phase: str) -> float:
        """Seconds; inf where there is none."""
        if phase != "steps" or not self._adapts:
            return self._limits[phase]
        return (
            UNKNOWN
            if self.seen < KNOWN_AFTER
            else max(self._limits["steps"], TIMES * self.longest)
        )


def nested(limit: float, level: int) -> float:
    """The limit `level` steps further out: each is 1 s and a twentieth longer."""
    return limit + level * (1.0 + limit / 20)


def options(group: Any) -> None:
    """Add the options that say what happens when something fails."""
    group.add_argument(
        "--limit",
        action="append",
        metavar="NAME=SECONDS",
        help=(
            f"how long nothing may change in a phase ({', '.join(PHASES)}), a process"
            " may say nothing (silence), and a stop take (stop); 0: for ever"
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
    """The rules that the options say.

    Raises:
      SettingError: a limit that is none.
    """
    limits: dict[str, float] = {}
    for text in options.limit or ():
        name, _, value = text.partition("=")
        if name not in NAMES:
            raise SettingError(
                f"--limit {text}: {name!r} has no limit{nearest(name, NAMES)}",
                where="command line, --limit",
                remedy=f"write NAME=SECONDS, with one of {', '.join(NAMES)}",
            )
        try:
            limits[name] = _seconds(value) or math.inf
        except argparse.ArgumentTypeError as error:
            raise SettingError(
                f"--limit {text}: {error}",
                where="command line, --limit",
                remedy=f"write {name}=60, or {name}=0 for no limit",
            ) from error
    if options.least_hosts == 0:
        raise SettingError(
            "--least-hosts is 0",
            where="command line, --least-hosts",
            remedy="write a number from 1",
        )
    return Rules(
        limits,
        options.restarts,
        options.grace,
        options.least_hosts,
    )


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

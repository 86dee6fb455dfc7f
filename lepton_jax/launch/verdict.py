"""Which host it was, what is to be said about it, and whether to try again."""

from __future__ import annotations

import linecache
import re
import signal
import sysconfig
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lepton_jax.errors import LeptonError, of_a_library
from lepton_jax.launch.rules import HostsError, nested

MISTAKE = 2  # exit code of a worker
LOST_PEER = 76  # exit code of a worker that can no longer reach another
CONSEQUENCE = 3  # rank of a fault from which on it is likely another's
# where a host is behind one that has handed over as many steps: whoever waits for
# another waits in "steps"
ORDER = {
    "start": 0,
    "plan": 1,
    "compile": 2,
    "restore": 2,
    "data": 3,
    "evaluation": 3,
    "save": 3,
    "shutdown": 3,
    "steps": 4,
    "agreement": 4,
    "pause": 5,
}
SHOWN = 12  # lines of a stack
# so often the same fault without a checkpoint in between, and it is not tried again
SAME = 3
DAY = 86400.0
LONGEST_PAUSE = 60.0


class Place(NamedTuple):
    """Where a worker is: phase, steps handed over, steps known to be done, seconds
    without a change, and that phase's limit; seconds in four phases so far; bytes of
    the process's memory and of its devices', where they are known.
    """

    phase: str = "start"
    step: int = 0
    done: int = 0
    age: float = 0.0
    limit: float = float("inf")
    data: float = 0.0
    steps: float = 0.0
    evaluation: float = 0.0
    save: float = 0.0
    memory: int | None = None
    device_memory: int | None = None

    def __str__(self) -> str:
        return f"in {self.phase} at step {self.step}"


@dataclass(frozen=True)
class Fault:
    """What happened to a host.

    Args:
      host: which.
      cause: "SIGKILL", "exit code 1", "stuck", "silent", "lost" or "mistake": what is
        the same when it happens again.
      how: the same in words: "was ended by SIGKILL".
      place: where it was last seen.
      stack: its main thread's, innermost first.
      mistake: the error of a person's that ended it.
    """

    host: int
    cause: str
    how: str
    place: Place
    stack: tuple[str, ...] = ()
    mistake: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        return f"host {self.host} {self.how} {self.place}"

    @property
    def rank(self) -> int:
        """Smaller is nearer to the root: a process that loses its peers ends by itself,
        by an error of JAX's or by SIGABRT.
        """
        if self.cause == "lost another":
            return 5
        if self.cause.startswith("SIG") or self.cause in ("lost", "stuck", "silent"):
            return {"SIGABRT": 3, "SIGTERM": 4}.get(self.cause, 0)
        return 1 if self.mistake is not None else 2

    def story(self) -> str:
        """The stack, a line each, with what stands there; empty without one."""
        return "".join(f"\n    {line}" for line in shown(self.stack))

    def error(
        self,
        text: str,
        remedy: str,
        exit_code: int = 1,
    ) -> HostsError:
        """The end of the run."""
        own = innermost(self.stack)
        return HostsError(
            f"{self}{text}{self.story()}",
            where=own or f"host {self.host}",
            remedy=remedy,
            exit_code=exit_code,
        )


def died(
    host: int,
    code: int,
    place: Place,
    error: Mapping[str, Any] | None,
) -> Fault:
    """The fault of a worker that ended with an exit code, or by a signal (negative, as
    of `subprocess`).
    """
    if code < 0:
        name = (
            signal.Signals(-code).name
            if -code in {*signal.Signals}
            else f"signal {-code}"
        )
        return Fault(
            host,
            name if name.startswith("SIG") else f"SIG {-code}",
            f"was ended by {name}, last seen",
            place,
        )
    if code == LOST_PEER:
        return Fault(
            host,
            "lost another",
            "could not reach another host any more, and ended, last seen",
            place,
        )
    if code == MISTAKE:
        return Fault(
            host,
            "mistake",
            f"ended with exit code {code}, last seen",
            place,
            mistake=error or {},
        )
    return Fault(
        host, f"exit code {code}", f"ended with exit code {code}, last seen", place
    )


def mistaken(fault: Fault) -> LeptonError:
    """The error of a person's, behind the number of its host if that is not 0."""
    said = fault.mistake or {}
    what = said.get("what") or f"it {fault.how} {fault.place}"
    return LeptonError(
        what if fault.host == 0 else f"host {fault.host}: {what}",
        where=said.get("where"),
        remedy=said.get("remedy") or f"see what host {fault.host} wrote above",
    )


def root(
    faults: Sequence[Fault],
    at_once: int = 0,
    coordinator: int | None = None,
) -> Fault:
    """Of what came at about the same time, what is behind it: the nearest to the root,
    and of those the first.

    Args:
      faults: as they came.
      at_once: so many came within a moment.
      coordinator: the host of JAX's service. Its end aborts the processes of all others
        at once; that of another host fails them in other ways, or much later.
    """
    nearest = min(faults, key=lambda fault: fault.rank)
    its = [
        fault
        for fault in faults[:at_once]
        if fault.host == coordinator and fault.rank == nearest.rank == CONSEQUENCE
    ]
    return its[0] if its else nearest


def behind(places: Mapping[int, Place]) -> list[int]:
    """The hosts that the others wait for: those with the least progress."""
    progress = {
        host: (at.step, at.done, ORDER[at.phase]) for host, at in places.items()
    }
    least = min(progress.values())
    return sorted(host for host, reached in progress.items() if reached == least)


def over(
    places: Mapping[int, Place],
    reported: set[int],
    level: int = 2,
) -> list[int]:
    """The hosts that the others wait for, if one of them is over its limit: by its
    supervisor's word, or by far.

    Args:
      reported: hosts whose supervisors say so.
      level: how far outside the worker's own limit this one lies.
    """
    last = behind(places)
    late = any(
        host in reported or places[host].age > nested(places[host].limit, level)
        for host in last
    )
    return last if late else []


def odd(stacks: Mapping[int, Sequence[str]]) -> int | None:
    """The one host that does not wait inside of JAX, or that stands elsewhere than all
    others; None if there is no such one.
    """
    outside = [
        host
        for host, stack in stacks.items()
        if not re.search(r"-packages/jax(lib)?/", stack[0])
    ]
    if len(outside) == 1 and len(stacks) > 1:
        return outside[0]
    counts = Counter(tuple(stack) for stack in stacks.values())
    single = [host for host, stack in stacks.items() if counts[tuple(stack)] == 1]
    return (
        single[0] if len(counts) == 2 and len(single) == 1 and len(stacks) > 2 else None
    )


def stuck(
    places: Mapping[int, Place],
    last: Sequence[int],
    stacks: Mapping[int, Sequence[str]],
) -> Fault:
    """The fault of the host that is stuck: of those that are behind, the only one, or
    the one whose stack tells (see `odd`).
    """
    found = (
        last[0]
        if len(last) == 1
        else odd({host: stacks[host] for host in last if stacks.get(host)})
    )
    host = max(last, key=lambda host: places[host].age) if found is None else found
    place = places[host]
    waiting = sorted(
        {
            f"{places[other].phase} at step {places[other].step}"
            for other in places
            if other != host
        }
    )
    level = [other for other in last if other != host]
    if found is None and level:
        rest = (
            f", as {'are' if len(level) > 1 else 'is'} host{'s' * (len(level) > 1)}"
            f" {', '.join(map(str, level))}: none is behind the others"
        )
    else:
        rest = f", while the others wait in {', '.join(waiting)}" if waiting else ""
    how = (
        f"has been stuck for {place.age:.0f} s (limit {place.limit:.0f} s){rest}; it is"
    )
    return Fault(
        host,
        "stuck",
        how,
        place,
        tuple(stacks.get(host, ())),
    )


def frames(text: str) -> tuple[str, ...]:
    """ "file:line in function", innermost first, of the main thread: the last one that
    faulthandler writes.
    """
    block = re.split(r"^.*\(most recent call first\):.*$", text, flags=re.MULTILINE)[-1]
    return tuple(
        f"{file}:{line} in {name}"
        for file, line, name in re.findall(
            r'^  File "(.*)", line (\d+) in (.+)$', block, re.MULTILINE
        )
    )


def innermost(stack: Sequence[str]) -> str | None:
    """The innermost line of the user's, else of ours."""
    libraries = (
        "site-packages",
        "dist-packages",
        sysconfig.get_path("stdlib"),
        "<frozen",
        "<string",
    )
    users = [frame for frame in stack if not of_a_library(frame)]
    ours = [frame for frame in stack if not any(part in frame for part in libraries)]
    return next(iter((*users, *ours, *stack)), None)


def shown(stack: Sequence[str]) -> list[str]:
    """The innermost lines, and the user's innermost one if it is not among them; each
    with its source.
    """
    own = innermost(stack)
    some = list(stack[:SHOWN])
    some += ["...", own] if own and own not in some else []
    lines = []
    for frame in some:
        match = re.fullmatch(r"(.*):(\d+) in .+", frame)
        source = linecache.getline(match[1], int(match[2])).strip() if match else ""
        lines.append(f"{frame}: {source}" if source else frame)
    return lines


class Budget:
    """How often to try again, and after which pause.

    A failure that follows a checkpoint makes the budget whole again, and a day does so
    for what happened before.

    Args:
      restarts: how many failures without a checkpoint in between are survived.
      pause: seconds before the first restart, doubled each time, at most 60.
    """

    def __init__(self, restarts: int, pause: float):
        self.restarts = restarts
        self.pause = pause
        self.failures: list[float] = []
        self._saved: int | None = None
        self._last: tuple | None = None
        self._same = 0

    @property
    def left(self) -> int:
        return max(0, self.restarts - len(self.failures))

    def charge(
        self,
        fault: Fault,
        saved: int | None,
        now: float,
    ) -> float:
        """Seconds to pause before the next attempt.

        Args:
          fault: what ended this one.
          saved: the last step of which there is a checkpoint.
          now: monotonic time in seconds.

        Raises:
          HostsError: it is of no use to try again, or not allowed.
        """
        if saved is not None and (self._saved is None or saved > self._saved):
            self.failures = []
            self._last = None
            self._saved = saved
        same = (fault.cause, fault.place.phase, saved)
        self._same = self._same + 1 if same == self._last else 1
        self._last = same
        if self.restarts and self._same >= SAME:
            at = (
                "no checkpoint"
                if saved is None
                else f"no checkpoint since step {saved}"
            )
            raise fault.error(
                f", for the {_th(self._same)} time, and with {at}: it is not tried"
                " again",
                f"mend what stops it in {fault.place.phase}, then go on from the last"
                " checkpoint by --resume; or save more often",
                exit_code=2,
            )
        self.failures = [when for when in self.failures if now - when < DAY]
        if not self.left:
            text = (
                ""
                if not self.restarts
                else (
                    f", and the {self.restarts} restarts of --restarts are used up"
                    if self.restarts > 1
                    else ", and the one restart of --restarts is used up"
                )
            )
            raise fault.error(
                f"; all hosts were ended{text}",
                f"see what host {fault.host} wrote above; go on from the last "
                "checkpoint by --resume"
                + ("" if self.restarts else ", and have that done by --restarts N"),
            )
        self.failures.append(now)
        return min(LONGEST_PAUSE, self.pause * 2 ** (len(self.failures) - 1))


def _th(count: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(count, f"{count}th")

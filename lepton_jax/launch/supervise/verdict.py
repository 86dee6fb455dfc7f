"""Verdicts after a failure: which host was behind it, and whether to try again.

In one program all hosts wait for each other, so one failure soon looks like many. An
example of three hosts that should all train step 7:

    host   phase       steps handed over / done    then
    0      steps       7 / 6                       SIGABRT, 0.1 s after host 1's end
    1      data        7 / 6                       SIGKILL
    2      agreement   7 / 6                       exit code 76: lost another

`root` picks host 1: SIGKILL has the lowest `Fault.rank`, for JAX ends a process that
loses its peers by SIGABRT or by an error, never by SIGKILL. Had no process ended at
all, `behind` would pick host 1 as well: all three have handed over and done as many
steps, and by `ORDER` "data" comes before "steps" and "agreement", in which hosts wait.
"""

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
from lepton_jax.launch.supervise.rules import HostsError, nested

MISTAKE = 2  # exit code of a worker
LOST_PEER = 76  # exit code of a worker that can no longer reach another
CONSEQUENCE = 3  # rank of a fault from which on it is likely another's
# order in which hosts pass the phases at one step: a host that waits for another waits
# in "steps" or "agreement"
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
# assumption: the same fault that many times without a checkpoint in between is not
# tried again
SAME = 3
DAY = 86400.0  # seconds
LONGEST_PAUSE = 60.0  # seconds (assumption)
IN_JAX = re.compile(r"-packages/jax(lib)?/")
FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.+)$', re.MULTILINE)
LOST_ANOTHER = "lost another"


class Place(NamedTuple):
    """State of a worker, as it was last heard.

    Args:
      phase: one of `hosts.phase.PHASES`.
      step: number of steps handed over to the devices.
      done: number of steps known to be done.
      age: seconds without a change.
      limit: seconds allowed without a change in this phase.
      data: seconds spent in the phase "data" so far.
      steps: the same of "steps".
      evaluation: the same of "evaluation".
      save: the same of "save".
      memory: bytes of the process, where they are known.
      device_memory: bytes on the device that has the most, where they are known.
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
        """Return the end of a sentence about a host."""
        return f"in {self.phase} at step {self.step}"


@dataclass(frozen=True)
class Fault:
    """A failure of one host.

    Args:
      host: its number.
      cause: "SIGKILL", "exit code 1", "stuck", "silent", "lost", "lost another" or
        "mistake": the same when it happens again.
      how: the same in words: "was ended by SIGKILL".
      place: where the host was last seen.
      stack: of its main thread, innermost first.
      mistake: the error of a person's that ended it.
    """

    host: int
    cause: str
    how: str
    place: Place
    stack: tuple[str, ...] = ()
    mistake: Mapping[str, Any] | None = None

    def __str__(self) -> str:
        """Return the fault as a sentence."""
        return f"host {self.host} {self.how} {self.place}"

    @property
    def rank(self) -> int:
        """Distance from the root of a failure, 0 to 5.

        A process that loses its peers ends by itself, by an error of JAX's or by
        SIGABRT; the system or a person ends one by any other signal.
        """
        if self.cause == LOST_ANOTHER:
            return 5
        if self.cause.startswith("SIG") or self.cause in ("lost", "stuck", "silent"):
            return {"SIGABRT": CONSEQUENCE, "SIGTERM": 4}.get(self.cause, 0)
        return 1 if self.mistake is not None else 2

    def story(self) -> str:
        """Return the stack, a line for each frame; empty without one."""
        return "".join(f"\n    {line}" for line in shown(self.stack))

    def error(
        self,
        text: str,
        remedy: str,
        exit_code: int = 1,
    ) -> HostsError:
        """Return the error that ends the run.

        Args:
          text: end of its first sentence, which begins with the fault.
          remedy: what to do.
          exit_code: of the run.
        """
        return HostsError(
            f"{self}{text}{self.story()}",
            where=innermost(self.stack) or f"host {self.host}",
            remedy=remedy,
            exit_code=exit_code,
        )


def died(
    host: int,
    code: int,
    place: Place,
    error: Mapping[str, Any] | None,
) -> Fault:
    """Return the fault of a worker that has ended.

    Args:
      host: its number.
      code: its exit code, or -n for signal n.
      place: where it was last seen.
      error: the mistake of a person's that it reported.
    """
    if code < 0:
        cause = f"SIG {-code}"
        name = f"signal {-code}"
        if -code in {*signal.Signals}:
            cause = name = signal.Signals(-code).name
        return Fault(host, cause, f"was ended by {name}, last seen", place)
    if code == LOST_PEER:
        how = "could not reach another host any more, and ended, last seen"
        return Fault(host, LOST_ANOTHER, how, place)

    how = f"ended with exit code {code}, last seen"
    if code == MISTAKE:
        return Fault(
            host,
            "mistake",
            how,
            place,
            mistake=error or {},
        )
    return Fault(host, f"exit code {code}", how, place)


def mistaken(fault: Fault) -> LeptonError:
    """Return a person's error, with the number of its host unless that is 0."""
    mistake = fault.mistake or {}
    what = mistake.get("what") or f"it {fault.how} {fault.place}"
    return LeptonError(
        what if fault.host == 0 else f"host {fault.host}: {what}",
        where=mistake.get("where"),
        remedy=mistake.get("remedy") or f"see what host {fault.host} wrote above",
    )


# ---- which host it was ----


def root(
    faults: Sequence[Fault],
    at_once: int = 0,
    coordinator: int | None = None,
) -> Fault:
    """Return the fault behind those that came at about the same time.

    It is the one with the lowest rank, and of several the first.

    Args:
      faults: as they came.
      at_once: number of those that came within a moment.
      coordinator: the host of JAX's service. Its end aborts the processes of all others
        at once; that of another host fails them in other ways, or much later.
    """
    nearest = min(faults, key=lambda fault: fault.rank)
    if nearest.rank == CONSEQUENCE:
        for fault in faults[:at_once]:
            if fault.host == coordinator and fault.rank == CONSEQUENCE:
                return fault
    return nearest


def behind(places: Mapping[int, Place]) -> list[int]:
    """Return the hosts that the others wait for: those with the least progress.

    >>> behind({0: Place("steps", 7, 6), 1: Place("data", 7, 6)})
    [1]
    """
    progress = {
        host: (
            place.step,
            place.done,
            ORDER[place.phase],
        )
        for host, place in places.items()
    }
    least = min(progress.values())
    return sorted(host for host, reached in progress.items() if reached == least)


def over(
    places: Mapping[int, Place],
    reported: set[int],
    level: int = 2,
) -> list[int]:
    """Return the hosts that the others wait for, if one of them is over its limit.

    Args:
      places: of all hosts, by number.
      reported: hosts that are over their limit by their supervisors' word.
      level: how far outside the worker's own limit this one lies; a host beyond it is
        over its limit without that word.
    """
    last = behind(places)
    for host in last:
        place = places[host]
        if host in reported or place.age > nested(place.limit, level):
            return last
    return []


def odd(stacks: Mapping[int, Sequence[str]]) -> int | None:
    """Return the one host whose stack differs from the others'.

    It is the only one that does not wait inside of JAX, or that stands elsewhere than
    all others; None if there is no such host.
    """
    outside = [host for host, stack in stacks.items() if not IN_JAX.search(stack[0])]
    if len(outside) == 1 and len(stacks) > 1:
        return outside[0]

    counts = Counter(tuple(stack) for stack in stacks.values())
    single = [host for host, stack in stacks.items() if counts[tuple(stack)] == 1]
    if len(counts) == 2 and len(single) == 1 and len(stacks) > 2:
        return single[0]
    return None


def stuck(
    places: Mapping[int, Place],
    last: Sequence[int],
    stacks: Mapping[int, Sequence[str]],
) -> Fault:
    """Return the fault of the host that is stuck.

    Of the hosts that are behind it is the only one, or the one whose stack tells (see
    `odd`); else the one without a change for longest.

    Args:
      places: of all hosts, by number.
      last: the hosts that are behind, see `over`.
      stacks: of all hosts, by number; empty where none has come.
    """
    known: int | None = last[0]
    if len(last) > 1:
        with_stack = [host for host in last if stacks.get(host)]
        known = odd({host: stacks[host] for host in with_stack})
    host = known
    if host is None:
        host = max(last, key=lambda host: places[host].age)

    place = places[host]
    level = [other for other in last if other != host]
    if known is None and level:
        are = "are hosts" if len(level) > 1 else "is host"
        numbers = ", ".join(map(str, level))
        rest = f", as {are} {numbers}: none is behind the others"
    else:
        rest = _waiting(places, host)
    how = (
        f"has been stuck for {place.age:.0f} s (limit {place.limit:.0f} s){rest}; it is"
    )
    stack = tuple(stacks.get(host, ()))
    return Fault(host, "stuck", how, place, stack)


def _waiting(places: Mapping[int, Place], host: int) -> str:
    """Return where all others wait; empty where there are none."""
    others = {
        f"{place.phase} at step {place.step}"
        for other, place in places.items()
        if other != host
    }
    return f", while the others wait in {', '.join(sorted(others))}" if others else ""


# ---- stacks ----


def frames(text: str) -> tuple[str, ...]:
    """Return "file:line in function" for the main thread, innermost first.

    Args:
      text: as faulthandler writes it, with the main thread last.
    """
    block = re.split(r"^.*\(most recent call first\):.*$", text, flags=re.MULTILINE)[-1]
    return tuple(
        f"{file}:{line} in {name}" for file, line, name in FRAME.findall(block)
    )


def innermost(stack: Sequence[str]) -> str | None:
    """Return the innermost frame of the user's, else of ours, else of any."""
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
    """Return the innermost frames with their source.

    The user's innermost one comes last if it is not among them.
    """
    selected = list(stack[:SHOWN])
    own = innermost(stack)
    if own and own not in selected:
        selected += ["...", own]

    lines = []
    for frame in selected:
        match = re.fullmatch(r"(.*):(\d+) in .+", frame)
        source = ""
        if match:
            file, number = match.groups()
            source = linecache.getline(file, int(number)).strip()
        lines.append(f"{frame}: {source}" if source else frame)
    return lines


# ---- whether to try again ----


class Budget:
    """Number of restarts that are left, and the pause before each.

    A failure that follows a checkpoint makes the budget whole again, and a day does so
    for what happened before.

    Args:
      restarts: number of failures without a checkpoint in between that are survived.
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
        """Number of restarts that are left."""
        return max(0, self.restarts - len(self.failures))

    def charge(
        self,
        fault: Fault,
        saved: int | None,
        now: float,
    ) -> float:
        """Return the seconds to pause before the next attempt.

        Args:
          fault: the end of this attempt.
          saved: the last step of which there is a checkpoint.
          now: monotonic time in seconds.

        Raises:
          HostsError: trying again is of no use, or not allowed.
        """
        if saved is not None and (self._saved is None or saved > self._saved):
            self.failures = []
            self._last = None
            self._saved = saved

        signature = (fault.cause, fault.place.phase, saved)
        self._same = self._same + 1 if signature == self._last else 1
        self._last = signature
        if self.restarts and self._same >= SAME:
            raise self._useless(fault, saved)

        self.failures = [when for when in self.failures if now - when < DAY]
        if not self.left:
            raise self._used_up(fault)
        pause = self.pause * 2 ** len(self.failures)
        self.failures.append(now)
        return min(LONGEST_PAUSE, pause)

    def _useless(
        self,
        fault: Fault,
        saved: int | None,
    ) -> HostsError:
        checkpoint = "no checkpoint"
        if saved is not None:
            checkpoint += f" since step {saved}"
        return fault.error(
            f", for the {_th(self._same)} time, and with {checkpoint}: it is not tried"
            " again",
            f"fix what stops it in {fault.place.phase}, then go on from the last"
            " checkpoint by --resume; or save more often",
            exit_code=2,
        )

    def _used_up(self, fault: Fault) -> HostsError:
        text = ""
        remedy = (
            f"see what host {fault.host} wrote above; go on from the last checkpoint by"
            " --resume"
        )
        if self.restarts == 0:
            remedy += ", and have that done by --restarts N"
        elif self.restarts == 1:
            text = ", and the one restart of --restarts is used up"
        else:
            text = f", and the {self.restarts} restarts of --restarts are used up"
        return fault.error(f"; all hosts were ended{text}", remedy)


def _th(count: int) -> str:
    return {1: "first", 2: "second", 3: "third"}.get(count, f"{count}th")

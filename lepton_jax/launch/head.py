"""Host 0's supervisor of supervisors: it hears of every host, says what it was when one
fails, and begins the next attempt.

An attempt is a *generation*: one worker process on each host that takes part. The
states, of which `Head._tick` is the map:

    meeting ──all there──► running ──a fault──► ending ──all ended──► waiting ──all back, or the grace over──► running
                              │                                                                                   │
                              └──a signal, or a host that came late──► stopping ──all ended──► over, or running ◄─┘
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import meeting, verdict
from lepton_jax.launch.cluster import Cluster, joined, split
from lepton_jax.launch.gate import Gate, Seat, signals_after
from lepton_jax.launch.record import HostRecord, Record, Recovery
from lepton_jax.launch.rules import RESTARTS, HostsError, Rules
from lepton_jax.launch.verdict import Fault, Place
from lepton_jax.launch.watchdog import AGAIN, EARLY, INTERRUPTED

TICK = 0.05
PING = 1.0
# a tick that comes so late says that this process was stopped, not that all others fell
# silent
HELD_UP = 2.0
STOP_START = 10.0
LATER = 8.0  # seconds in which the host behind it all must have ended, if there is one
STACK_TIME = 1.5  # seconds to wait for a stack
# exit codes of a worker that was asked to stop
STOPPED = (0, AGAIN, INTERRUPTED, -15, 143)


class Head:
    """Runs until the run is over; `run` returns its exit code.

    Args:
      cluster: as host 0 found it; without a coordinator, all hosts are on this machine.
      rules: limits, restarts, grace.
      facts: what must not differ between the hosts, by name.
      run: what the hosts of one run have in common, so that those of another are turned
        away.
      folder: of the run; None: nothing is written.
      limit: seconds in which all must have come.
      saved: the last step of which there is a checkpoint; None: as the run folder says.
      token: by which the hosts know each other; empty: one that only this process has.

    Raises:
      SettingError: the coordinator's port is taken; more hosts must be left than there
        are.
    """

    def __init__(
        self,
        cluster: Cluster,
        rules: Rules,
        facts: Mapping[str, str],
        run: str = "",
        folder: Path | None = None,
        limit: float = 50.0,
        saved: Callable[[], int | None] | None = None,
        token: str = "",
    ):
        if (rules.least_hosts or 0) > cluster.hosts:
            raise SettingError(
                f"--least-hosts is {rules.least_hosts}, and there are {cluster.hosts}",
                where=cluster,
                remedy=f"write at most {cluster.hosts}",
            )
        self.cluster = cluster
        self.rules = rules
        self.folder = folder
        self.limit = limit
        restarts = (
            rules.restarts
            if rules.restarts is not None
            else RESTARTS
            if cluster.hosts > 1
            else 0
        )
        self.budget = verdict.Budget(restarts, rules.pause)
        self.saved = saved or (lambda: committed(folder))
        self.record = Record(
            restarts_left=restarts,
            hosts={host: HostRecord() for host in range(cluster.hosts)},
        )
        self.gate = Gate(
            cluster,
            facts,
            run,
            self._obey,
            self._came,
            token,
        )
        self.seats = self.gate.seats
        self.name = (
            "127.0.0.1"
            if cluster.coordinator is None
            else split(cluster.coordinator)[0]
        )
        self.address = ("127.0.0.1", self.gate.port)
        self.members: list[int] = []  # the hosts that take part in this generation
        self.generation = self._floor = self._signals = self._own_signals = (
            self._heeded
        ) = 0
        self._exit: tuple[int, LeptonError | None] | None = None
        self._faults: list[Fault] = []  # of this generation, as they came
        self._at_once = 0  # how many of them came within a moment of the first
        self._fault: Fault | None = None  # what ended it
        self._why = ""  # of a stop: "person" or "again"
        now = time.monotonic()
        self._signalled = 0.0
        self._first = self._ticked = self._pinged = now
        self._until = now + limit  # of the state
        self._asked_at: float | None = None
        self._base = 0  # the step that the generation goes on from
        self._state: Callable[[float], None] = self._meeting

    def run(self) -> int:
        """Until the run is over: its exit code.

        Raises:
          LeptonError: what ended it, to be shown once.
        """
        try:
            while self._exit is None:
                self.gate.serve(TICK)
                self._tick(time.monotonic())
            code, error = self._exit
        finally:
            # what is wrong before anything has begun is told to all, later faults by
            # this host alone
            self.gate.close(
                *(
                    (self._exit[0], None if self.members else self._exit[1])
                    if self._exit
                    else (1, None)
                )
            )
        if error is not None:
            raise error
        return code

    def signalled(self) -> None:
        """A person, or the scheduler, asks for the end: the first time with a save, the
        second time at once. For handlers.
        """
        # a scheduler tells every host once, at any time: what others have heard makes
        # this one no second
        self._own_signals = signals_after(self._own_signals, self._signalled)
        self._signals = max(self._signals, self._own_signals)
        self._signalled = time.monotonic()

    # ---- what comes ----

    def _came(
        self,
        seat: Seat,
        generation: int,
    ) -> None:
        self._floor = max(self._floor, generation)  # of a head before this one
        if self._state in (self._running, self._stopping):
            self._say(f"host {seat.host} is there")

    def _obey(
        self,
        seat: Seat,
        message: dict[str, Any],
    ) -> None:
        """A supervisor tells of its worker; what it says of an earlier generation
        counts for nothing.
        """
        now = time.monotonic()
        kind = message.get("at")
        if kind == "signal":
            # a scheduler tells every host once
            self._signals = max(self._signals, message["count"])
            return
        if (
            message.get("generation") != self.generation
            or seat.generation != self.generation
        ):
            return
        if kind == "where":
            seat.hear(
                Place(*message["place"]),
                now,
                message["over"],
                message["silent"],
                message["state"],
            )
        elif kind == "stack":
            seat.stack = tuple(message["stack"])
        elif kind == "ended":
            seat.generation = None
            seat.code = message["code"]
            seat.error = message.get("error")
            if self._state == self._running and seat.code not in (
                0,
                AGAIN,
                INTERRUPTED,
                EARLY,
            ):
                self._faults.append(
                    verdict.died(
                        seat.host,
                        message["code"],
                        seat.place,
                        seat.error,
                    )
                )
                self._faulted(now)

    def _tick(self, now: float) -> None:
        late = now - self._ticked
        self._ticked = now
        if late > HELD_UP:
            self.gate.held_up(late)
            self._until += late
        gone = self.gate.lost(now, self.rules.lost)
        alone = self._alone(gone, now)
        for seat in gone:
            if (
                self._state == self._running
                and seat.host in self.members
                and seat.code is None
            ):
                how = f"is lost: {seat.line.fault}; it was last seen"
                self._faults.append(
                    alone
                    or Fault(
                        seat.host,
                        "lost",
                        how,
                        seat.place,
                    )
                )
                self._faulted(now)
        if now - self._pinged >= PING:
            self._pinged = now
            self.gate.tell("ping")
        # nothing has begun yet: better to mend it now
        if self.gate.misfit is not None and not self.members:
            self._over(2, self.gate.misfit)
        if self._exit is None:
            self._heed_signals(now)
        if self._exit is None:
            self._state(now)
        self._note(now)

    # ---- the states ----

    def _meeting(self, now: float) -> None:
        missing = [host for host in range(self.cluster.hosts) if host not in self.seats]
        if not missing:
            self._begin(now)
        elif now > self._until:
            if self.rules.least_hosts and len(self.seats) >= self.rules.least_hosts:
                self._say(
                    f"beginning without {_named(missing)}: not there within"
                    f" {self.limit:.0f} s"
                )
                self._begin(now)
            else:
                refused = str(self.gate.door.refused)
                self._over(
                    2,
                    meeting.missing(
                        missing,
                        self.cluster,
                        self.limit,
                        refused,
                    ),
                )

    def _begin(self, now: float) -> None:
        """The next generation, on all hosts that are there; what is left of the one
        before is forgotten.
        """
        assert all(seat.generation is None for seat in self.seats.values())
        self.generation = max(self.generation, self._floor) + 1
        self.members = sorted(self.seats)
        self.gate.begun = True
        self._faults = []
        self._at_once = 0
        self._fault = None
        self._asked_at = None
        self._why = ""
        self._base = self.saved() or 0
        address = (
            joined(self.name, self._free_port()) if len(self.members) > 1 else None
        )
        for number, host in enumerate(self.members):
            seat = self.seats[host]
            seat.forget(Place(limit=self.rules.limit("start")), now)
            seat.generation = self.generation
            seat.line.send(
                do="begin",
                generation=self.generation,
                hosts=len(self.members),
                host_id=number,
                coordinator=address,
                run_dir=None if self.folder is None else str(self.folder),
                limits=dict(self.rules.limits),
            )
        for recovery in self.record.recoveries[-1:]:
            recovery.begun = recovery.begun or now
        self._state = self._running

    def _running(self, now: float) -> None:
        seats = {host: self.seats[host] for host in self.members if host in self.seats}
        running = {host: seat for host, seat in seats.items() if seat.code is None}
        if self._faults:
            root = verdict.root(
                self._faults,
                self._at_once,
                self.members[0],
            )
            # who is behind it may be writing its core
            patience = LATER if root.rank >= verdict.CONSEQUENCE else 0.0
            if now >= self._until + patience or not running:
                self._end(root, now)
        elif not running:
            codes = {seat.code for seat in seats.values()}
            if codes == {0}:
                self._over(0)
            elif AGAIN in codes:
                self._wait(now, self.rules.pause)
            else:
                self._over(INTERRUPTED)
        elif any(seat.code in (AGAIN, INTERRUPTED, EARLY) for seat in seats.values()):
            self._stop(
                (
                    "again"
                    if any(seat.code == AGAIN for seat in seats.values())
                    else "person"
                ),
                now,
            )
        elif self.seats.keys() - self.members:
            late = sorted(self.seats.keys() - self.members)
            self._say(f"taking in {_named(late)}: all save, and go on together")
            self._stop("again", now)
        else:
            self._watch(running, now)
        self._stepped(now)

    def _watch(
        self,
        running: Mapping[int, Seat],
        now: float,
    ) -> None:
        """Whether one has fallen silent, or is stuck; then its stack is asked for, and
        at its arrival that is a fault.
        """
        limit = self.rules.limit("silence")
        silent = [seat for seat in running.values() if seat.silent > limit]
        places = {host: seat.where(now) for host, seat in running.items()}
        waiting = verdict.over(
            places, {host for host, seat in running.items() if seat.over}
        )
        suspects = silent or [running[host] for host in waiting]
        if not suspects:
            self._asked_at = None
            return
        self._asked_at = now if self._asked_at is None else self._asked_at
        for seat in suspects:
            if not seat.asked and not seat.stack:
                seat.asked = True
                seat.line.send(do="stack")
        dumb = all(seat.stack or seat.state == "T" for seat in suspects)
        if not dumb and now < self._asked_at + STACK_TIME:
            return
        if silent:
            seat = silent[0]
            why = (
                "the process is stopped"
                if seat.state == "T"
                else "no thread of it gets to run Python"
            )
            how = (
                f"has been silent for {seat.silent:.0f} s (limit {limit:g} s): {why};"
                " it was last seen"
            )
            fault = Fault(
                seat.host,
                "silent",
                how,
                seat.place,
                seat.stack,
            )
        else:
            fault = verdict.stuck(
                places,
                waiting,
                {host: seat.stack for host, seat in running.items()},
            )
        self._end(fault, now)

    def _alone(
        self,
        gone: Sequence[Seat],
        now: float,
    ) -> Fault | None:
        """Where several others have fallen silent at once, it is this host that the
        network has lost.
        """
        seats = {seat.host: seat for seat in (*self.seats.values(), *gone)}
        others = [seats[host] for host in self.members if host in seats and host != 0]
        # they should speak each half second
        silent = [
            seat for seat in others if now - seat.line.heard > self.rules.lost / 2
        ]
        if (
            len(others) < max(2, len(self.members) - 1)
            or silent != others
            or 0 not in self.seats
        ):
            return None
        return Fault(
            0,
            "lost",
            "has lost all others at once: no word from"
            f" {_named([seat.host for seat in others])} for {self.rules.lost:g} s; its"
            " own network may be down; it was last seen",
            self.seats[0].place,
        )

    def _faulted(self, now: float) -> None:
        """The first fault of a generation gives the others a moment to be told as
        well.
        """
        if len(self._faults) == 1:
            self._first = now
            self._until = now + self.rules.settle
        if now <= self._until:
            self._at_once = len(self._faults)

    def _end(
        self,
        fault: Fault,
        now: float,
    ) -> None:
        """All workers, for one has failed."""
        seat = self.seats.get(fault.host)
        since = (
            now
            if fault.cause not in ("stuck", "silent", "lost") or seat is None
            else seat.at - seat.place.age
        )
        seen = self._first if self._faults else now
        self.record.recoveries.append(
            Recovery(
                self.generation,
                fault,
                seen,
                min(since, seen),
            )
        )
        self._fault = fault
        self.gate.tell(
            "end",
            generation=self.generation,
            seconds=self.rules.ending,
        )
        self._until = now + 2 * self.rules.ending + self.rules.lost
        self._state = self._ending

    def _stop(
        self,
        why: str,
        now: float,
    ) -> None:
        """All workers, with a save."""
        self._why = why
        self.gate.tell("stop", generation=self.generation)
        places = [self.seats[host].place for host in self.members if host in self.seats]
        starts = any(
            at.phase == "start" or (at.phase == "agreement" and at.step <= self._base)
            for at in places
        )
        # where a host is still starting there is nothing to save yet
        limit = self.rules.limit("stop")
        self._until = now + (min(limit, STOP_START) if starts else limit)
        self._state = self._stopping

    def _busy(self) -> list[Seat]:
        return [seat for seat in self.seats.values() if seat.generation is not None]

    def _stopping(self, now: float) -> None:
        seats = [self.seats[host] for host in self.members if host in self.seats]
        busy = self._busy()
        failed = len(seats) < len(self.members) or any(
            seat.code not in STOPPED for seat in seats if seat.code is not None
        )
        if busy and failed:  # the others can't save without it
            self._until = min(self._until, now + self.rules.ending)
        if busy and now < self._until:
            return
        if busy:
            places = ", ".join(
                f"host {seat.host} {seat.where(now)}" for seat in busy[:4]
            )
            self._say(f"ended without a save: {places}")
            self.gate.tell(
                "end",
                generation=self.generation,
                seconds=self.rules.ending,
            )
            self._until = now + 2 * self.rules.ending + self.rules.lost
            self._state = self._ending
        else:
            self._stopped(now, [seat.code for seat in seats])

    def _stopped(
        self,
        now: float,
        codes: list[int | None],
    ) -> None:
        for seat in self.seats.values():
            if seat.error is not None:
                self._say(
                    f"host {seat.host} ended with an error: {seat.error.get('what')}"
                )
        whole = len(codes) == len(self.members) and set(codes) == {0}
        if whole or self._why == "person":
            self._over(0 if whole else INTERRUPTED)
        else:
            self._wait(now, 0.0)

    def _ending(self, now: float) -> None:
        busy = self._busy()
        if busy and now < self._until:
            return
        for seat in busy:  # its supervisor does not do what it is told
            seat.line.give_up("it did not end its worker")
        if busy:
            return
        if self._fault is None or self._why == "person":
            self._stopped(now, [])
            return
        self.record.recoveries[-1].ended = now
        if self._fault.mistake is not None:
            self._over(2, verdict.mistaken(self._fault))
            return
        try:
            pause = self.budget.charge(
                self._fault,
                self.saved(),
                now,
            )
        except HostsError as error:
            self._over(error.exit_code, error)
            return
        self.record.restarts += 1
        self._say(
            f"{self._fault}; restart {len(self.budget.failures)} of"
            f" {self.budget.restarts} in {pause:g} s{self._fault.story()}"
        )
        self._wait(now, pause)

    def _wait(
        self,
        now: float,
        pause: float,
    ) -> None:
        self._first = now
        self._until = now + pause
        self._asked_at = None
        self._state = self._waiting

    def _waiting(self, now: float) -> None:
        """For the back-off, and for the hosts that took part until now."""
        if now < self._until:
            return
        missing = [host for host in self.members if host not in self.seats]
        if missing and now < self._first + self.rules.grace:
            if self._asked_at is None or now - self._asked_at > 60:
                self._say(
                    f"waiting for {_named(missing)}, up to {self.rules.grace:g} s"
                )
                self._asked_at = now
            return
        least = self.rules.least_hosts or self.cluster.hosts
        if missing and (len(self.seats) < least or 0 not in self.seats):
            few = (
                f"; {len(self.seats)} are left, and --least-hosts is {least}"
                if self.rules.least_hosts
                else "; the run may go on without them only by --least-hosts"
            )
            what = (
                f"{_named(missing)} did not come back within {self.rules.grace:g}"
                f" s{few}"
            )
            what += f"; before, {self._fault}" if self._fault else ""
            self._over(
                1,
                HostsError(
                    what,
                    where=self.cluster,
                    remedy=(
                        "mend or replace them and go on by --resume, or give "
                        "--least-hosts K"
                    ),
                ),
            )
            return
        if missing:
            self._say(f"going on without {_named(missing)}")
        self._begin(now)

    def _over(
        self,
        code: int,
        error: LeptonError | None = None,
    ) -> None:
        self._exit = (code, error)
        self.record.exit_code = code

    # ---- small things ----

    def _heed_signals(self, now: float) -> None:
        if self._signals == self._heeded:
            return
        self._heeded = self._signals
        if self._state in (self._meeting, self._waiting):
            self._over(INTERRUPTED)
        elif self._signals > 1:
            self._why = "person"
            self.gate.tell(
                "end",
                generation=self.generation,
                seconds=0.0,
            )
            self._until = now + self.rules.lost
            self._state = self._ending
        elif self._state == self._running:
            self._stop("person", now)
        else:
            self._why = "person"

    def _free_port(self) -> int:
        """One for JAX on this machine: near the coordinator's, and another than the
        generation before had.
        """
        near = self.gate.port + 1 + (self.generation - 1) % 16
        for port in (near, 0) if near < 65536 else (0,):
            with (
                contextlib.suppress(OSError),
                socket.socket(self.gate.listener.family) as probe,
            ):
                probe.bind((self.gate.listener.getsockname()[0], port))
                return probe.getsockname()[1]
        raise HostsError(
            "no port is free for JAX",
            where=self.cluster,
            remedy="end what uses them, and start again",
        )

    def _stepped(self, now: float) -> None:
        last = self.record.recoveries[-1] if self.record.recoveries else None
        if (
            last is None
            or last.begun is None
            or last.stepped is not None
            or self._state != self._running
        ):
            return
        if all(
            host in self.seats and self.seats[host].place.step > self._base
            for host in self.members
        ):
            last.stepped = now

    def _note(self, now: float) -> None:
        """Into the record."""
        record = self.record
        state = "over" if self._exit else self._state.__name__.strip("_")
        changed = (state, self.generation) != (record.state, record.generation)
        record.state = state
        record.generation = self.generation
        record.restarts_left = self.budget.left
        record.refused_connections = self.gate.door.refused.count
        for host, each in record.hosts.items():
            seat = self.seats.get(host)
            each.state = (
                ("lost" if each.heard else "missing")
                if seat is None
                else (
                    "running"
                    if seat.generation
                    else "waiting"
                    if seat.code is None
                    else "ended"
                )
            )
            each.host_id = self.members.index(host) if host in self.members else None
            if seat is not None:
                each.name = seat.name
                each.hear(
                    seat.place,
                    seat.at or now,
                    seat.silent,
                )
        if self.members:
            record.write(self.folder, now, at_once=changed)

    def _say(self, text: str) -> None:
        # a closed terminal is no reason to end the run
        with contextlib.suppress(OSError):
            print(f"hosts: {text}", file=sys.stderr, flush=True)


def committed(folder: Path | None) -> int | None:
    """The last step of which the run folder holds a checkpoint; one that is being
    written has another kind of name.
    """
    steps: list[int] = []
    if folder is not None:
        with contextlib.suppress(OSError):
            steps = [
                int(each.name)
                for each in (folder / "checkpoints").iterdir()
                if re.fullmatch(r"\d+", each.name)
            ]
    return max(steps, default=None)


def _named(hosts: list[int]) -> str:
    return f"host{'s' * (len(hosts) > 1)} {', '.join(map(str, hosts[:8]))}" + (
        " and more" if len(hosts) > 8 else ""
    )

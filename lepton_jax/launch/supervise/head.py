"""Host 0's supervisor of supervisors: it names the host that failed, and goes on.

An attempt is a *generation*: one worker process on each host that takes part. The
states, of which `Head._tick` is the map:

    meeting ───── all are there ──────────────────────► running
    running ───── a fault ────────────────────────────► ending
    ending ────── all workers have ended ─────────────► waiting, or over
    waiting ───── all are back, or the grace is over ─► running, or over
    running ───── a signal, or a host that came late ─► stopping
    stopping ──── all workers have saved and ended ───► over, or waiting

A worked example with two hosts, of which host 1 runs out of memory:

    second   state      events
     0.0     meeting    both supervisors say hello
     0.1     running    "begin" to both: generation 1, 2 hosts, a port for JAX
    40.0                host 0 reports steps at step 9, host 1 reports data at step 9
    41.0                host 1 reports "ended" with code -9: the first fault
    41.5     ending     for half a second a better reason might have come; the verdict
                        is "host 1 was ended by SIGKILL"; "end" to both
    43.0     waiting    host 0's worker has ended too; of 10 restarts this is the first,
                        1 s from now
    44.0     running    "begin" to both: generation 2, another port; the workers go on
                        from the last committed checkpoint, say of step 8

Each message carries its generation: were host 0's "ended" of generation 1 to come after
second 44, it would say nothing about the worker of generation 2. Had host 1's machine
gone down with its supervisor, the state would stay `waiting` for the grace; then the
run ends, or, with --least-hosts 1, begins generation 2 with host 0 alone.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import meeting
from lepton_jax.launch.cluster import Cluster, joined, split
from lepton_jax.launch.supervise import verdict
from lepton_jax.launch.supervise.gate import Gate, Seat, signals_after
from lepton_jax.launch.supervise.record import HostRecord, Record, Recovery
from lepton_jax.launch.supervise.rules import RESTARTS, HostsError, Rules
from lepton_jax.launch.supervise.verdict import Fault, Place
from lepton_jax.launch.supervise.watchdog import AGAIN, EARLY, INTERRUPTED

TICK = 0.05  # seconds
PING = 1.0  # seconds between two words to all supervisors
# seconds: a tick that comes so late says that this process was stopped, not that all
# others fell silent
HELD_UP = 2.0
# assumptions, in seconds
STOP_START = 10.0  # for a stop where a host is still starting
LATER = 8.0  # in which the host behind it all must have ended, if there is one
STACK_TIME = 1.5  # to wait for a stack
SAY_AGAIN = 60.0  # between two lines about hosts that are waited for
PORTS = 16  # ports for JAX next to the coordinator's, taken in turn
MOST_NAMED = 8  # hosts that a line lists
# exit codes of a worker that was asked to stop
STOPPED = (0, AGAIN, INTERRUPTED, -15, 143)
# exit codes that are no fault
WITHOUT_FAULT = (0, AGAIN, INTERRUPTED, EARLY)


class Head:
    """The head of a run's supervisors; `run` returns the run's exit code.

    Args:
      cluster: as host 0 found it; without a coordinator, all hosts are on this machine.
      rules: limits, restarts, grace.
      facts: texts that must not differ between the hosts, by name.
      run: text that the hosts of one run have in common, so that those of another are
        turned away.
      folder: of the run; None: nothing is written.
      limit: seconds in which all must have come.
      saved: returns the last step of which there is a checkpoint; None: as the run
        folder says.
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
        _check_least(cluster, rules)
        self.cluster = cluster
        self.rules = rules
        self.folder = folder
        self.limit = limit
        self.saved = saved or (lambda: committed(folder))
        self.budget = verdict.Budget(_restarts(cluster, rules), rules.pause)
        self.record = Record(
            restarts_left=self.budget.restarts,
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
        self.name = "127.0.0.1"
        if cluster.coordinator is not None:
            self.name = split(cluster.coordinator)[0]
        self.address = ("127.0.0.1", self.gate.port)

        # of this generation
        self.members: list[int] = []  # the hosts that take part
        self.generation = 0
        self._floor = 0  # the last generation of a head before this one
        self._base = 0  # the step that it goes on from
        self._faults: list[Fault] = []  # as they came
        self._at_once = 0  # how many of them came within a moment of the first
        self._fault: Fault | None = None  # the one that ended it
        self._why = ""  # of a stop: "person" or "again"

        self._signals = 0  # of all hosts
        self._own_signals = 0
        self._heeded = 0
        self._signalled = 0.0

        now = time.monotonic()
        self._first = now  # of the faults, or of the state "waiting"
        self._ticked = now
        self._pinged = now
        self._until = now + limit  # of the state
        self._asked_at: float | None = None
        self._exit: tuple[int, LeptonError | None] | None = None
        self._state: Callable[[float], None] = self._meeting

    def run(self) -> int:
        """Serve until the run is over; return its exit code.

        Raises:
          LeptonError: the error that ended the run, to be shown once.
        """
        code = 1
        error: LeptonError | None = None
        try:
            while self._exit is None:
                self.gate.serve(TICK)
                self._tick(time.monotonic())
            code, error = self._exit
        finally:
            # an error before anything has begun is told to all, a later one is shown by
            # this host alone
            self.gate.close(code, None if self.members else error)
        if error is not None:
            raise error
        return code

    def signalled(self) -> None:
        """Take a person's or the scheduler's signal; made for signal handlers.

        The first one asks for an end with a save, the second one for an end at once.
        """
        # a scheduler tells every host once, at any time: a signal that others have
        # heard is not the first of two
        self._own_signals = signals_after(self._own_signals, self._signalled)
        self._signals = max(self._signals, self._own_signals)
        self._signalled = time.monotonic()

    # ---- what comes ----

    def _came(
        self,
        seat: Seat,
        generation: int,
    ) -> None:
        self._floor = max(self._floor, generation)
        if self._state in (self._running, self._stopping):
            self._say(f"host {seat.host} is there")

    def _obey(
        self,
        seat: Seat,
        message: dict[str, Any],
    ) -> None:
        """Take a supervisor's report, unless it is about an earlier generation.

        Raises:
          KeyError, TypeError, ValueError: it is no such report.
        """
        now = time.monotonic()
        kind = message.get("at")
        if kind == "signal":
            # a scheduler tells every host once
            self._signals = max(self._signals, message["count"])
            return
        if message.get("generation") != self.generation:
            return
        if seat.generation != self.generation:
            return

        if kind == "where":
            place = Place(*message["place"])
            silent = message["silent"]
            seat.hear(
                place,
                now,
                message["over"],
                silent,
                message["state"],
            )
        elif kind == "stack":
            seat.stack = tuple(message["stack"])
        elif kind == "ended":
            seat.generation = None
            seat.code = message["code"]
            seat.error = message.get("error")
            if self._state == self._running and seat.code not in WITHOUT_FAULT:
                code = message["code"]
                fault = verdict.died(
                    seat.host,
                    code,
                    seat.place,
                    seat.error,
                )
                self._faulted(fault, now)

    def _faulted(self, fault: Fault, now: float) -> None:
        """Note a fault; the first one gives the others a moment to come as well."""
        self._faults.append(fault)
        if len(self._faults) == 1:
            self._first = now
            self._until = now + self.rules.settle
        if now <= self._until:
            self._at_once = len(self._faults)

    # ---- a tick ----

    def _tick(self, now: float) -> None:
        self._make_up_for_delay(now)
        self._look_for_lost(now)
        if now - self._pinged >= PING:
            self._pinged = now
            self.gate.tell("ping")

        # nothing has begun yet: better to end now, so that a person can fix it
        if self.gate.misfit is not None and not self.members:
            self._over(2, self.gate.misfit)
        if self._exit is None:
            self._heed_signals(now)
        if self._exit is None:
            self._state(now)
        self._note(now)

    def _make_up_for_delay(self, now: float) -> None:
        late = now - self._ticked
        self._ticked = now
        if late > HELD_UP:
            self.gate.held_up(late)
            self._until += late

    def _look_for_lost(self, now: float) -> None:
        """Note hosts whose supervisors are lost while they train."""
        gone = self.gate.lost(now, self.rules.lost)
        alone = self._alone(gone, now)
        for seat in gone:
            trains = seat.host in self.members and seat.code is None
            if self._state == self._running and trains:
                how = f"is lost: {seat.line.fault}; it was last seen"
                fault = alone or Fault(
                    seat.host,
                    "lost",
                    how,
                    seat.place,
                )
                self._faulted(fault, now)

    def _alone(
        self,
        gone: Sequence[Seat],
        now: float,
    ) -> Fault | None:
        """Return the fault of this host, if the network has lost it rather than others.

        That is so where several others have fallen silent at once.
        """
        seats = {seat.host: seat for seat in (*self.seats.values(), *gone)}
        others = [seats[host] for host in self.members if host in seats and host != 0]
        # they should speak each half second
        patience = self.rules.lost / 2
        silent = [seat for seat in others if now - seat.line.heard > patience]
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
            f" {_named(seat.host for seat in others)} for {self.rules.lost:g} s; its"
            " own network may be down; it was last seen",
            self.seats[0].place,
        )

    def _heed_signals(self, now: float) -> None:
        if self._signals == self._heeded:
            return
        self._heeded = self._signals
        if self._state in (self._meeting, self._waiting):
            self._over(INTERRUPTED)
        elif self._signals > 1:
            self._why = "person"
            self._tell_to_end(0.0)
            self._until = now + self.rules.lost
        elif self._state == self._running:
            self._stop("person", now)
        else:
            self._why = "person"

    # ---- the state "meeting" ----

    def _meeting(self, now: float) -> None:
        hosts = range(self.cluster.hosts)
        missing = [host for host in hosts if host not in self.seats]
        if not missing:
            self._begin(now)
        elif now > self._until:
            least = self.rules.least_hosts
            if least and len(self.seats) >= least:
                self._say(
                    f"beginning without {_named(missing)}: not there within"
                    f" {self.limit:.0f} s"
                )
                self._begin(now)
            else:
                refused = str(self.gate.door.refused)
                fault = meeting.missing(
                    missing,
                    self.cluster,
                    self.limit,
                    refused,
                )
                self._over(2, fault)

    def _begin(self, now: float) -> None:
        """Begin the next generation, on all hosts that are there.

        The faults of the one before are forgotten.
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

        address = None
        if len(self.members) > 1:
            address = joined(self.name, self._free_port())
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

    def _free_port(self) -> int:
        """Return a port for JAX on this machine.

        It is near the coordinator's, and another than the generation before had.
        """
        near = self.gate.port + 1 + (self.generation - 1) % PORTS
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

    # ---- the state "running" ----

    def _running(self, now: float) -> None:
        seats = self._member_seats()
        running = {seat.host: seat for seat in seats if seat.code is None}
        codes = {seat.code for seat in seats}
        late = self.seats.keys() - self.members
        if self._faults:
            self._judge(bool(running), now)
        elif not running:
            self._finish(codes, now)
        elif AGAIN in codes:
            self._stop("again", now)
        elif codes & {INTERRUPTED, EARLY}:
            self._stop("person", now)
        elif late:
            self._say(f"taking in {_named(sorted(late))}: all save, and go on together")
            self._stop("again", now)
        else:
            self._watch(running, now)
        self._note_first_step(now)

    def _judge(self, some_run: bool, now: float) -> None:
        """End the generation once it is known which fault is behind the others."""
        root = verdict.root(
            self._faults,
            self._at_once,
            self.members[0],
        )
        # the host behind it all may be writing its core
        patience = LATER if root.rank >= verdict.CONSEQUENCE else 0.0
        if now >= self._until + patience or not some_run:
            self._end(root, now)

    def _finish(
        self,
        codes: set[int | None],
        now: float,
    ) -> None:
        """Go on after all workers have ended without a fault."""
        if codes == {0}:
            self._over(0)
        elif AGAIN in codes:
            self._wait(now, self.rules.pause)
        else:
            self._over(INTERRUPTED)

    def _watch(
        self,
        running: Mapping[int, Seat],
        now: float,
    ) -> None:
        """Look for a host that has fallen silent or is stuck.

        Its stack is asked for; when that arrives, or the time for it is over, the
        generation ends.
        """
        limit = self.rules.limit("silence")
        silent = [seat for seat in running.values() if seat.silent > limit]
        places = {host: seat.where(now) for host, seat in running.items()}
        reported = {host for host, seat in running.items() if seat.over}
        behind = verdict.over(places, reported)
        suspects = silent or [running[host] for host in behind]
        if not suspects:
            self._asked_at = None
            return

        if self._asked_at is None:
            self._asked_at = now
        for seat in suspects:
            if not seat.asked and not seat.stack:
                seat.asked = True
                seat.line.send(do="stack")
        # a process that is stopped can't write its stack
        complete = all(seat.stack or seat.state == "T" for seat in suspects)
        if not complete and now < self._asked_at + STACK_TIME:
            return

        if silent:
            fault = _silent(silent[0], limit)
        else:
            stacks = {host: seat.stack for host, seat in running.items()}
            fault = verdict.stuck(places, behind, stacks)
        self._end(fault, now)

    def _note_first_step(self, now: float) -> None:
        """Note in the record when all hosts have trained a step after a fault."""
        if self._state != self._running or not self.record.recoveries:
            return
        last = self.record.recoveries[-1]
        if last.begun is None or last.stepped is not None:
            return
        if all(
            host in self.seats and self.seats[host].place.step > self._base
            for host in self.members
        ):
            last.stepped = now

    # ---- the state "stopping": all workers save, and end ----

    def _stop(
        self,
        why: str,
        now: float,
    ) -> None:
        """Ask all workers to stop with a save."""
        self._why = why
        self.gate.tell("stop", generation=self.generation)
        starts = any(self._starts(seat.place) for seat in self._member_seats())
        # where a host is still starting there is nothing to save yet
        limit = self.rules.limit("stop")
        self._until = now + (min(limit, STOP_START) if starts else limit)
        self._state = self._stopping

    def _starts(self, place: Place) -> bool:
        waits_at_start = place.phase == "agreement" and place.step <= self._base
        return place.phase == "start" or waits_at_start

    def _stopping(self, now: float) -> None:
        seats = self._member_seats()
        busy = self._busy()
        codes = [seat.code for seat in seats]
        failed = len(seats) < len(self.members) or any(
            code not in STOPPED for code in codes if code is not None
        )
        if busy and failed:  # the others can't save without it
            self._until = min(self._until, now + self.rules.ending)

        if not busy:
            self._stopped(now, codes)
        elif now >= self._until:
            places = [f"host {seat.host} {seat.where(now)}" for seat in busy[:4]]
            self._say(f"ended without a save: {', '.join(places)}")
            self._end_all(now)

    def _stopped(
        self,
        now: float,
        codes: list[int | None],
    ) -> None:
        """Go on after a stop: the run is over, or begins anew.

        Args:
          now: monotonic time in seconds.
          codes: exit codes of the workers that are known.
        """
        for seat in self.seats.values():
            if seat.error is not None:
                what = seat.error.get("what")
                self._say(f"host {seat.host} ended with an error: {what}")
        whole = len(codes) == len(self.members) and set(codes) == {0}
        if whole:
            self._over(0)
        elif self._why == "person":
            self._over(INTERRUPTED)
        else:
            self._wait(now, 0.0)

    # ---- the state "ending": all workers end at once ----

    def _end(
        self,
        fault: Fault,
        now: float,
    ) -> None:
        """End all workers, for one has failed."""
        seen = self._first if self._faults else now
        since = now
        seat = self.seats.get(fault.host)
        if seat is not None and fault.cause in ("stuck", "silent", "lost"):
            since = seat.at - seat.place.age
        self.record.recoveries.append(
            Recovery(self.generation, fault, seen, min(since, seen))
        )
        self._fault = fault
        self._end_all(now)

    def _end_all(self, now: float) -> None:
        self._tell_to_end(self.rules.ending)
        self._until = now + 2 * self.rules.ending + self.rules.lost

    def _tell_to_end(self, seconds: float) -> None:
        """Have all workers ended, by SIGKILL after some seconds."""
        self.gate.tell(
            "end",
            generation=self.generation,
            seconds=seconds,
        )
        self._state = self._ending

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
        self._try_again(self._fault, now)

    def _try_again(self, fault: Fault, now: float) -> None:
        """Wait for the next attempt, if the budget allows one."""
        try:
            pause = self.budget.charge(
                fault,
                self.saved(),
                now,
            )
        except HostsError as error:
            self._over(error.exit_code, error)
            return
        self.record.restarts += 1
        self._say(
            f"{fault}; restart {len(self.budget.failures)} of"
            f" {self.budget.restarts} in {pause:g} s{fault.story()}"
        )
        self._wait(now, pause)

    def _member_seats(self) -> list[Seat]:
        """Return the hosts of this generation whose supervisors are connected."""
        return [self.seats[host] for host in self.members if host in self.seats]

    def _busy(self) -> list[Seat]:
        """Return the hosts on which a worker still runs."""
        return [seat for seat in self.seats.values() if seat.generation is not None]

    # ---- the state "waiting": for a pause, and for lost hosts ----

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
        if now < self._until:
            return
        missing = [host for host in self.members if host not in self.seats]
        if missing and now < self._first + self.rules.grace:
            if self._asked_at is None or now - self._asked_at > SAY_AGAIN:
                self._say(
                    f"waiting for {_named(missing)}, up to {self.rules.grace:g} s"
                )
                self._asked_at = now
            return

        least = self.rules.least_hosts or self.cluster.hosts
        if missing and (len(self.seats) < least or 0 not in self.seats):
            self._over(1, self._not_back(missing, least))
            return
        if missing:
            self._say(f"going on without {_named(missing)}")
        self._begin(now)

    def _not_back(
        self,
        missing: list[int],
        least: int,
    ) -> HostsError:
        what = f"{_named(missing)} did not come back within {self.rules.grace:g} s"
        if self.rules.least_hosts:
            what += f"; {len(self.seats)} are left, and --least-hosts is {least}"
        else:
            what += "; the run may go on without them only by --least-hosts"
        if self._fault:
            what += f"; before, {self._fault}"
        return HostsError(
            what,
            where=self.cluster,
            remedy=(
                "fix or replace them and go on by --resume, or give --least-hosts K"
            ),
        )

    # ---- the end, and what is told of it ----

    def _over(
        self,
        code: int,
        error: LeptonError | None = None,
    ) -> None:
        self._exit = (code, error)
        self.record.exit_code = code

    def _note(self, now: float) -> None:
        """Bring the record up to date, and write it."""
        record = self.record
        state = "over" if self._exit else self._state.__name__.strip("_")
        changed = (state, self.generation) != (record.state, record.generation)
        record.state = state
        record.generation = self.generation
        record.restarts_left = self.budget.left
        record.refused_connections = self.gate.door.refused.count
        for host, host_record in record.hosts.items():
            seat = self.seats.get(host)
            host_record.state = _state_of(seat, host_record)
            host_record.host_id = None
            if host in self.members:
                host_record.host_id = self.members.index(host)
            if seat is not None:
                host_record.name = seat.name
                host_record.hear(
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
    """Return the last step of which the run folder holds a checkpoint.

    One that is being written has another kind of name.
    """
    if folder is None:
        return None
    steps: list[int] = []
    with contextlib.suppress(OSError):
        steps = [
            int(path.name)
            for path in (folder / "checkpoints").iterdir()
            if re.fullmatch(r"\d+", path.name)
        ]
    return max(steps, default=None)


def _check_least(cluster: Cluster, rules: Rules) -> None:
    if (rules.least_hosts or 0) > cluster.hosts:
        raise SettingError(
            f"--least-hosts is {rules.least_hosts}, and there are {cluster.hosts}",
            where=cluster,
            remedy=f"write at most {cluster.hosts}",
        )


def _restarts(cluster: Cluster, rules: Rules) -> int:
    """Return how many failures the run survives."""
    if rules.restarts is not None:
        return rules.restarts
    return RESTARTS if cluster.hosts > 1 else 0


def _silent(seat: Seat, limit: float) -> Fault:
    """Return the fault of a worker that has said nothing for `limit` seconds."""
    why = "no thread of it gets to run Python"
    if seat.state == "T":
        why = "the process is stopped"
    how = (
        f"has been silent for {seat.silent:.0f} s (limit {limit:g} s): {why};"
        " it was last seen"
    )
    return Fault(
        seat.host,
        "silent",
        how,
        seat.place,
        seat.stack,
    )


def _state_of(seat: Seat | None, record: HostRecord) -> str:
    """Return the state of a host, for the record."""
    if seat is None:
        return "lost" if record.heard else "missing"
    if seat.generation:
        return "running"
    return "waiting" if seat.code is None else "ended"


def _named(hosts: Iterable[int]) -> str:
    """Return "host 3", "hosts 3, 5", or the first eight of many hosts."""
    numbers = [*map(str, hosts)]
    text = f"host{'s' if len(numbers) > 1 else ''} {', '.join(numbers[:MOST_NAMED])}"
    return text + (" and more" if len(numbers) > MOST_NAMED else "")

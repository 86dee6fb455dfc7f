"""The supervisor of one host: a process around the training process.

It starts the worker as the head says, reports on it to the head, and ends it when the
head is lost. Nothing outlives a restart but the connection to the head: every attempt
is a new process with a new port for JAX, and every message carries the number of its
attempt. `head` shows an example of what the two say to each other.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import meeting, proof, tokens
from lepton_jax.launch.children import forward, variables
from lepton_jax.launch.cluster import Cluster, joined, split
from lepton_jax.launch.supervise.gate import CHANNEL, signals_after
from lepton_jax.launch.supervise.head import HELD_UP, Head
from lepton_jax.launch.supervise.rules import HostsError, Rules
from lepton_jax.launch.supervise.verdict import MISTAKE
from lepton_jax.launch.supervise.watchdog import INTERRUPTED
from lepton_jax.launch.supervise.worker import Worker
from lepton_jax.launch.wire import Line

TICK = 0.1  # seconds
REPORT_EVERY = 0.5  # seconds
AGAIN_AFTER = 0.5  # seconds between two attempts to connect
CALL_TIME = 5.0  # seconds for one attempt to connect
LEAST_CALL_TIME = 0.1
QUIET = 1.0  # seconds of silence from which on the system's word on a worker is asked
# the fields of the message "begin" that are for the worker
FOR_THE_WORKER = (
    "generation",
    "hosts",
    "host_id",
    "coordinator",
    "run_dir",
    "limits",
)


def wanted(cluster: Cluster, rules: Rules) -> bool:
    """Whether the run is watched.

    Several hosts always are; one alone is where it may be restarted.
    """
    return cluster.hosts > 1 or bool(rules.restarts)


@dataclass(frozen=True)
class WatchedRun:
    """A run, as the supervisors of one process know it.

    Args:
      cluster: as this host found it.
      rules: limits, restarts, grace; those of host 0 count, but for `grace`, `lost` and
        `ending`.
      command: of a worker, which hears the rest by `watchdog.begin`.
      facts: texts that must not differ between the hosts, by name.
      limit: seconds in which all must have come.
      name: text that the hosts of one run have in common, so that those of another are
        turned away.
      folder: of the run.
      environment: variables on top of this process's own.
    """

    cluster: Cluster
    rules: Rules
    command: Sequence[str]
    facts: Mapping[str, str]
    limit: float
    name: str = ""
    folder: Path | None = None
    environment: Mapping[str, str] | None = None

    @property
    def all_here(self) -> bool:
        """Whether all hosts are on this machine."""
        return self.cluster.coordinator is None


def run(
    watched: WatchedRun,
    token: tokens.Token | None = None,
) -> dict[str, Any]:
    """Watch over this host's share of a run until it is over.

    Host 0 is the head as well. Where all hosts are on this machine, this process
    watches over each of them.

    Args:
      watched: the run.
      token: by which the hosts know each other; None: as `tokens.of_run` finds it with
        the run's folder.

    Returns:
      {"status": "finished", "interrupted" or "failed", "exit_code": ...}.

    Raises:
      LeptonError: the hosts do not meet; on host 0 also the error that ended the run.
    """
    cluster = watched.cluster
    token = token or tokens.of_run(cluster, watched.folder)
    if cluster.host_id == 0:
        code = _run_head(watched, token)
    else:
        name, port = split(cluster.coordinator or "")
        address = (name, int(port))
        supervisor = Supervisor(watched, cluster.host_id, address, token)
        with _signals(supervisor.signalled):
            code = supervisor.run()
    return {
        "status": {0: "finished", INTERRUPTED: "interrupted"}.get(code, "failed"),
        "exit_code": code,
    }


def _run_head(watched: WatchedRun, token: tokens.Token) -> int:
    """Run the head, and the supervisors of this process in threads; return the code."""
    head = Head(
        watched.cluster,
        watched.rules,
        watched.facts,
        watched.name,
        watched.folder,
        watched.limit,
        token=_at_head(token),
    )
    supervisors = [
        Supervisor(
            watched,
            host,
            head.address,
            tokens.Token(head.gate.token),
            secret=head.gate.secret,
        )
        for host in range(watched.cluster.hosts if watched.all_here else 1)
    ]
    threads = [
        threading.Thread(
            target=supervisor.run_quietly, name=f"supervisor {supervisor.host}"
        )
        for supervisor in supervisors
    ]
    with _signals(head.signalled):
        try:
            for thread in threads:
                thread.start()
            return head.run()
        finally:
            for supervisor in supervisors:
                supervisor.abandoned.set()
            for thread in threads:
                thread.join()
            token.forget()


def _at_head(token: tokens.Token) -> str:
    """Return the token, which host 0 has or makes.

    Raises:
      SettingError: it can't be made.
    """
    try:
        return token()
    except tokens.NotThereError as error:
        raise SettingError(
            str(error),
            where="host 0",
            remedy=f"fix that, name another run folder, or {proof.REMEDY}",
        ) from error


@contextlib.contextmanager
def _signals(heed: Any) -> Iterator[None]:
    """Call `heed` at SIGINT and SIGTERM inside the block."""
    # only there may handlers be set
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        number: signal.signal(number, lambda *_: heed())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Supervisor:
    """Supervisor of one host; `run` returns the exit code of the run.

    Args:
      watched: the run.
      host: number of the host.
      address: the head's name and port.
      token: by which the hosts know each other; asked for anew with each connection,
        for host 0 may still have to leave it.
      secret: the head's, for the supervisors in its own process.
    """

    def __init__(
        self,
        watched: WatchedRun,
        host: int,
        address: tuple[str, int],
        token: tokens.Token,
        secret: str = "",
    ):
        self.watched = watched
        self.rules = watched.rules
        self.host = host
        self.address = address
        self.token = token
        self.hello = {
            "at": "hello",
            "run": watched.name,
            "host": host,
            "hosts": watched.cluster.hosts,
            "facts": dict(watched.facts),
            "secret": secret,
            "name": platform.node(),
            "session": secrets.token_hex(8),
        }
        self.abandoned = threading.Event()  # the head in this process has ended
        self.worker: Worker | None = None
        self.generation = 0
        self._told_of_token = False
        self._welcome = False  # this head has let it in
        self._met = False  # any head has
        self._lost = ""  # why the head was lost
        self._signals = 0
        self._told = 0  # the number of signals that this head knows of
        self._signalled = 0.0
        self._reported = 0.0
        self._ticked = 0.0
        self._phase = ""

    def signalled(self) -> None:
        """Take a person's or the scheduler's signal; made for signal handlers.

        The first one asks for an end with a save, the second one for an end at once.
        """
        self._signals = signals_after(self._signals, self._signalled)
        self._signalled = time.monotonic()

    def run_quietly(self) -> None:
        """Run next to the head, which raises for all."""
        with contextlib.suppress(LeptonError):
            self.run()

    def run(self) -> int:
        """Serve until the run is over; return its exit code.

        Raises:
          SettingError: the hosts do not meet, or this one is refused.
          HostsError: the head is lost, and does not come back.
        """
        until = time.monotonic() + self.watched.limit
        fault: Exception = meeting.NoAnswerError("no answer")
        try:
            while True:
                line = self._connect(until, fault)
                if line is None:
                    return INTERRUPTED if self._signals else 1
                try:
                    code = self._serve(line)
                finally:
                    line.close()
                if code is not None:
                    return code

                assert line.error is not None
                fault = line.error
                self._tell_of_token(fault)
                if self._welcome:
                    self._note_loss(line.fault)
                    until = time.monotonic() + self.rules.grace
                self._end_worker(self.rules.ending)
                self.abandoned.wait(AGAIN_AFTER)
        finally:
            self._end_worker(0.0)

    # ---- the connection to the head ----

    def _connect(
        self,
        until: float,
        fault: Exception,
    ) -> Line | None:
        """Connect to the head until then; return None if that is no longer wanted.

        Raises:
          LeptonError: the time is over; `fault` is the reason so far.
        """
        while not (self._signals or self.abandoned.is_set()):
            left = until - time.monotonic()
            if left <= 0:
                raise self._unreachable(fault)
            try:
                token = self.token()
                timeout = min(CALL_TIME, max(LEAST_CALL_TIME, left))
                connection = socket.create_connection(self.address, timeout=timeout)
                line = Line(connection, token, CHANNEL, head=False)
            except (tokens.NotThereError, OSError) as error:
                fault = error
                self.abandoned.wait(min(AGAIN_AFTER, max(0.0, left)))
                continue
            line.send(**self.hello, generation=self.generation)
            return line
        return None

    def _unreachable(self, fault: Exception) -> LeptonError:
        if not self._met:
            return meeting.unmet(
                self.address, self.watched.cluster, self.watched.limit, fault
            )
        return HostsError(
            f"host 0 is lost: {self._lost}, and for {self.rules.grace:.0f} s it"
            f" could not be met again: {meeting.reason(fault)}",
            where=f"host {self.host}, {joined(*self.address)}",
            remedy=(
                "look at the network between the two; then start this host"
                " again if host 0 still runs, else host 0 and all others, by"
                " --resume or --go-on"
            ),
        )

    def _note_loss(self, fault: str) -> None:
        self._welcome = False
        self._met = True
        self._lost = fault
        self._say(
            f"host 0 is lost: {fault}; host {self.host} ends its training"
            f" process, and looks for host 0 for {self.rules.grace:g} s"
        )

    def _tell_of_token(self, fault: Exception) -> None:
        """Say at once what a person has to change, and go on trying.

        Another program may answer there instead of host 0, so this alone is no reason
        to end.
        """
        if isinstance(fault, proof.TokenError) and not self._told_of_token:
            self._told_of_token = True
            self._say(f"host 0 is not met yet: {fault}; {proof.REMEDY}")

    # ---- what the head says ----

    def _serve(self, line: Line) -> int | None:
        """Do what the head says until the run is over; return its exit code.

        None if the head is lost.

        Raises:
          SettingError: the head refuses this host.
        """
        self._ticked = time.monotonic()
        self._told = 0
        while True:
            for message in line.receive():
                code = self._take(message, line)
                if code is not None:
                    return code

            now = time.monotonic()
            self._make_up_for_delay(line, now)
            if now - line.heard > self.rules.lost:
                line.give_up(f"no word from it for {self.rules.lost:g} s")
            if not line.open:
                return None
            if self.abandoned.is_set() and self.worker is None:
                return 1

            self._report(line, now)
            if self.worker is not None:
                self.worker.wait([line], TICK)
            else:
                select.select([line], [], [], TICK)

    def _make_up_for_delay(self, line: Line, now: float) -> None:
        late = now - self._ticked
        self._ticked = now
        if late > HELD_UP:
            line.heard += late
            if self.worker is not None:
                self.worker.held_up(late)

    def _take(
        self,
        message: Mapping[str, Any],
        line: Line,
    ) -> int | None:
        """Take a message; return the exit code if it says that the run is over.

        Raises:
          SettingError: the head refuses this host, or the run was over before it began.
        """
        do = message.get("do")
        if do == "refuse":
            raise self._refused(message)
        if do == "over":
            if message["error"]:
                raise self._refused(message["error"])
            return message["code"]
        if do == "later":
            line.give_up(message["why"])
        else:
            self._welcome = True
            self._obey(message, line)
        return None

    def _refused(self, error: Mapping[str, Any]) -> SettingError:
        return SettingError(
            error["what"],
            where=self.watched.cluster,
            remedy=error["remedy"],
        )

    def _obey(
        self,
        message: Mapping[str, Any],
        line: Line,
    ) -> None:
        do = message.get("do")
        if do == "begin":
            self._end_worker(0.0)
            self._begin(message, line)
            return

        generation = message.get("generation", self.generation)
        if self.worker is None or generation != self.generation:
            return
        if do == "stop":
            self.worker.stop()
        elif do == "end":
            self.worker.end(message["seconds"], time.monotonic())
        elif do == "stack":
            self.worker.ask_stack()

    def _begin(
        self,
        message: Mapping[str, Any],
        line: Line,
    ) -> None:
        """Start the worker of a generation."""
        fields = {name: message[name] for name in FOR_THE_WORKER}
        self.generation = fields["generation"]
        forwarder = None
        if self.watched.all_here and self.host > 0:
            forwarder = functools.partial(forward, host=self.host)
        try:
            self.worker = Worker(
                self.watched.command,
                variables(self.watched.environment),
                fields,
                forwarder,
            )
        except OSError as error:
            what = f"the training process can't be started: {error.strerror or error}"
            line.send(
                at="ended",
                generation=self.generation,
                code=MISTAKE,
                error={
                    "what": what,
                    "where": self.watched.command[0],
                    "remedy": "fix that, and start again",
                },
            )

    # ---- what it reports ----

    def _report(
        self,
        line: Line,
        now: float,
    ) -> None:
        """Send what is new, or that nothing is."""
        if self._signals > self._told:
            self._told = self._signals
            line.send(at="signal", count=self._signals)
        if self.worker is not None:
            self._report_worker(self.worker, line, now)
        elif now - self._reported > REPORT_EVERY:
            self._reported = now
            line.send(at="idle")
        line.flush()

    def _report_worker(
        self,
        worker: Worker,
        line: Line,
        now: float,
    ) -> None:
        if self._signals > 1:
            worker.end(0.0, now)
        worker.listen(now)
        code = worker.code(now)
        place = worker.place(now)

        stack = worker.stack(now)
        if stack:
            line.send(
                at="stack",
                generation=worker.generation,
                stack=list(stack),
            )

        due = now - self._reported > REPORT_EVERY
        if due or place.phase != self._phase or code is not None:
            self._reported = now
            self._phase = place.phase
            silent = worker.silent(now)
            line.send(
                at="where",
                generation=worker.generation,
                place=list(place),
                over=worker.over(now),
                silent=silent,
                state=worker.state() if silent > QUIET else "",
            )

        if code is not None:
            line.send(
                at="ended",
                generation=worker.generation,
                code=code,
                error=worker.error,
            )
            self.worker = None

    def _say(self, text: str) -> None:
        # the head's own process speaks for the supervisors in it
        if self.hello["secret"]:
            return
        # a closed terminal is no reason to end the run
        with contextlib.suppress(OSError):
            print(f"hosts: {text}", file=sys.stderr, flush=True)

    def _end_worker(self, seconds: float) -> None:
        """End a worker that can't go on."""
        worker = self.worker
        self.worker = None
        if worker is None:
            return
        worker.end(seconds, time.monotonic())
        while worker.code(time.monotonic()) is None:
            worker.listen(time.monotonic())
            time.sleep(TICK / 5)
            if self._signals > 1:
                worker.kill()

"""On each host, around the training process: starts it as the head says, tells the head
of it, ends it when the head is lost.

What is kept over a restart is nothing but the connection to the head: every attempt is
a new process with a new port for JAX, and every message carries the number of its
attempt.
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
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import meeting, proof, tokens
from lepton_jax.launch.cluster import Cluster, joined, split
from lepton_jax.launch.gate import CHANNEL, signals_after
from lepton_jax.launch.head import HELD_UP, Head
from lepton_jax.launch.hosts import forward
from lepton_jax.launch.process import Worker, variables
from lepton_jax.launch.rules import HostsError, Rules
from lepton_jax.launch.verdict import MISTAKE
from lepton_jax.launch.watchdog import INTERRUPTED
from lepton_jax.launch.wire import Line

TICK = 0.1
BEAT = 0.5
AGAIN_AFTER = 0.5


def wanted(cluster: Cluster, rules: Rules) -> bool:
    """Whether the run is watched: several hosts always are, one alone where it shall be
    restarted.
    """
    return cluster.hosts > 1 or bool(rules.restarts)


def run(
    cluster: Cluster,
    rules: Rules,
    command: Sequence[str],
    *,
    facts: Mapping[str, str],
    limit: float,
    run: str = "",
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    token: tokens.Token | None = None,
) -> dict[str, Any]:
    """This host's share in watching over the run, until it is over: host 0's as the
    head too, "local" for all hosts.

    Args:
      cluster: as this host found it.
      rules: limits, restarts, grace; those of host 0 count, but for `grace`, `lost` and
        `ending`.
      command: what a worker runs; what it is told comes by `watchdog.begin`.
      facts: what must not differ between the hosts, by name.
      limit: seconds in which all must have come.
      run: what the hosts of one run have in common, so that those of another are turned
        away.
      folder: of the run.
      environment: variables on top of this process's own.
      token: by which the hosts know each other; None: as `tokens.of_run` finds it with
        this folder.

    Returns:
      {"status": "finished", "interrupted" or "failed", "exit_code": ...}.

    Raises:
      LeptonError: the hosts do not meet; on host 0 also what ended the run.
    """
    here = cluster.coordinator is None  # all hosts are on this machine
    token = token or tokens.of_run(cluster, folder)
    head = None
    if cluster.host_id == 0:
        head = Head(
            cluster,
            rules,
            facts,
            run,
            folder,
            limit,
            token=_at_head(token),
        )
    make = functools.partial(
        Supervisor,
        cluster,
        rules,
        command,
        facts=facts,
        limit=limit,
        run=run,
        environment=environment,
    )
    if head is None:
        name, port = split(cluster.coordinator or "")
        alone = make(
            cluster.host_id,
            (name, int(port)),
            token=token,
        )
        with _signals(alone.signalled):
            code = alone.run()
    else:
        numbers = range(cluster.hosts) if here else (0,)
        own = [
            make(
                host,
                head.address,
                token=tokens.Token(head.gate.token),
                secret=head.gate.secret,
                prefix=here,
            )
            for host in numbers
        ]
        threads = [
            threading.Thread(target=each.run_quietly, name=f"supervisor {each.host}")
            for each in own
        ]
        with _signals(head.signalled):
            try:
                for thread in threads:
                    thread.start()
                code = head.run()
            finally:
                for each in own:
                    each.abandoned.set()
                for thread in threads:
                    thread.join()
                token.forget()
    return {
        "status": {0: "finished", INTERRUPTED: "interrupted"}.get(code, "failed"),
        "exit_code": code,
    }


def _at_head(token: tokens.Token) -> str:
    """The token, which host 0 has or makes.

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
    """SIGINT and SIGTERM call `heed` while it is open."""
    # only there may handlers be set
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: heed())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Supervisor:
    """Of one host; `run` returns the exit code of the run.

    Args:
      cluster, rules, command, facts, limit, run, environment: as `run` takes them.
      host: its number.
      address: the head's name and port.
      token: by which the hosts know each other; asked for anew with each connection,
        for host 0 may still have to leave it.
      secret: the head's, for the supervisors in its own process.
      prefix: its worker's output goes to standard error behind `[host I] `, unless it
        is host 0's.
    """

    def __init__(
        self,
        cluster: Cluster,
        rules: Rules,
        command: Sequence[str],
        host: int,
        address: tuple[str, int],
        *,
        token: tokens.Token,
        facts: Mapping[str, str],
        limit: float,
        run: str = "",
        environment: Mapping[str, str] | None = None,
        secret: str = "",
        prefix: bool = False,
    ):
        self.cluster = cluster
        self.rules = rules
        self.command = list(command)
        self.host = host
        self.address = address
        self.limit = limit
        self.environment = environment
        self.token = token
        self._told_of_token = False
        self.hello = {
            "at": "hello",
            "run": run,
            "host": host,
            "hosts": cluster.hosts,
            "facts": dict(facts),
            "secret": secret,
            "name": platform.node(),
            "session": secrets.token_hex(8),
        }
        self.prefix = prefix and host > 0
        self.abandoned = threading.Event()
        self.worker: Worker | None = None
        self.generation = self._signals = self._told = 0
        self._welcome = self._met = False  # by this head, and by any
        self._lost = ""
        self._signalled = 0.0
        self._beat = self._ticked = 0.0
        self._phase = ""

    def signalled(self) -> None:
        """A person, or the scheduler, asks for the end: the first time with a save, the
        second time at once. For handlers.
        """
        self._signals = signals_after(self._signals, self._signalled)
        self._signalled = time.monotonic()

    def run_quietly(self) -> None:
        """Beside the head, which raises for all."""
        with contextlib.suppress(LeptonError):
            self.run()

    def run(self) -> int:
        """Until the run is over; returns its exit code.

        Raises:
          SettingError: the hosts do not meet, or this one is refused.
          HostsError: the head is lost, and does not come back.
        """
        until = time.monotonic() + self.limit
        fault = "no answer"
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
                fault = line.fault
                self._tell_of_token(fault)
                if self._welcome:
                    self._welcome = False
                    self._met = True
                    until = time.monotonic() + self.rules.grace
                    self._lost = fault
                    self._say(
                        f"host 0 is lost: {fault}; host {self.host} ends its training"
                        f" process, and looks for host 0 for {self.rules.grace:g} s"
                    )
                self._end_worker(self.rules.ending)
                self.abandoned.wait(AGAIN_AFTER)
        finally:
            self._end_worker(0.0)

    def _connect(
        self,
        until: float,
        fault: str,
    ) -> Line | None:
        """To the head, until then; None if that is no longer wanted."""
        name, port = self.address
        while not (self._signals or self.abandoned.is_set()):
            left = until - time.monotonic()
            if left <= 0:
                if not self._met:
                    raise meeting.unmet(
                        name,
                        port,
                        self.cluster,
                        self.limit,
                        fault,
                    )
                raise HostsError(
                    f"host 0 is lost: {self._lost}, and for {self.rules.grace:.0f} s it"
                    f" could not be met again: {fault}",
                    where=f"host {self.host}, {joined(name, port)}",
                    remedy=(
                        "look at the network between the two; then start this host"
                        " again if host 0 still runs, else host 0 and all others, by"
                        " --resume or --go-on"
                    ),
                )
            try:
                token = self.token()
                connection = socket.create_connection(
                    (name, port),
                    timeout=min(5.0, max(0.1, left)),
                )
                line = Line(connection, token, CHANNEL, head=False)
            except (tokens.NotThereError, OSError) as error:
                fault = getattr(error, "strerror", None) or str(error)
                self.abandoned.wait(min(AGAIN_AFTER, max(0.0, left)))
                continue
            line.send(**self.hello, generation=self.generation)
            return line
        return None

    def _serve(self, line: Line) -> int | None:
        """Do what the head says; the run's exit code once it is over, None if the head
        is lost.

        Raises:
          SettingError: the head refuses this host.
        """
        self._ticked = time.monotonic()
        self._told = 0
        while True:
            for message in line.receive():
                if message.get("do") == "refuse":
                    raise SettingError(
                        message["what"],
                        where=self.cluster,
                        remedy=message["remedy"],
                    )
                if message.get("do") == "over":
                    if message["error"]:
                        raise SettingError(
                            message["error"]["what"],
                            where=self.cluster,
                            remedy=message["error"]["remedy"],
                        )
                    return message["code"]
                if message.get("do") == "later":
                    line.give_up(message["why"])
                else:
                    self._welcome = True
                    self._obey(message, line)
            now = time.monotonic()
            late = now - self._ticked
            self._ticked = now
            if late > HELD_UP:
                line.heard += late
                if self.worker is not None:
                    self.worker.held_up(late)
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

    def _obey(
        self,
        message: Mapping[str, Any],
        line: Line,
    ) -> None:
        do = message.get("do")
        now = time.monotonic()
        if do == "begin":
            self._end_worker(0.0)
            told = {
                name: message[name]
                for name in (
                    "generation",
                    "hosts",
                    "host_id",
                    "coordinator",
                    "run_dir",
                    "limits",
                )
            }
            self.generation = told["generation"]
            try:
                self.worker = Worker(
                    self.command,
                    variables(self.environment),
                    told,
                    functools.partial(forward, host=self.host) if self.prefix else None,
                )
            except OSError as error:
                what = (
                    f"the training process can't be started: {error.strerror or error}"
                )
                line.send(
                    at="ended",
                    generation=self.generation,
                    code=MISTAKE,
                    error={
                        "what": what,
                        "where": self.command[0],
                        "remedy": "mend that, and start again",
                    },
                )
        elif (
            self.worker is None
            or message.get("generation", self.generation) != self.generation
        ):
            return
        elif do == "stop":
            self.worker.stop()
        elif do == "end":
            self.worker.end(message["seconds"], now)
        elif do == "stack":
            self.worker.ask_stack()

    def _report(
        self,
        line: Line,
        now: float,
    ) -> None:
        """What is new, or that nothing is."""
        if self._signals > self._told:
            self._told = self._signals
            line.send(at="signal", count=self._signals)
        worker = self.worker
        if worker is not None:
            if self._signals > 1:
                worker.end(0.0, now)
            worker.listen(now)
            code = worker.code(now)
            place = worker.place(now)
            stack = worker.stack(now)
            silent = worker.silent(now)
            if stack:
                line.send(
                    at="stack",
                    generation=worker.generation,
                    stack=list(stack),
                )
            if (
                now - self._beat > BEAT
                or place.phase != self._phase
                or code is not None
            ):
                self._beat = now
                self._phase = place.phase
                line.send(
                    at="where",
                    generation=worker.generation,
                    place=list(place),
                    over=worker.over(now),
                    silent=silent,
                    state=worker.state() if silent > 1.0 else "",
                )
            if code is not None:
                line.send(
                    at="ended",
                    generation=worker.generation,
                    code=code,
                    error=worker.error,
                )
                self.worker = None
        elif now - self._beat > BEAT:
            self._beat = now
            line.send(at="idle")
        line.flush()

    def _tell_of_token(self, fault: str) -> None:
        """Say at once what a person has to change, and go on trying.

        Who answers there need not be host 0, so this alone is no reason to end.
        """
        if fault in (proof.NOT_TAKEN, proof.NOT_GIVEN) and not self._told_of_token:
            self._told_of_token = True
            self._say(f"host 0 is not met yet: {fault}; {proof.REMEDY}")

    def _say(self, text: str) -> None:
        # the head's own process speaks for those beside it
        if not self.hello["secret"]:
            # a closed terminal is no reason to end the run
            with contextlib.suppress(OSError):
                print(f"hosts: {text}", file=sys.stderr, flush=True)

    def _end_worker(self, seconds: float) -> None:
        """It can't go on."""
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

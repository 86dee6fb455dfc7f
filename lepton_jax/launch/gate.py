"""Where the supervisors of all hosts come to the head: who is let in, who is turned
away, and whose connection is lost.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import meeting, tokens
from lepton_jax.launch.cluster import Cluster, split
from lepton_jax.launch.door import BACKLOG, Door
from lepton_jax.launch.verdict import Place
from lepton_jax.launch.wire import LANGUAGE, Line

CHANNEL = "supervisors"
TWICE = 0.5  # seconds in which a second signal is the first one's echo
FLUSH_TIME = 2.0
PAUSE = 0.01


class Seat:
    """A host whose supervisor is connected.

    Attributes:
      generation: of the worker that runs there; None: there is none.
      code, error: how its last worker ended.
      place, at: where its worker was when last heard of, and when that was.
      over: its supervisor finds it over its limit.
      silent: for how long its worker has said nothing; `state`: that process's state,
        as the system calls it.
      stack: of its worker, since it last made progress; `asked`: for it.
    """

    def __init__(
        self,
        host: int,
        line: Line,
        name: str,
    ):
        self.host = host
        self.line = line
        self.name = name
        self.generation: int | None = None
        self.forget(Place(), 0.0)

    def forget(
        self,
        place: Place,
        now: float,
    ) -> None:
        """All that an earlier worker left."""
        self.code: int | None = None
        self.error: dict[str, Any] | None = None
        self.stack: tuple[str, ...] = ()
        self.asked = False
        self.place = place
        self.at = now
        self.over = False
        self.silent = 0.0
        self.state = ""

    def hear(
        self,
        place: Place,
        now: float,
        over: bool,
        silent: float,
        state: str,
    ) -> None:
        if place.age < self.where(now).age - 1.0:  # it goes on
            self.stack = ()
            self.asked = False
        self.place = place
        self.at = now
        self.over = over
        self.silent = silent
        self.state = state

    def where(self, now: float) -> Place:
        return self.place._replace(age=self.place.age + now - self.at)


def listen(cluster: Cluster) -> socket.socket:
    """On the coordinator's port; where there is none, on any, for this machine alone.

    Raises:
      SettingError: the port is taken.
    """
    if cluster.coordinator is None:
        return socket.create_server(
            ("127.0.0.1", 0),
            backlog=max(cluster.hosts, BACKLOG),
        )
    port = int(split(cluster.coordinator)[1])
    ipv6 = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("", port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            dualstack_ipv6=ipv6,
            backlog=max(cluster.hosts, BACKLOG),
        )
    except OSError as error:
        raise meeting.taken(port, error, cluster) from error


class Gate:
    """The server of the head.

    Args:
      cluster: as host 0 found it.
      facts: what must not differ between the hosts, by name.
      run: what the hosts of one run have in common.
      obey: takes what a supervisor says.
      came: a host has been let in; it may not be the first time.
      token: by which the hosts know each other; empty: one that only this process has.

    Attributes:
      door: through which they come.
      token: as above.
      seats: by host.
      secret: by which the supervisors in this very process are known.
      misfit: the hosts do not fit to each other.
      begun: the hosts have met; a second process that says it is one of them is told to
        come again later.
    """

    def __init__(
        self,
        cluster: Cluster,
        facts: Mapping[str, str],
        run: str,
        obey: Callable[[Seat, dict[str, Any]], None],
        came: Callable[[Seat, int], None],
        token: str = "",
    ):
        self.cluster = cluster
        self.run = run
        self._obey = obey
        self._came = came
        self.own = {
            "host": 0,
            "hosts": cluster.hosts,
            "facts": dict(facts),
        }
        self.secret = secrets.token_hex(8)
        self.token = token or tokens.make()
        self.seats: dict[int, Seat] = {}
        self.misfit: SettingError | None = None
        self.begun = False
        self._seated: dict[Line, Seat] = {}
        self.listener = listen(cluster)
        self.port = self.listener.getsockname()[1]
        self.door = Door(
            self.listener,
            self.token,
            CHANNEL,
        )

    def serve(self, seconds: float) -> None:
        """Hear what comes within so many seconds."""
        for line, message in self.door.serve(seconds):
            if line not in self._seated:
                self._admit(line, message)
                continue
            try:
                self._obey(self._seated[line], message)
            except (KeyError, TypeError, ValueError):  # of another version, or broken
                line.give_up(LANGUAGE)

    def lost(
        self,
        now: float,
        patience: float,
    ) -> list[Seat]:
        """The hosts whose connection was closed, or has been silent for too long; they
        have no seat any more.
        """
        gone = []
        for seat in [*self.seats.values()]:
            if seat.line.open and now - seat.line.heard > patience:
                seat.line.give_up(f"no word from its supervisor for {patience:g} s")
            if not seat.line.open:
                del self.seats[seat.host], self._seated[seat.line]
                self.door.drop(seat.line)
                gone.append(seat)
        return gone

    def held_up(self, seconds: float) -> None:
        """So long this process itself was stopped."""
        self.door.held_up(seconds)
        for seat in self.seats.values():
            seat.at += seconds

    def tell(
        self,
        do: str,
        **more: Any,
    ) -> None:
        """All hosts."""
        for seat in self.seats.values():
            seat.line.send(do=do, **more)

    def close(
        self,
        code: int,
        error: LeptonError | None,
    ) -> None:
        """Say that it is over, and give it the time to arrive: the others close their
        ends when they have read it.
        """
        said = None if error is None else {"what": error.what, "remedy": error.remedy}
        self.tell("over", code=code, error=said)
        lines = [seat.line for seat in self.seats.values()]
        until = time.monotonic() + FLUSH_TIME
        while any(line.open for line in lines) and time.monotonic() < until:
            time.sleep(PAUSE)
            for line in lines:
                line.flush()
                line.receive()
        self.door.close()

    def _admit(
        self,
        line: Line,
        hello: dict[str, Any],
    ) -> None:
        """A supervisor says who it is."""
        if not line.open:  # it has left already
            return
        if not (
            isinstance(hello.get("host"), int)
            and isinstance(hello.get("facts"), dict)
            and isinstance(hello.get("generation"), int)
        ):
            line.give_up("it is no supervisor")
            return
        host = hello["host"]
        fault = None
        before = self.seats.get(host)
        if hello.get("run") != self.run:
            _refuse(
                line,
                SettingError(
                    f"host {host} belongs to another run: {hello.get('run')!r} there,"
                    f" {self.run!r} here",
                    where=self.cluster,
                    remedy=(
                        "end what an earlier start left behind, or give this run "
                        "another port by --coordinator"
                    ),
                ),
            )
            return
        if hello.get("secret") != self.secret:
            fault = meeting.differs(
                self.own,
                hello,
                self.cluster,
            )
        if fault is None and before is not None and before.line.open and not self.begun:
            fault = meeting.twice(host, self.cluster)
        if fault is not None:
            _refuse(line, fault)
            self.misfit = fault
        # a machine that went down without a word may be back before its silence is
        # noticed
        elif before is not None:
            line.send(do="later", why=f"another process is host {host} already")
        else:
            self.door.keep(line)
            seat = self.seats[host] = self._seated[line] = Seat(
                host, line, str(hello.get("name", ""))
            )
            line.send(do="welcome")
            self._came(seat, hello["generation"])


def signals_after(count: int, last: float) -> int:
    """How many signals have come with this one: what comes twice at once was sent once
    to a process and once to its group.

    Args:
      count: how many came before.
      last: when the last one did; monotonic, in seconds.
    """
    return count + (not count or time.monotonic() - last > TWICE)


def _refuse(line: Line, error: SettingError) -> None:
    # the other end closes it, or the patience ends
    line.send(
        do="refuse",
        what=error.what,
        remedy=error.remedy,
    )

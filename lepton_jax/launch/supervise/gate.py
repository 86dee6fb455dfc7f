"""The head's server, to which the supervisors of all hosts come.

It decides who is let in, who is turned away, and whose connection is lost.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.launch import door, meeting, tokens
from lepton_jax.launch.cluster import Cluster, split
from lepton_jax.launch.supervise.verdict import Place
from lepton_jax.launch.wire import LANGUAGE, Line

CHANNEL = "supervisors"
TWICE = 0.5  # seconds in which a second signal is the first one's echo
FLUSH_TIME = 2.0  # seconds in which the others must read that the run is over
PAUSE = 0.01  # seconds between two looks whether they have
GOES_ON = 1.0  # seconds by which a place must be younger for a worker to have moved


class Seat:
    """A host whose supervisor is connected.

    Attributes:
      host: its number.
      line: the connection.
      name: of its machine.
      generation: of the worker that runs there; None: there is none.
      code: exit code of its last worker.
      error: the mistake of a person's that this worker reported.
      place: where its worker was when last heard of.
      at: time of `place` (monotonic, in seconds).
      over: whether its supervisor finds it over its limit.
      silent: seconds without a line of its worker.
      state: the system's letter for the state of that process.
      stack: of its worker, since it last made progress.
      asked: whether that stack has been asked for.
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
        """Forget all about an earlier worker."""
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
        """Note what its supervisor reports of the worker."""
        if place.age < self.where(now).age - GOES_ON:
            self.stack = ()
            self.asked = False
        self.place = place
        self.at = now
        self.over = over
        self.silent = silent
        self.state = state

    def where(self, now: float) -> Place:
        """Return where its worker was, with the time since then in `age`."""
        return self.place._replace(age=self.place.age + now - self.at)


def listen(cluster: Cluster) -> socket.socket:
    """Listen on the coordinator's port.

    Where there is no coordinator, listen on any port, for this machine alone.

    Raises:
      SettingError: the port is taken.
    """
    if cluster.coordinator is None:
        backlog = max(cluster.hosts, door.BACKLOG)
        return socket.create_server(("127.0.0.1", 0), backlog=backlog)

    port = int(split(cluster.coordinator)[1])
    try:
        return door.listen(port, cluster)
    except OSError as error:
        raise meeting.taken(port, error, cluster) from error


class Gate:
    """The server of the head.

    Args:
      cluster: as host 0 found it.
      facts: texts that must not differ between the hosts, by name.
      run: text that the hosts of one run have in common.
      obey: takes a message of a supervisor.
      came: called when a host has been let in; it may not be the first time.
      token: by which the hosts know each other; empty: one that only this process has.

    Attributes:
      door: through which they come.
      token: as above.
      seats: by host.
      secret: by which the supervisors in this very process are known.
      misfit: fault of a host that does not fit to the others.
      begun: whether the hosts have met; from then on a second process that says it is
        one of them is told to come again later.
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
        self.door = door.Door(
            self.listener,
            self.token,
            CHANNEL,
        )

    def serve(self, seconds: float) -> None:
        """Hear the messages that come within some seconds."""
        for line, message in self.door.serve(seconds):
            if line not in self._seated:
                self._admit(line, message)
                continue
            try:
                self._obey(self._seated[line], message)
            except (KeyError, TypeError, ValueError):
                line.give_up(LANGUAGE)  # it is of another version, or broken

    def lost(
        self,
        now: float,
        patience: float,
    ) -> list[Seat]:
        """Return the seats whose connection is lost; their hosts have none any more.

        A connection is lost if it was closed or has been silent for `patience` seconds.
        """
        gone = []
        for seat in [*self.seats.values()]:
            if seat.line.open and now - seat.line.heard > patience:
                seat.line.give_up(f"no word from its supervisor for {patience:g} s")
            if not seat.line.open:
                del self.seats[seat.host]
                del self._seated[seat.line]
                self.door.drop(seat.line)
                gone.append(seat)
        return gone

    def held_up(self, seconds: float) -> None:
        """Make up for a time in which this process itself was stopped."""
        self.door.held_up(seconds)
        for seat in self.seats.values():
            seat.at += seconds

    def tell(
        self,
        do: str,
        **more: Any,
    ) -> None:
        """Send a message to all hosts."""
        for seat in self.seats.values():
            seat.line.send(do=do, **more)

    def close(
        self,
        code: int,
        error: LeptonError | None,
    ) -> None:
        """Tell all hosts that the run is over, and wait until they have read it.

        They close their ends then.
        """
        message = None
        if error is not None:
            message = {"what": error.what, "remedy": error.remedy}
        self.tell("over", code=code, error=message)

        lines = [seat.line for seat in self.seats.values()]
        until = time.monotonic() + FLUSH_TIME
        while any(line.open for line in lines) and time.monotonic() < until:
            time.sleep(PAUSE)
            for line in lines:
                line.flush()
                line.receive()
        self.door.close()

    # ---- who is let in ----

    def _admit(
        self,
        line: Line,
        hello: dict[str, Any],
    ) -> None:
        """Seat a supervisor that says who it is, or turn it away."""
        if not line.open:
            return  # it has left already
        if not _is_supervisor(hello):
            line.give_up("it is no supervisor")
            return

        host = hello["host"]
        if hello.get("run") != self.run:
            _refuse(line, self._of_another_run(hello))
            return

        before = self.seats.get(host)
        fault = self._fault(hello, before)
        if fault is not None:
            _refuse(line, fault)
            self.misfit = fault
        elif before is not None:
            # a machine that went down without a word may be back before its silence is
            # noticed
            line.send(do="later", why=f"another process is host {host} already")
        else:
            self.door.keep(line)
            seat = Seat(
                host,
                line,
                str(hello.get("name", "")),
            )
            self.seats[host] = seat
            self._seated[line] = seat
            line.send(do="welcome")
            self._came(seat, hello["generation"])

    def _fault(
        self,
        hello: dict[str, Any],
        before: Seat | None,
    ) -> SettingError | None:
        """Return why a host does not fit to the others; None if it does."""
        fault = None
        if hello.get("secret") != self.secret:
            fault = meeting.differs(self.own, hello, self.cluster)
        if fault is None and before is not None and before.line.open and not self.begun:
            fault = meeting.twice(hello["host"], self.cluster)
        return fault

    def _of_another_run(self, hello: dict[str, Any]) -> SettingError:
        return SettingError(
            f"host {hello['host']} belongs to another run: {hello.get('run')!r} there,"
            f" {self.run!r} here",
            where=self.cluster,
            remedy=(
                "end what an earlier start left behind, or give this run "
                "another port by --coordinator"
            ),
        )


def signals_after(count: int, last: float) -> int:
    """Return how many signals have come with this one.

    Two that come at once were sent once to a process and once to its group.

    Args:
      count: how many came before.
      last: time of the last one (monotonic, in seconds).
    """
    is_echo = count > 0 and time.monotonic() - last <= TWICE
    return count if is_echo else count + 1


def _is_supervisor(hello: dict[str, Any]) -> bool:
    return (
        isinstance(hello.get("host"), int)
        and isinstance(hello.get("facts"), dict)
        and isinstance(hello.get("generation"), int)
    )


def _refuse(line: Line, error: SettingError) -> None:
    # the other end closes it, or the patience ends
    line.send(
        do="refuse",
        what=error.what,
        remedy=error.remedy,
    )

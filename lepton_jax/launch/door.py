"""Host 0's port: callers are not heard before their proof, and can't keep others out.

Nothing here waits for a caller. One that has not proved itself has `PROOF_TIME` and a
few hundred bytes, and there are at most `MOST_UNPROVEN` of them: a further one takes
the place of the oldest caller from the address that has the most of them. A host that
is pushed out like that comes again.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import sys
import time
from collections import Counter
from typing import Any

from lepton_jax.launch import proof
from lepton_jax.launch.cluster import Cluster
from lepton_jax.launch.wire import Line

# seconds from the call to the proof, and to the first message after it (assumption)
PROOF_TIME = 5.0
# assumptions, for a port that strangers may call at any rate
MOST_UNPROVEN = 128  # callers at once
BACKLOG = 512  # callers for whom the system answers until it is their turn
CALLS_A_TURN = 64  # callers taken in before those that are there are heard
MOST_NAMED = 16  # addresses that get a line of their own
SELDOM = 60.0  # seconds between two lines about all others
Messages = list[tuple[Line, dict[str, Any]]]


def listen(port: int, cluster: Cluster) -> socket.socket:
    """Listen on a port of all addresses, as host 0.

    Raises:
      OSError: the port is taken.
    """
    ipv6 = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if ipv6 else socket.AF_INET,
        dualstack_ipv6=ipv6,
        backlog=max(cluster.hosts, BACKLOG),
    )


class Refused:
    """Count of the connections that were turned away; says so, but not too often.

    Attributes:
      count: number of these connections.
    """

    def __init__(self) -> None:
        self.count = 0
        self._named: set[str] = set()
        self._said = 0.0

    def add(
        self,
        address: str,
        why: str,
    ) -> None:
        """Count a connection, and say why it was refused."""
        self.count += 1
        now = time.monotonic()
        if address not in self._named and len(self._named) < MOST_NAMED:
            self._named.add(address)
            self._say(f"refused a connection from {address}: {why}", now)
        elif now - self._said > SELDOM:
            many = f"refused {self.count} connections so far, the last from {address}"
            self._say(f"{many}: {why}", now)

    def __str__(self) -> str:
        """Return the end of an error about a host that did not come.

        Empty if nobody was refused.
        """
        if not self.count:
            return ""
        are = "connection was" if self.count == 1 else "connections were"
        return f"; {self.count} {are} refused without proof of the run's token"

    def _say(
        self,
        text: str,
        now: float,
    ) -> None:
        self._said = now
        # a closed terminal is no reason to end the run
        with contextlib.suppress(OSError):
            print(f"hosts: {text}", file=sys.stderr, flush=True)


class Door:
    """A port, and all connections that came by it.

    Args:
      listener: at the port; it is closed with the door.
      token: of the run.
      channel: purpose of the connections.

    Attributes:
      refused: connections without a proof.
    """

    def __init__(
        self,
        listener: socket.socket,
        token: str,
        channel: str,
    ):
        self.listener = listener
        self.refused = Refused()
        self._token = token
        self._channel = channel
        # of all connections, in the order in which they came
        self._address: dict[Line, str] = {}
        # time until which a connection may stay, where that is limited
        self._until: dict[Line, float] = {}
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self, seconds: float) -> Messages:
        """Take in callers for some seconds; return the messages of proven ones.

        Lines that were closed are no longer listened to.
        """
        messages: Messages = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._take_in()
                continue
            line = key.data
            if line not in self._address:
                continue  # it had to make room for another in this turn
            messages += [(line, message) for message in line.receive()]
            if line.broken or not (line.proven or line.open):
                self._refuse(line, line.error)
            elif not line.open:
                self.drop(line)
        self._end_patience(time.monotonic())
        return messages

    def keep(self, line: Line) -> None:
        """Let a connection stay as long as it likes."""
        self._until.pop(line, None)

    def drop(self, line: Line) -> None:
        """Close a connection; its holder sees that it is no longer open."""
        if self._address.pop(line, None) is None:
            return
        self._until.pop(line, None)
        self._selector.unregister(line)
        line.close()

    def held_up(self, seconds: float) -> None:
        """Make up for a time in which this process itself was stopped."""
        for line in self._address:
            line.heard += seconds
        for line in self._until:
            self._until[line] += seconds

    def lock(self) -> None:
        """Let nobody new in, and free the port."""
        if self.listener.fileno() >= 0:
            self._selector.unregister(self.listener)
            self.listener.close()

    def close(self) -> None:
        """Close the port and all connections."""
        self.lock()
        for line in [*self._address]:
            self.drop(line)
        self._selector.close()

    # ---- internals ----

    def _take_in(self) -> None:
        for _ in range(CALLS_A_TURN):
            try:
                connection, address = self.listener.accept()
                line = Line(
                    connection,
                    self._token,
                    self._channel,
                    head=True,
                )
            except OSError:
                return  # nobody more is there, or the caller has gone already
            self._make_room()
            self._address[line] = address[0].removeprefix("::ffff:")
            self._until[line] = time.monotonic() + PROOF_TIME
            self._selector.register(line, selectors.EVENT_READ, line)

    def _make_room(self) -> None:
        unproven = [line for line in self._until if not line.proven]
        if len(unproven) < MOST_UNPROVEN:
            return
        callers = Counter(self._address[line] for line in unproven)
        [(address, _)] = callers.most_common(1)
        oldest = next(line for line in unproven if self._address[line] == address)
        self._refuse(oldest, "too many connections without a proof")

    def _end_patience(self, now: float) -> None:
        for line, until in [*self._until.items()]:
            if now > until and not line.proven:
                self._refuse(line, f"no proof within {PROOF_TIME:g} s")
            elif now > until or not line.open:
                self.drop(line)

    def _refuse(
        self,
        line: Line,
        why: object,
    ) -> None:
        address = self._address[line]
        self.drop(line)
        remedy = f"; {proof.REMEDY}" if isinstance(why, proof.TokenError) else ""
        self.refused.add(address, f"{why}{remedy}")

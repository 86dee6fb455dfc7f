"""Host 0's port: callers are not heard before their proof, and can't keep others out.

Nothing here waits for a caller. One that has not proved itself has `PROOF_TIME` and a
few hundred bytes, and there are at most `MOST_UNPROVEN` of them: a further one takes
the place of the oldest, of that address which has most of them. A host that is pushed
out so comes again.
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
from lepton_jax.launch.wire import Line

PROOF_TIME = (
    5.0  # seconds from the call to the proof, and to the first message after it
)
MOST_UNPROVEN = 128  # callers at once
BACKLOG = 512  # callers for whom the system answers until it is their turn
CALLS_A_TURN = 64  # callers taken in before those are heard who are there
MOST_NAMED = 16  # addresses that are told of by themselves
SELDOM = 60.0  # seconds between two lines about all others
Messages = list[tuple[Line, dict[str, Any]]]


class Refused:
    """Counts the connections that were turned away, and says so, but not so often.

    Attributes:
      count: how many there were.
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
        self.count += 1
        now = time.monotonic()
        if address not in self._named and len(self._named) < MOST_NAMED:
            self._named.add(address)
            self._say(f"refused a connection from {address}: {why}", now)
        elif now - self._said > SELDOM:
            many = f"refused {self.count} connections so far, the last from {address}"
            self._say(f"{many}: {why}", now)

    def __str__(self) -> str:
        """For an error of a host that did not come; empty if nobody was refused."""
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
        with contextlib.suppress(
            OSError
        ):  # a closed terminal is no reason to end the run
            print(f"hosts: {text}", file=sys.stderr, flush=True)


class Door:
    """A port, and all who came by it.

    Args:
      listener: at the port; it is closed with the door.
      token: of the run.
      channel: what the connections are for.

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
        self._address: dict[
            Line, str
        ] = {}  # of all who are there, in the order they came
        self._until: dict[Line, float] = {}  # of those who may not stay
        listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def serve(self, seconds: float) -> Messages:
        """Take in callers for so many seconds; returns what proven ones have said.

        Lines that were closed are no longer listened to.
        """
        heard: Messages = []
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                self._take_in()
                continue
            line = key.data
            if (
                line not in self._address
            ):  # it had to make room for another in this turn
                continue
            heard += [(line, message) for message in line.receive()]
            if line.broken or not (line.proven or line.open):
                self._refuse(line, line.fault)
            elif not line.open:
                self.drop(line)
        self._end_patience(time.monotonic())
        return heard

    def keep(self, line: Line) -> None:
        """It may stay as long as it likes."""
        self._until.pop(line, None)

    def drop(self, line: Line) -> None:
        """Close a connection; its holder sees that it is no longer open."""
        if self._address.pop(line, None) is None:
            return
        self._until.pop(line, None)
        self._selector.unregister(line)
        line.close()

    def held_up(self, seconds: float) -> None:
        """So long this process itself was stopped."""
        for line in self._address:
            line.heard += seconds
        for line in self._until:
            self._until[line] += seconds

    def lock(self) -> None:
        """Nobody new comes in, and the port is free."""
        if self.listener.fileno() >= 0:
            self._selector.unregister(self.listener)
            self.listener.close()

    def close(self) -> None:
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
            except OSError:  # there is nobody more, or it has gone already
                return
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
        why: str,
    ) -> None:
        address = self._address[line]
        self.drop(line)
        remedy = f"; {proof.REMEDY}" if why == proof.NOT_GIVEN else ""
        self.refused.add(address, why + remedy)

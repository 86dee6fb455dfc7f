"""A connection of HTTP: uvicorn's, with limits on slow clients, and a gentle end.

uvicorn closes a connection between two requests the moment the server leaves. A
request that is on its way then is lost. Here each answer says `Connection: close` once
the server leaves, and a connection without a request is closed only after it has been
quiet for a while.
"""

from __future__ import annotations

import contextlib
import socket
import time
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST_HEAD = 1 << 16  # bytes of a request's line and headers, as h11 has it
HEAD_SECONDS = 20.0  # in which they must arrive (assumption: nginx takes 60)
TAKE_SECONDS = 60.0  # in which a client must take an answer, as nginx has it
QUIET_SECONDS = 0.5  # of a connection before it ends with the server (assumption)
MOST_CONNECTIONS = 2048  # at once (assumption)

BUSY = (
    b"HTTP/1.1 503 Service Unavailable\r\n"
    b"content-type: application/json\r\n"
    b"retry-after: 1\r\n"
    b"connection: close\r\n"
    b"content-length: 33\r\n\r\n"
    b'{"error":"too many connections"}\n'
)
LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-type: application/json\r\n"
    b"connection: close\r\n"
    b"content-length: 36\r\n\r\n"
    b'{"error":"the headers are too long"}'
)
MALFORMED = b'{"error":"the message is no HTTP"}'


@dataclass
class Door:
    """What all connections of a server know.

    Attributes:
      is_leaving: whether the server ends; answers say `Connection: close` then.
      closed: when nobody new was let in any more, by `time.monotonic()`; from then on
        quiet connections are closed.
      most: connections at once.
    """

    is_leaving: bool = False
    closed: float | None = None
    most: int = MOST_CONNECTIONS


class Connection(HttpToolsProtocol):
    """A connection.

    A subclass with a `door` is made for each server.
    """

    door: Door

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self._head = 0  # bytes of it, so far
        self._since: float | None = None  # when a head began, or an answer stalled
        self._quiet = time.monotonic()  # since when no request is under way

    # ---- uvicorn's callbacks ----

    def connection_made(self, transport: Any) -> None:
        """Begin; refuse one connection too many."""
        super().connection_made(transport)
        self._since = time.monotonic()
        if len(self.connections) > self.door.most:
            transport.write(BUSY)
            transport.close()

    def data_received(self, data: bytes) -> None:
        """Read; the head of a request may neither grow nor last without end."""
        if self._is_between():
            self._head += len(data)
            if self._since is None:
                self._since = time.monotonic()
            if self._head > MOST_HEAD and not self._has_head(data):
                self._refuse(LARGE)
                return
        if self.parser is not None:
            super().data_received(data)

    def on_headers_complete(self) -> None:
        """Begin a request."""
        self._head = 0
        self._since = None
        super().on_headers_complete()
        # the application looks there whether its client is still there
        self.scope["state"]["cycle"] = self.cycle
        if self.door.is_leaving:
            self.cycle.keep_alive = False

    def on_response_complete(self) -> None:
        """End a request."""
        self._quiet = time.monotonic()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in JSON."""
        head = (
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(MALFORMED)
        )
        self._refuse(head + MALFORMED)

    def shutdown(self) -> None:
        """Say `Connection: close` with the next answer."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that nobody uses, unless a request has just come."""
        if not self._has_bytes():
            super().timeout_keep_alive_handler()

    # ---- what the server does now and then ----

    def look(self, now: float) -> None:
        """End the connection if its client is too slow, or has left with the server."""
        if self.transport is None or self.transport.is_closing():
            self._look_at_end(now)
            return
        is_slow = self._since is not None and now - self._since > HEAD_SECONDS
        if is_slow and self._is_between():
            self.transport.close()
            return
        closed = self.door.closed
        if closed is None or not self._is_between() or self._head:
            return
        quiet = now - max(self._quiet, closed)
        if quiet > QUIET_SECONDS and not self._has_bytes():
            self.transport.close()

    # ---- internals ----

    def _look_at_end(self, now: float) -> None:
        """End a closed connection whose client does not take the last answer."""
        if self.transport is None:
            return
        if self._since is None:
            self._since = now
        elif now - self._since > TAKE_SECONDS:
            self.transport.abort()

    def _is_between(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    def _has_head(self, data: bytes) -> bool:
        """Whether the head ends in these bytes; what is long is then the body."""
        return self._head == len(data) and b"\r\n\r\n" in data[:MOST_HEAD]

    def _refuse(self, answer: bytes) -> None:
        self.transport.write(answer)
        self.transport.close()

    def _has_bytes(self) -> bool:
        """Whether bytes have come that are not read yet."""
        connection = self.transport.get_extra_info("socket")
        if connection is None or self.transport.is_closing():
            return False
        with contextlib.suppress(OSError, ValueError):
            copy = socket.socket(fileno=socket.dup(connection.fileno()))
            with copy:
                copy.setblocking(False)
                return bool(copy.recv(1, socket.MSG_PEEK))
        return False

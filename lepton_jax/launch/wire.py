"""JSON objects, one a line, between supervisors; nothing here ever waits."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

LONGEST = 1 << 20  # bytes of a line, and of what waits to be sent: beyond that the other end is none of ours, or does not read


class Line:
    """One end of a connection.

    Attributes:
      heard: when something last came (monotonic, in seconds).
      open: False once the other end has closed it or has said something that is no such line; `fault` says why.
    """

    def __init__(self, connection: socket.socket):
        self.connection, self.heard, self.open, self.fault = connection, time.monotonic(), True, ""
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._in, self._out = b"", b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        if self.open:
            self._out += json.dumps(message).encode() + b"\n"
            self.flush()

    def flush(self) -> bool:
        """Send what goes; whether nothing is left."""
        try:
            while self._out and self.open:
                self._out = self._out[self.connection.send(self._out):]
        except BlockingIOError:
            if len(self._out) > LONGEST:
                self.give_up("the other end does not read")
        except ConnectionError:
            self.give_up("the connection was closed")
        except OSError as error:
            self.give_up(error.strerror or str(error))
        return not self._out or not self.open

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come."""
        try:
            while self.open:
                more = self.connection.recv(1 << 16)
                self.heard = time.monotonic()
                if not more:
                    self.give_up("the connection was closed")
                self._in += more
                if len(self._in) > LONGEST:
                    self.give_up("a line without an end")
        except BlockingIOError:
            pass
        except ConnectionError:
            self.give_up("the connection was closed")
        except OSError as error:
            self.give_up(error.strerror or str(error))
        *lines, self._in = self._in.split(b"\n")
        messages = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict):
                self.give_up("it speaks another language")
                break
            messages.append(message)
        return messages

    def give_up(self, fault: str) -> None:
        """It counts as lost; the first reason is kept."""
        if self.open:
            self.open, self.fault = False, fault

    def close(self) -> None:
        self.open = False
        self.connection.close()

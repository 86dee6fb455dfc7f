"""JSON objects, one a line, between hosts that have proved themselves; never waits."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from lepton_jax.launch import proof

# assumption: bytes of a line, and of what waits to be sent; beyond that the other end
# is not one of ours, or does not read
LONGEST = 1 << 20
LONGEST_UNPROVEN = 256  # bytes; the longest line before the proof has 79
CHUNK = 1 << 16  # bytes of one read
CLOSED = "the connection was closed"
LANGUAGE = "it speaks another language"


class Line:
    """One end of a connection.

    Both ends first prove that they have the run's token, see `proof`. A message sent
    before that waits for it; nothing that comes before it is a message.

    Args:
      connection: with the other end.
      token: of the run.
      channel: purpose of the connection; both ends must say the same.
      head: whether this end is host 0's.

    Attributes:
      heard: time of the last line that kept these rules (monotonic, in seconds); a
        letter now and then does not keep a connection alive.
      proven: the other end has proved itself.
      open: False once the other end has closed it or has broken the rules.
      error: the reason why it is no longer open; a `proof.TokenError` if that is the
        token.
      broken: the other end has broken the rules.
    """

    def __init__(
        self,
        connection: socket.socket,
        token: str,
        channel: str,
        head: bool,
    ):
        self.connection = connection
        self.heard = time.monotonic()
        self.open = True
        self.error: Exception | None = None
        self.proven = False
        self.broken = False
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        self._token = token
        self._channel = channel
        self._head = head
        self._own = proof.nonce()
        self._their: bytes | None = None
        self._keys: dict[bytes, bytes] = {}
        self._sent = 0
        self._received = 0
        self._in = b""
        self._out = b""
        self._waiting: list[bytes] = []
        if not head:
            self._answer(proof.opening(self._own))

    @property
    def fault(self) -> str:
        """Text of `error`; empty without one."""
        return "" if self.error is None else str(self.error)

    def fileno(self) -> int:
        """Return the file descriptor, for `select`."""
        return self.connection.fileno()

    def send(self, **message: Any) -> None:
        """Send a message, as far as that does not have to wait."""
        if not self.open:
            return
        self._waiting.append(json.dumps(message).encode())
        self._seal()
        self.flush()

    def flush(self) -> bool:
        """Send as much as goes; return whether nothing is left."""
        try:
            while self._out and self.open:
                self._out = self._out[self.connection.send(self._out) :]
        except BlockingIOError:
            if len(self._out) > LONGEST:
                self.give_up("the other end does not read")
        except ConnectionError:
            self.give_up(self._closed())
        except OSError as error:
            self.give_up(error.strerror or str(error))
        return not self._out or not self.open

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have come."""
        self._read()
        *lines, self._in = self._in.split(b"\n")
        messages = []
        for line in lines:
            if not self.proven:
                self._shake(line)
            elif (message := self._message(line)) is not None:
                messages.append(message)
            if self.broken:
                break
            self.heard = time.monotonic()
        return messages

    def give_up(self, fault: str | Exception) -> None:
        """Count the connection as lost; the first reason is kept."""
        if self.open:
            self.open = False
            self.error = ConnectionError(fault) if isinstance(fault, str) else fault

    def close(self) -> None:
        """Close the connection."""
        self.open = False
        self.connection.close()

    # ---- internals ----

    def _read(self) -> None:
        most = LONGEST if self.proven else LONGEST_UNPROVEN
        size = CHUNK if self.proven else 2 * most
        try:
            while self.open:
                chunk = self.connection.recv(size)
                if not chunk:
                    self.give_up(self._closed())
                self._in += chunk
                if len(self._in) > most:
                    self._break("a line without an end" if self.proven else LANGUAGE)
        except BlockingIOError:
            pass
        except ConnectionError:
            self.give_up(self._closed())
        except OSError as error:
            self.give_up(error.strerror or str(error))

    def _closed(self) -> Exception:
        """Return the fault of a connection that the other end has closed."""
        waits_for_proof = not self._head and self._their is not None and not self.proven
        if waits_for_proof:
            return proof.TokenError(proof.NOT_TAKEN)
        return ConnectionError(CLOSED)

    def _shake(self, line: bytes) -> None:
        """Take a line that came before the other end's proof."""
        if self._their is None:
            read = proof.read_opening if self._head else proof.read_nonce
            self._their = read(line)
            if self._their is None:
                self._break(LANGUAGE)
            elif self._head:
                self._answer(self._own)
            else:
                self._answer(self._proof(proof.HOST))
            return

        role = proof.HOST if self._head else proof.HEAD
        numbers = self._numbers()
        if not proof.proves(line, self._token, self._channel, role, *numbers):
            self._break(proof.TokenError(proof.NOT_GIVEN))
            return
        if self._head:
            self._answer(self._proof(proof.HEAD))
        self._keys = proof.keys(
            self._token,
            self._channel,
            *numbers,
        )
        self.proven = True
        self._seal()
        self.flush()

    def _numbers(self) -> tuple[bytes, bytes]:
        """Return the random numbers of the host and of host 0."""
        assert self._their is not None
        return (self._their, self._own) if self._head else (self._own, self._their)

    def _proof(self, role: bytes) -> bytes:
        return proof.proof(
            self._token,
            self._channel,
            role,
            *self._numbers(),
        )

    def _answer(self, line: bytes) -> None:
        self._out += line + b"\n"
        self.flush()

    def _seal(self) -> None:
        """Move the messages that waited for the proof to what is sent."""
        if not self.proven:
            return
        key = self._keys[proof.HEAD if self._head else proof.HOST]
        for message in self._waiting:
            self._out += proof.seal(key, self._sent, message) + b"\n"
            self._sent += 1
        self._waiting.clear()

    def _message(self, line: bytes) -> dict[str, Any] | None:
        """Return the message of a line; None if the other end has not sealed it."""
        key = self._keys[proof.HOST if self._head else proof.HEAD]
        text = proof.unseal(key, self._received, line)
        self._received += 1
        if text is None:
            self._break("what comes is not what the other end has sent")
            return None
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self._break(LANGUAGE)
            return None
        return message

    def _break(self, fault: str | Exception) -> None:
        """Give up a connection whose other end has broken the rules."""
        self.broken = True
        self.give_up(fault)

"""Proofs between hosts that both have the run's token, without sending it.

    a host                                     host 0
      "lepton-hosts 1 A"          ------->                A, B: fresh, random, 32 bytes
                                  <-------     B
      HMAC(token, "host", A, B)   ------->     believes the host from here on, or closes
                                  <-------     HMAC(token, "head", A, B)
      the host believes host 0 from here on, or closes
      HMAC(key, n, message) message  <---->    key: made of A, B and the direction
                                               n: 0, 1, 2, ... in each direction

Until its proof has come, host 0 answers a caller with nothing but a random number, and
a host tells host 0 nothing of the run. HMAC is that of SHA-256.

This protects against a caller, and against somebody in place of host 0, who does not
have the token; against a recorded exchange that is played again (A and B are fresh on
both sides); against one's own challenge or proof sent back (the two sides' proofs
differ by their role); against a proof that is carried from one use of the port to
another (the channel is part of it); and against messages that somebody on the network
changes, repeats, leaves out, sends back or puts in between (each has its number and its
direction in its seal). A message that was cut off is none.

It does not protect against reading along: nothing is encrypted. Nor does it protect
against a network that loses or closes what it carries, or against somebody who has the
token. A token that a person made up can be guessed from one recorded exchange; hence
the least length, and `tokens.make`.

Lines are bytes without their line end.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

GREETING = b"lepton-hosts 1 "
HEAD = b"head"
HOST = b"host"
SEAL = 64  # characters of an HMAC-SHA256, and of a random number, in hexadecimal

# texts of `TokenError`
NOT_TAKEN = "it did not take this host's proof of the run's token"
NOT_GIVEN = "it did not prove that it has the run's token"
REMEDY = "set LEPTON_TOKEN to the same value on all hosts"

_HEX = re.compile(rb"[0-9a-f]{64}")


class TokenError(ConnectionError):
    """A connection is lost because the two ends do not have the same token."""


def nonce() -> bytes:
    """Return a fresh random number, as it is sent."""
    return secrets.token_hex(SEAL // 2).encode()


def opening(own: bytes) -> bytes:
    """Return the first line of a host."""
    return GREETING + own


def read_opening(line: bytes) -> bytes | None:
    """Return the random number in a host's first line; None if it is no such line."""
    if not line.startswith(GREETING):
        return None
    return read_nonce(line.removeprefix(GREETING))


def read_nonce(line: bytes) -> bytes | None:
    """Return the random number that a line consists of; None if it is none."""
    return line if _HEX.fullmatch(line) else None


def proof(
    token: str,
    channel: str,
    role: bytes,
    host: bytes,
    head: bytes,
) -> bytes:
    """Return the line by which one side proves that it has the token.

    Args:
      token: of the run.
      channel: purpose of the connection.
      role: the side that proves itself, HOST or HEAD.
      host: the host's random number.
      head: host 0's random number.
    """
    return _hmac(
        token.encode(),
        b"proof",
        channel.encode(),
        role,
        host,
        head,
    )


def proves(
    line: bytes,
    token: str,
    channel: str,
    role: bytes,
    host: bytes,
    head: bytes,
) -> bool:
    """Whether a line is that side's proof; takes the same time however it is wrong."""
    expected = proof(token, channel, role, host, head)
    return hmac.compare_digest(line, expected)


def keys(
    token: str,
    channel: str,
    host: bytes,
    head: bytes,
) -> dict[bytes, bytes]:
    """Return the keys that seal the messages of each side, by its role."""
    secret = token.encode()
    exchange = (channel.encode(), host, head)
    return {
        HOST: _hmac(secret, b"key", HOST, *exchange),
        HEAD: _hmac(secret, b"key", HEAD, *exchange),
    }


def seal(
    key: bytes,
    number: int,
    message: bytes,
) -> bytes:
    """Return the line for a message without line ends, sealed with its number."""
    return _seal(key, number, message) + b" " + message


def unseal(
    key: bytes,
    number: int,
    line: bytes,
) -> bytes | None:
    """Return the message of a line; None if key and number do not fit its seal."""
    sealed = line[:SEAL]
    message = line[SEAL + 1 :]
    has_space = line[SEAL : SEAL + 1] == b" "
    if has_space and hmac.compare_digest(sealed, _seal(key, number, message)):
        return message
    return None


def _seal(
    key: bytes,
    number: int,
    message: bytes,
) -> bytes:
    return _hmac(
        key,
        b"message",
        str(number).encode(),
        message,
    )


def _hmac(key: bytes, *parts: bytes) -> bytes:
    """Return the HMAC in hexadecimal; only the last part may hold a line end."""
    text = b"\n".join(parts)
    return hmac.new(key, text, hashlib.sha256).hexdigest().encode()

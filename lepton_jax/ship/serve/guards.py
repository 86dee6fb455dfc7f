"""What a message must keep to before it is read: a token, a size, an origin."""

from __future__ import annotations

import hmac
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from http import HTTPStatus

from lepton_jax.launch.cluster import split
from lepton_jax.ship.serve.refusal import Refusal, bad

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MEBIBYTE = 1 << 20
MOST_HOSTS = 64  # names that are remembered; a client may send any
MOST_DIGITS = 15  # of a length; more than any body that fits a disk
# How zlib is told of a format: https://zlib.net/manual.html#Advanced
FORMATS = {b"gzip": 31, b"deflate": 15}


@dataclass(frozen=True)
class Guards:
    """Limits of messages, and who may send them.

    Attributes:
      tokens: one of which each request must bring; empty: none is needed.
      admin_tokens: those that may load and unload models; empty: nobody may.
      most_bytes: of a body (assumption: a batch of pictures).
      body_seconds: in which a body must arrive (assumption).
      is_local: whether the server is reached at a loopback address alone. Then it is
        asked by a loopback name: a page of the web may let a name of its own lead here,
        but not that one.
    """

    tokens: tuple[str, ...] = ()
    admin_tokens: tuple[str, ...] = ()
    most_bytes: int = 64 * MEBIBYTE
    body_seconds: float = 30.0
    is_local: bool = False

    def check(self, headers: Mapping[bytes, bytes]) -> None:
        """Check who asks.

        Raises:
          Refusal: 401, without a token; 403, by the name of another, or from a page of
            another.
        """
        self.check_origin(headers)
        if self.tokens and not _brings(headers, self.tokens + self.admin_tokens):
            raise _no_token()

    def check_origin(self, headers: Mapping[bytes, bytes]) -> None:
        """Check by which name and from which page somebody asks.

        Raises:
          Refusal: 403, it is not the server's own.
        """
        host = headers.get(b"host", b"")
        if self.is_local and host and not _is_loopback(host):
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "this server is asked as localhost alone",
            )
        origin = headers.get(b"origin")
        if origin is not None and origin.rpartition(b"//")[2] != host:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "a page of another server may not ask this one",
            )

    def check_admin(self, headers: Mapping[bytes, bytes]) -> None:
        """Check that models may be changed.

        Raises:
          Refusal: 403, nobody may; 401, without the token for that.
        """
        if not self.admin_tokens:
            raise Refusal(
                HTTPStatus.FORBIDDEN,
                "models are changed with a token of --admin-token-file, and none is"
                " given",
            )
        if not _brings(headers, self.admin_tokens):
            raise _no_token()

    def check_length(self, headers: Mapping[bytes, bytes]) -> None:
        """Check the announced length of a body.

        Raises:
          Refusal: 400, it is no length; 413, it is too large.
        """
        length = headers.get(b"content-length")
        if length is None:
            return
        if not length.isdigit() or len(length) > MOST_DIGITS:
            raise Refusal(
                HTTPStatus.BAD_REQUEST,
                "Content-Length is no count of bytes",
                closes=True,
            )
        if int(length) > self.most_bytes:
            raise self.too_large()

    def too_large(self) -> Refusal:
        """Return the refusal of a body that is too large."""
        return Refusal(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"a body has at most {self.most_bytes} bytes",
            closes=True,
        )

    def unpacked(self, body: bytes, encoding: bytes | None) -> bytes:
        """Return a body as it was before it was compressed.

        Raises:
          Refusal: 415, in a way that is not known; 413, it is too large; 400, damaged.
        """
        if encoding in (None, b"", b"identity"):
            return body
        if encoding not in FORMATS:
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "a body is compressed as gzip or deflate, or not at all",
            )
        unpacker = zlib.decompressobj(FORMATS[encoding])
        try:
            content = unpacker.decompress(body, self.most_bytes + 1)
        except zlib.error as error:
            raise bad(f"the body can't be unpacked: {error}") from error
        if len(content) > self.most_bytes:
            raise self.too_large()
        if not unpacker.eof:
            raise bad("the compressed body is cut off")
        return content


def json_length(headers: Mapping[bytes, bytes], name: bytes) -> int | None:
    """Return the bytes of JSON that a header announces; None: the body is all JSON.

    Raises:
      Refusal: it is no count.
    """
    text = headers.get(name)
    if text is None:
        return None
    if not text.isdigit() or len(text) > MOST_DIGITS:
        raise bad(f"{name.decode()} is no count of bytes")
    return int(text)


# ---- internals ----


@lru_cache(MOST_HOSTS)
def _is_loopback(host: bytes) -> bool:
    return split(host.decode("latin-1"))[0].lower() in LOOPBACK


def _brings(headers: Mapping[bytes, bytes], tokens: tuple[str, ...]) -> bool:
    """Whether a request brings one of some tokens."""
    kind, _, token = headers.get(b"authorization", b"").partition(b" ")
    if kind.lower() != b"bearer":
        return False
    given = token.strip()
    # all are compared, so that the time tells nothing
    matches = [hmac.compare_digest(given, good.encode()) for good in tokens]
    return any(matches)


def _no_token() -> Refusal:
    return Refusal(
        HTTPStatus.UNAUTHORIZED,
        "send a token of this server as Authorization: Bearer TOKEN",
    )

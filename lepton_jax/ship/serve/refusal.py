"""Requests that are refused: a status of HTTP, and a sentence for the client."""

from __future__ import annotations

from http import HTTPStatus


class Refusal(Exception):
    """A request that is answered with an error.

    Args:
      status: of HTTP; below 500 it is the client's fault.
      message: one sentence that says what is wrong and what to send instead.
      retry_after: seconds after which the same request may be taken; None: never.
      closes: whether the connection ends with the answer, because the rest of the
        request is not read.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        retry_after: int | None = None,
        closes: bool = False,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after
        self.closes = closes


def bad(message: str) -> Refusal:
    """Return the refusal of a request that is not as it should be."""
    return Refusal(HTTPStatus.BAD_REQUEST, message)


def unknown(message: str) -> Refusal:
    """Return the refusal of a request for something that is not here."""
    return Refusal(HTTPStatus.NOT_FOUND, message)


def busy(
    message: str,
    retry_after: int = 1,
) -> Refusal:
    """Return the refusal of a request that may be taken later."""
    return Refusal(
        HTTPStatus.SERVICE_UNAVAILABLE,
        message,
        retry_after=retry_after,
    )


def late(message: str) -> Refusal:
    """Return the refusal of a request that waited for too long."""
    return Refusal(HTTPStatus.GATEWAY_TIMEOUT, message)


def broken(message: str) -> Refusal:
    """Return the refusal of a request on which the model failed."""
    return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, message)

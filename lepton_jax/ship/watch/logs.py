"""Structured logs: one JSON object a line, one line a request.

    {"time": "2026-11-30T07:12:31.482+00:00", "level": "info", "event": "request",
     "request": "7f3a...", "trace": "4bf9...", "model": "digits", "version": "1",
     "rows": 3, "status": 200, "seconds": 0.0061, "stages": {"read": 0.0002, ...},
     "joules": null, "price": 2.1e-07}

No value of a row is ever logged: rows are people's data.
"""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from lepton_jax.ship.watch.visit import Visit

LOGGER = "lepton.serve"
FIELDS = "lepton_fields"  # attribute of a record that holds its fields
DIGITS = 7  # of seconds in the log: a tenth of a microsecond

# The request that this task or thread works for, for lines of other loggers.
current: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "lepton_request",
    default=None,
)


class JsonLines(logging.Formatter):
    """A formatter that writes a record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; it holds no line break whatever the message has."""
        when = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != LOGGER:
            line["logger"] = record.name
        if current.get() is not None:
            line["request"] = current.get()
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def open_log(
    stream: TextIO | None = None,
    level: str = "info",
) -> logging.Logger:
    """Return the server's logger, writing JSON lines to a stream.

    Args:
      stream: None: standard error.
      level: the least that is written: "debug", "info", "warning" or "error"; a request
        that went well is "info".
    """
    logger = logging.getLogger(LOGGER)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logger.handlers = [handler]
    logger.propagate = False
    logger.setLevel(level.upper())
    return logger


def log_event(
    logger: logging.Logger,
    level: int,
    event: str,
    fields: Mapping[str, Any],
) -> None:
    """Write a line with fields of its own."""
    if logger.isEnabledFor(level):
        logger.log(level, event, extra={FIELDS: dict(fields)})


def log_request(
    logger: logging.Logger,
    visit: Visit,
    status: int,
    seconds: float,
    error: str,
) -> None:
    """Write the line of a request: an error where the server is to blame."""
    level = logging.INFO
    if status >= 500:
        level = logging.ERROR
    elif status >= 400:
        level = logging.WARNING
    if not logger.isEnabledFor(level):
        return
    fields: dict[str, Any] = {
        "request": visit.id,
        "model": visit.model,
        "version": visit.version,
        "protocol": visit.protocol,
        "rows": visit.rows,
        "status": status,
        "seconds": round(seconds, DIGITS),
        "stages": {name: round(spent, DIGITS) for name, spent in visit.stages.items()},
    }
    if visit.traceparent:
        fields["trace"] = visit.traceparent
    if visit.charge is not None:
        fields["joules"] = visit.charge.joules
        fields["price"] = visit.charge.money
    if error:
        fields["error"] = error
    log_event(logger, level, "request", fields)

"""The meter of a server: what it is told of requests and batches, as metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from lepton_jax.ship.watch.charges import Charge, Price, share_out
from lepton_jax.ship.watch.families import Families, client
from lepton_jax.ship.watch.visit import Visit, identity

# of the text format, as Prometheus and its relatives ask for it
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

CLIENT_ERROR = 400
CLIENT_GONE = 499  # as nginx writes it in its logs: the client closed the connection
SERVER_ERROR = 500
BUSY = 503
LATE = 504


class Meter:
    """Everything that one server measures.

    Args:
      price: of the machine; None: money is not stated.

    Raises:
      DataError: the library `prometheus_client` is not installed.
    """

    def __init__(self, price: Price | None = None) -> None:
        library = client()
        self.price = price
        self._registry = library.CollectorRegistry()
        self._generate = library.generate_latest
        self._families = Families(self._registry)
        library.ProcessCollector(registry=self._registry)
        self._models: dict[tuple[str, str], ModelMeter] = {}

    # ---- requests ----

    def arrive(
        self,
        id: str | None = None,
        traceparent: str | None = None,
    ) -> Visit:
        """Note that a request has come in.

        Args:
          id: from the header X-Request-Id; one that can't stand in a log, or None, is
            replaced by a new one.
          traceparent: the header of that name, of W3C's Trace Context.
        """
        self._families.under_way.inc()
        return Visit(identity(id), traceparent)

    def leave(
        self,
        visit: Visit,
        status: int,
        error: str = "",
    ) -> None:
        """Note that a request was answered, or can't be any more.

        Args:
          visit: what `arrive` returned; it is done with.
          status: of HTTP; 499: the client went away before the answer.
          error: the words of the answer, for the log.
        """
        families = self._families
        families.under_way.dec()
        model = (visit.model, visit.version)
        families.requests.labels(*model, str(status)).inc()
        kind = _kind_of_error(status)
        if kind:
            families.errors.labels(*model, kind).inc()
        families.request_seconds.labels(*model, visit.protocol).observe(
            visit.clock() - visit.began
        )
        for stage, seconds in visit.stages.items():
            families.stage_seconds.labels(*model, stage).observe(seconds)

    # ---- models ----

    def model(
        self,
        name: str,
        version: str = "1",
        artifact: Any = None,
    ) -> ModelMeter:
        """Return the meter of a model; the same one if it is asked for again.

        Args:
          name: of the model.
          version: of the model.
          artifact: the `Artifact`, for its training histograms; None: no drift.
        """
        key = (name, version)
        if key not in self._models:
            self._models[key] = ModelMeter(self, *key)
        return self._models[key]

    def forget(self, name: str, version: str) -> None:
        """Stop showing gauges of a model that is no longer served."""
        self._models.pop((name, version), None)

    # ---- the server ----

    def ready(self, is_ready: bool) -> None:
        """Say whether the server takes requests."""
        self._families.ready.set(int(is_ready))

    def text(self) -> str:
        """Return all metrics, in Prometheus' text format 0.0.4."""
        return str(self._generate(self._registry).decode())

    def close(self) -> None:
        """Write what is still to be written, and let go of threads."""


class ModelMeter:
    """What a server measures of one version of a model.

    Args:
      meter: of the server.
      name: of the model.
      version: of the model.
    """

    def __init__(
        self,
        meter: Meter,
        name: str,
        version: str,
    ) -> None:
        self._meter = meter
        families = meter._families
        self._rows = families.rows.labels(name, version)
        self._padding = families.padding.labels(name, version)
        self._busy = families.busy.labels(name, version)
        self._fill = families.fill.labels(name, version)
        self._batch_rows = families.batch_rows.labels(name, version)
        self._queued = families.queued.labels(name, version)
        self._limit = families.queue_limit.labels(name, version)
        self._batches = cache(
            lambda size: families.batches.labels(name, version, str(size))
        )

    def batch(
        self,
        rows: Sequence[int],
        size: int,
        seconds: float,
    ) -> list[Charge]:
        """Note that a batch has run.

        Args:
          rows: of each request in it; at least one row in all.
          size: rows that were computed, empty ones included.
          seconds: that it took on the devices.

        Returns:
          What each request is charged, in the same order.
        """
        real = sum(rows)
        self._rows.inc(real)
        self._padding.inc(size - real)
        self._busy.inc(seconds)
        self._fill.observe(real / size)
        self._batch_rows.observe(real)
        self._batches(size).inc()
        return share_out(rows, size, seconds, None, self._meter.price)

    def queue(self, waiting: int, limit: int | None = None) -> None:
        """Say how many rows wait, and how many may."""
        self._queued.set(waiting)
        if limit is not None:
            self._limit.set(limit)

    def rows(self, raw: Any) -> None:
        """Count rows for drift; nothing of them is kept.

        Args:
          raw: rows as a request brought them: a list of dicts, a dict of columns, or
            a dict of the model's input arrays. They are counted later, by another
            thread, and must not be changed meanwhile.
        """


# ---- internals ----


def _kind_of_error(status: int) -> str:
    """Return whose fault a status tells of; empty: nobody's."""
    if status < CLIENT_ERROR:
        return ""
    named = {
        CLIENT_GONE: "gone",
        BUSY: "busy",
        LATE: "late",
    }
    if status in named:
        return named[status]
    return "client" if status < SERVER_ERROR else "server"

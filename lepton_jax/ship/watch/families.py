"""The metrics of a server, by name: what each one counts, and in which unit.

They are kept by the official client library of Prometheus, one registry a server, so
that two servers in one process don't share counters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from lepton_jax.ship.extras import needs

PREFIX = "lepton_serve_"
MODEL = ("model", "version")

# Edges in seconds, for what takes from 20 microseconds (reading a body) to 10 seconds
# (the time limit of a slow request): about three in each power of ten. Assumption: an
# edge within 2.5 times of any latency is near enough for an alert.
SECONDS = (
    *(2e-5, 5e-5, 1e-4, 2e-4, 5e-4),
    *(1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
# Shares of a compiled batch that hold rows; a ladder of powers of two fills each by
# more than half, unless a request waits no longer for company.
SHARES = (0.1, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def client() -> Any:
    """Return the library `prometheus_client`.

    Raises:
      MissingExtraError: it is not installed.
    """
    return needs(
        "prometheus_client",
        extra="serve",
        purpose="metrics of a server",
    )


def core() -> Any:
    """Return the library's families for samples that are worked out when asked for."""
    return needs(
        "prometheus_client.core",
        extra="serve",
        purpose="metrics of a server",
    )


class OfRequest(NamedTuple):
    """The samples that one request updates.

    They are looked up once: a label costs more than a count.
    """

    requests: Callable[[str], Any]  # by status
    errors: Callable[[str], Any]  # by kind
    stages: Callable[[str], Any]  # by stage
    seconds: Any


class Families:
    """The families of samples that a server updates as it works.

    Args:
      registry: of `prometheus_client`, which they are added to.
    """

    def __init__(self, registry: Any) -> None:
        self._registry = registry
        self._library = client()
        self._add_requests()
        self._add_batches()
        self._add_server()

    def _add_requests(self) -> None:
        self.requests = self._counter(
            "requests",
            "Requests answered, by HTTP status; 499: the client went away.",
            (*MODEL, "status"),
        )
        self.errors = self._counter(
            "errors",
            "Requests that were not answered as asked, by whose fault it is.",
            (*MODEL, "kind"),
        )
        self.request_seconds = self._histogram(
            "request_seconds",
            "Time from a request's arrival to its answer.",
            (*MODEL, "protocol"),
            SECONDS,
        )
        self.stage_seconds = self._histogram(
            "stage_seconds",
            "Time of a request in each stage.",
            (*MODEL, "stage"),
            SECONDS,
        )
        self.under_way = self._gauge("requests_under_way", "Requests not yet answered.")

    def _add_batches(self) -> None:
        self.rows = self._counter("rows", "Rows computed for requests.", MODEL)
        self.padding = self._counter(
            "padding_rows",
            "Empty rows computed to fill batches up to a compiled size.",
            MODEL,
        )
        self.batches = self._counter(
            "batches",
            "Batches computed, by compiled size.",
            (*MODEL, "size"),
        )
        self.busy = self._counter(
            "busy_seconds",
            "Time in which batches were computed.",
            MODEL,
        )
        self.fill = self._histogram(
            "batch_fill_ratio",
            "Share of a batch that holds rows.",
            MODEL,
            SHARES,
        )
        self.batch_rows = self._histogram(
            "batch_rows",
            "Rows of a batch, without padding.",
            MODEL,
            ROWS,
        )

    def _add_server(self) -> None:
        self.queued = self._gauge("queue_rows", "Rows that wait for a batch.", MODEL)
        self.queue_limit = self._gauge(
            "queue_limit_rows",
            "Rows that may wait; a request above them is refused.",
            MODEL,
        )
        self.ready = self._gauge("ready", "1 while the server takes requests.")

    def of_request(
        self,
        model: str,
        version: str,
        protocol: str,
    ) -> OfRequest:
        """Return the samples of the requests of a model."""
        key = (model, version)
        return OfRequest(
            cache(lambda status: self.requests.labels(*key, status)),
            cache(lambda kind: self.errors.labels(*key, kind)),
            cache(lambda stage: self.stage_seconds.labels(*key, stage)),
            self.request_seconds.labels(*key, protocol),
        )

    # ---- internals ----

    def _counter(
        self,
        name: str,
        help: str,
        labels: tuple[str, ...] = (),
    ) -> Any:
        return self._library.Counter(
            PREFIX + name,
            help,
            labels,
            registry=self._registry,
        )

    def _gauge(
        self,
        name: str,
        help: str,
        labels: tuple[str, ...] = (),
    ) -> Any:
        return self._library.Gauge(
            PREFIX + name,
            help,
            labels,
            registry=self._registry,
        )

    def _histogram(
        self,
        name: str,
        help: str,
        labels: tuple[str, ...],
        edges: tuple[float, ...],
    ) -> Any:
        return self._library.Histogram(
            PREFIX + name,
            help,
            labels,
            buckets=edges,
            registry=self._registry,
        )

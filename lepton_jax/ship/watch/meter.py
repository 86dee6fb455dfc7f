"""The meter of a server: what it is told of requests and batches, as metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from lepton_jax.monitor.energy import EnergyMeter
from lepton_jax.ship.watch.charges import Charge, Price, share_out
from lepton_jax.ship.watch.collected import Costs, Devices, Drifts
from lepton_jax.ship.watch.families import Families, client
from lepton_jax.ship.watch.ledger import Ledger
from lepton_jax.ship.watch.logs import log_event, log_request
from lepton_jax.ship.watch.traces import Traces
from lepton_jax.ship.watch.visit import Visit, identity

if TYPE_CHECKING:
    from lepton_jax.ship.watch.tallies import Tallies

# of the text format, as Prometheus and its relatives ask for it
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

CLIENT_ERROR = 400
CLIENT_GONE = 499  # as nginx writes it in its logs: the client closed the connection
SERVER_ERROR = 500
BUSY = 503
LATE = 504

# Seconds between two counts of the rows that wait. Assumption: short enough that the
# line of them is seldom full, long enough that a count costs little.
PERIOD = 0.5


class Meter:
    """Everything that one server measures.

    Args:
      price: of the machine; None: money is not stated.
      log: where a line is written for each request; None: nowhere.
      traces: where spans go to; None: nowhere.
      energy: of the machine; None: its own counters, if they can be read.

    Raises:
      MissingExtraError: the library `prometheus_client` is not installed.
    """

    def __init__(
        self,
        price: Price | None = None,
        log: logging.Logger | None = None,
        traces: Traces | None = None,
        energy: EnergyMeter | None = None,
    ) -> None:
        library = client()
        self.price = price
        self.energy = energy or EnergyMeter()
        self.ledger = Ledger(self.energy, price)
        self._log = log
        self._traces = traces
        self._models: dict[tuple[str, str], ModelMeter] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._generate = library.generate_latest
        self._registry = library.CollectorRegistry()
        self._families = Families(self._registry)
        self._samples = cache(self._families.of_request)
        library.ProcessCollector(registry=self._registry)
        self._registry.register(Devices())
        self._registry.register(Costs(self.energy, self._costs))
        self._registry.register(Drifts(self._tallies))

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
        seconds = visit.clock() - visit.began
        self._families.under_way.dec()
        samples = self._samples(visit.model, visit.version, visit.protocol)
        samples.requests(str(status)).inc()
        kind = kind_of_error(status)
        if kind:
            samples.errors(kind).inc()
        samples.seconds.observe(seconds)
        for stage, spent in visit.stages.items():
            samples.stages(stage).observe(spent)
        if self._log is not None:
            log_request(self._log, visit, status, seconds, error)
        if self._traces is not None:
            self._traces.record(visit, status, seconds)

    def event(self, what: str, **fields: Any) -> None:
        """Write a line of the log about no request: a start, a swap, a drain."""
        if self._log is not None:
            log_event(self._log, logging.INFO, what, fields)

    # ---- models ----

    def model(
        self,
        name: str,
        version: str = "1",
        artifact: Any = None,
    ) -> ModelMeter:
        """Return the meter of a model; the same one if it is asked for again.

        An artifact that has taken the place of another begins a window of its own.

        Args:
          name: of the model.
          version: of the model.
          artifact: the `Artifact`, for its training histograms; None: drift is not
            measured.
        """
        key = (name, version)
        text = None if artifact is None else artifact.training
        known = self._models.get(key)
        if known is None or (artifact is not None and known.training != text):
            known = ModelMeter(self, name, version, text)
            self._models[key] = known
            self._start()
        return known

    def forget(self, name: str, version: str) -> None:
        """Stop showing gauges of a model that is no longer served."""
        self._models.pop((name, version), None)

    # ---- the server ----

    def ready(self, is_ready: bool) -> None:
        """Say whether the server takes requests."""
        self._families.ready.set(int(is_ready))

    def text(self) -> str:
        """Return all metrics, in Prometheus' text format 0.0.4."""
        return str(self._generate(_WithoutCreated(self._registry)).decode())

    def close(self) -> None:
        """Let go of the thread, and send the spans that are not yet sent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._traces is not None:
            self._traces.close()

    # ---- internals ----

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._count,
                name="lepton-watch",
                daemon=True,
            )
            self._thread.start()

    def _count(self) -> None:
        while not self._stop.wait(PERIOD):
            for tallies in self._tallies().values():
                tallies.count()
            self.ledger.settle()

    def _tallies(self) -> dict[tuple[str, str], Tallies]:
        models = list(self._models.items())
        return {
            key: model.tallies for key, model in models if model.tallies is not None
        }

    def _costs(self) -> Mapping[tuple[str, str], Mapping[str, float]]:
        return self.ledger.costs(list(self._models))


class ModelMeter:
    """What a server measures of one version of a model.

    Attributes:
      tallies: the rows that are counted for drift; None: training's are not known.

    Args:
      meter: of the server.
      name: of the model.
      version: of the model.
      training: what its rows of training looked like, as an artifact keeps it.
    """

    def __init__(
        self,
        meter: Meter,
        name: str,
        version: str,
        training: str | None = None,
    ) -> None:
        self._meter = meter
        self._key = (name, version)
        self.training = training
        self.tallies = tallies_of(training)
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
        empty = size - real
        self._rows.inc(real)
        self._padding.inc(empty)
        self._busy.inc(seconds)
        self._fill.observe(real / size)
        self._batch_rows.observe(real)
        self._batches(size).inc()
        meter = self._meter
        meter.ledger.add(self._key, real, seconds, seconds * empty / size)
        return share_out(rows, size, seconds, meter.energy.watts, meter.price)

    def queue(self, waiting: int, limit: int | None = None) -> None:
        """Say how many rows wait, and how many may."""
        self._queued.set(waiting)
        if limit is not None:
            self._limit.set(limit)

    def rows(self, raw: Any) -> None:
        """Count raw rows for drift; nothing of them is kept.

        Args:
          raw: rows as a request brought them: a list of dicts, a dict of columns, or
            a table of Polars. They are counted within a second, by another thread,
            and must not be changed meanwhile.
        """
        if self.tallies is not None:
            self.tallies.add_rows(raw)

    def arrays(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Count input arrays for drift, of a model that takes no raw rows.

        Args:
          inputs: arrays [rows, ...] by name, without padding; see `rows`.
        """
        if self.tallies is not None:
            self.tallies.add_arrays(inputs)


def kind_of_error(status: int) -> str:
    """Return whose fault a status of HTTP tells of; empty: nobody's."""
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


def tallies_of(training: str | None) -> Tallies | None:
    """Return the tallies of a model; None: there is nothing to compare its rows with.

    Args:
      training: the JSON of a `Reference`, as an artifact keeps it.
    """
    # a server of arrays need not have the library for tables
    if training is None or find_spec("polars") is None:
        return None
    from lepton_jax.ship.watch.reference import Reference
    from lepton_jax.ship.watch.tallies import Tallies

    return Tallies(Reference.from_json(training))


# ---- internals ----


class _WithoutCreated:
    """The families of a registry, without a time of creation next to each counter."""

    def __init__(self, registry: Any) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Any]:
        for family in self._registry.collect():
            family.samples = [
                sample
                for sample in family.samples
                if not sample.name.endswith("_created")
            ]
            yield family

"""OpenTelemetry: a span for each request, and one for each of its stages.

The spans are made when a request is over, from the times that were measured anyhow, so
that a request waits for none of it. Where they go to is said by OpenTelemetry's own
variables:

    OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 lepton serve digits.lepton
"""

from __future__ import annotations

import os
import re
import time
from typing import Any

from lepton_jax.ship.extras import needs
from lepton_jax.ship.watch.visit import STAGES, Visit

EXTRA = "otel"
PURPOSE = "tracing requests"
ENDPOINTS = (
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
)
SERVICE = "lepton-serve"
NANOSECONDS = 1_000_000_000
# https://www.w3.org/TR/trace-context/#traceparent-header
TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
SERVER_ERROR = 500


def wanted() -> bool:
    """Whether the environment says where spans go to."""
    return any(os.environ.get(name) for name in ENDPOINTS)


class Traces:
    """Spans of requests.

    Args:
      provider: a `TracerProvider`; None: one that sends to the endpoint of the
        environment, in batches, from a thread of its own.

    Raises:
      MissingExtraError: OpenTelemetry is not installed.
    """

    def __init__(self, provider: Any = None) -> None:
        self._api: Any = needs("opentelemetry.trace", extra=EXTRA, purpose=PURPOSE)
        needs("opentelemetry.sdk.trace", extra=EXTRA, purpose=PURPOSE)
        self._provider = provider or _provider()
        self._tracer = self._provider.get_tracer("lepton_jax")

    def record(
        self,
        visit: Visit,
        status: int,
        seconds: float,
    ) -> None:
        """Make the spans of a request that is over.

        Args:
          visit: the request.
          status: of HTTP.
          seconds: since its arrival.
        """
        until = time.time_ns()
        began = until - int(seconds * NANOSECONDS)
        span = self._tracer.start_span(
            f"infer {visit.model}".strip(),
            context=self._parent(visit.traceparent),
            kind=self._api.SpanKind.SERVER,
            start_time=began,
            attributes={
                "http.response.status_code": status,
                "lepton.model": visit.model,
                "lepton.version": visit.version,
                "lepton.rows": visit.rows,
                "lepton.request": visit.id,
            },
        )
        if status >= SERVER_ERROR:
            span.set_status(self._api.Status(self._api.StatusCode.ERROR))
        inside = self._api.set_span_in_context(span)
        for stage in STAGES:
            if stage not in visit.stages:
                continue
            length = int(visit.stages[stage] * NANOSECONDS)
            child = self._tracer.start_span(stage, context=inside, start_time=began)
            began = min(began + length, until)
            child.end(began)
        span.end(until)

    def close(self) -> None:
        """Send what is not yet sent."""
        self._provider.shutdown()

    # ---- internals ----

    def _parent(self, traceparent: str | None) -> Any:
        """Return the context of the caller's span; None: there is none, or no valid."""
        match = TRACEPARENT.fullmatch(traceparent or "")
        if match is None or match[1] == "ff":
            return None
        context = self._api.SpanContext(
            trace_id=int(match[2], 16),
            span_id=int(match[3], 16),
            is_remote=True,
            trace_flags=self._api.TraceFlags(int(match[4], 16)),
        )
        if not context.is_valid:
            return None
        return self._api.set_span_in_context(self._api.NonRecordingSpan(context))


def _provider() -> Any:
    """Return a provider that sends spans by OTLP over HTTP."""
    sdk = needs("opentelemetry.sdk.trace", extra=EXTRA, purpose=PURPOSE)
    export = needs("opentelemetry.sdk.trace.export", extra=EXTRA, purpose=PURPOSE)
    otlp = needs(
        "opentelemetry.exporter.otlp.proto.http.trace_exporter",
        extra=EXTRA,
        purpose=PURPOSE,
    )
    resources = needs("opentelemetry.sdk.resources", extra=EXTRA, purpose=PURPOSE)
    name = os.environ.get("OTEL_SERVICE_NAME", SERVICE)
    provider = sdk.TracerProvider(
        resource=resources.Resource.create({"service.name": name})
    )
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    return provider

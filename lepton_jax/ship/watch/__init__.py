"""An eye on a server: metrics, drift, energy, money, logs and traces.

A server holds one `Meter`, and tells it of each request and each batch:

    meter = Meter(price=Price.per_hour(1.20))
    digits = meter.model("digits", "1", artifact)

    visit = meter.arrive(id=header, traceparent=header)   # a request came in
    visit.names("digits", "1", rows=3)
    visit.mark("read")                      # the time since arrival went to reading
    digits.rows(raw_rows)                   # counted for drift, then forgotten
    visit.mark("prepare")
    ...
    visit.mark("queue")
    charges = digits.batch([3, 1], size=8, seconds=0.004)   # one batch has run
    visit.charge = charges[0]               # what this request's share of it cost
    visit.mark("compute")
    visit.mark("write")
    meter.leave(visit, status=200)          # metrics, a line of the log, a trace

    meter.text()                            # for GET /metrics
"""

from lepton_jax.ship.watch.charges import Charge, Price
from lepton_jax.ship.watch.logs import open_log
from lepton_jax.ship.watch.meter import CONTENT_TYPE, Meter, ModelMeter
from lepton_jax.ship.watch.traces import Traces
from lepton_jax.ship.watch.visit import STAGES, Visit

__all__ = [
    "CONTENT_TYPE",
    "STAGES",
    "Charge",
    "Meter",
    "ModelMeter",
    "Price",
    "Traces",
    "Visit",
    "open_log",
]

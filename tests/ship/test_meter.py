"""The meter of a server: metrics, charges, logs and traces."""

import io
import json
import logging
import math
import re
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from lepton_jax.monitor.energy import EnergyMeter, Found
from lepton_jax.ship.watch import STAGES, Meter, Price, open_log
from lepton_jax.ship.watch.charges import share_out
from lepton_jax.ship.watch.meter import kind_of_error
from lepton_jax.ship.watch.visit import SAFE_ID, identity
from tools import dashboard

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "docs" / "monitoring"
NOTHING = EnergyMeter(Found((), ("no counters in a test",)))


@pytest.fixture
def meter():
    meter = Meter(price=Price.per_hour(3.6), energy=NOTHING)
    yield meter
    meter.close()


def samples(meter):
    """All samples by (name, sorted labels)."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(meter.text())
        for sample in family.samples
    }


def value(meter, name, **labels):
    return samples(meter)[f"lepton_serve_{name}", tuple(sorted(labels.items()))]


def names(meter):
    return {name for name, _ in samples(meter)}


@given(
    rows=st.lists(st.integers(1, 50), min_size=1, max_size=20),
    room=st.integers(0, 100),
    seconds=st.floats(1e-6, 100),
    watts=st.none() | st.floats(0, 1e4),
)
def test_charges_add_up_to_the_batch_and_go_by_rows(rows, room, seconds, watts):
    size = sum(rows) + room
    charges = share_out(rows, size, seconds, watts, Price(2.0, per_joule=0.5))
    assert math.isclose(sum(c.seconds for c in charges), seconds, rel_tol=1e-9)
    empty = sum(c.padding_seconds for c in charges)
    assert math.isclose(empty, seconds * room / size, rel_tol=1e-9, abs_tol=1e-12)
    each = {round(c.seconds / c.rows / seconds, 9) for c in charges}
    assert len(each) == 1
    money = 2.0 * seconds + 0.5 * (watts or 0.0) * seconds
    assert math.isclose(sum(c.money for c in charges), money, rel_tol=1e-9)
    assert all((c.joules is None) == (watts is None) for c in charges)


def test_what_a_server_tells_comes_out_as_metrics(meter):
    model = meter.model("digits", "2")
    model.queue(5, limit=100)
    for status in (200, 200, 400, 503, 500, 499):
        visit = meter.arrive()
        visit.names("digits", "2", rows=3, protocol="binary")
        for stage in STAGES:
            visit.mark(stage)
        meter.leave(visit, status)
    model.batch([3, 1], size=8, seconds=0.5)
    lost = meter.arrive()
    meter.leave(lost, 404, error="there is no model 'digit'")

    where = {"model": "digits", "version": "2"}
    assert value(meter, "requests_total", **where, status="200") == 2
    assert value(meter, "requests_total", model="", version="", status="404") == 1
    for kind in ("client", "busy", "server", "gone"):
        assert value(meter, "errors_total", **where, kind=kind) == 1
    assert value(meter, "request_seconds_count", **where, protocol="binary") == 6
    assert value(meter, "stage_seconds_count", **where, stage="queue") == 6
    assert value(meter, "rows_total", **where) == 4
    assert value(meter, "padding_rows_total", **where) == 4
    assert value(meter, "batch_fill_ratio_sum", **where) == 0.5
    assert value(meter, "queue_rows", **where) == 5
    assert value(meter, "requests_under_way") == 0
    assert value(meter, "price", **where) == pytest.approx(0.5 * 3.6 / 3600)
    dear = value(meter, "price_per_1000_predictions", **where)
    assert dear == pytest.approx(0.5 * 1e-3 / 4 * 1000)
    assert samples(meter)["process_resident_memory_bytes", ()] > 0
    assert value(meter, "device_info", device="cpu:0", kind="cpu") == 1
    assert not [name for name in names(meter) if name.endswith("_created")]


def test_energy_that_can_t_be_read_is_said_to_be_not_measured(meter):
    meter.model("digits").batch([1], size=1, seconds=0.1)
    reason = "no counters in a test"
    assert value(meter, "energy_measured", reason=reason) == 0
    assert "lepton_serve_joules" not in names(meter)


def test_a_model_that_is_gone_has_no_gauges_and_keeps_its_counters(meter):
    meter.model("digits").batch([1], size=1, seconds=0.1)
    assert "lepton_serve_price" in names(meter)
    meter.forget("digits", "1")
    assert "lepton_serve_price" not in names(meter)
    assert value(meter, "rows_total", model="digits", version="1") == 1


@given(st.none() | st.text())
def test_an_id_that_could_forge_a_line_of_the_log_is_replaced(text):
    made = identity(text)
    assert SAFE_ID.fullmatch(made)
    if text is not None and SAFE_ID.fullmatch(text):
        assert made == text


def test_the_time_between_marks_is_the_time_of_the_request(meter):
    now = [10.0]
    visit = meter.arrive("me")
    visit.clock = lambda: now[0]
    visit.began = visit._last = 10.0
    for stage, until in (("read", 11.0), ("compute", 15.0), ("read", 15.5)):
        now[0] = until
        visit.mark(stage)
    assert visit.stages == {"read": 1.5, "compute": 4.0}


def test_fault_of_a_status():
    kinds = {200: "", 302: "", 400: "client", 413: "client", 499: "gone"}
    kinds |= {500: "server", 501: "server", 503: "busy", 504: "late"}
    assert {status: kind_of_error(status) for status in kinds} == kinds


# ---- logs and traces ----


def logged(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_each_request_is_one_line_of_json_whatever_its_error_says():
    stream = io.StringIO()
    meter = Meter(price=Price(1.0), log=open_log(stream), energy=NOTHING)
    model = meter.model("digits")
    visit = meter.arrive("id-7", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    visit.names("digits", "1", rows=2)
    visit.mark("compute")
    (visit.charge,) = model.batch([2], size=2, seconds=0.25)
    meter.leave(visit, 500, error='two\nlines\r\n{"level": "info"}\u2028')
    meter.event("draining", waiting=3)
    meter.close()

    failed, draining = logged(stream)
    assert failed["level"] == "error" and failed["request"] == "id-7"
    assert failed["status"] == 500 and failed["rows"] == 2
    assert failed["price"] == 0.25 and failed["joules"] is None
    assert "two\nlines" in failed["error"] and failed["trace"].startswith("00-aaa")
    assert draining["event"] == "draining" and draining["waiting"] == 3


def test_requests_that_went_well_are_left_out_at_the_level_of_warnings():
    stream = io.StringIO()
    meter = Meter(log=open_log(stream, "warning"), energy=NOTHING)
    for status in (200, 404, 503):
        meter.leave(meter.arrive(), status)
    meter.close()
    assert [line["status"] for line in logged(stream)] == [404, 503]
    logging.getLogger("lepton.serve").handlers.clear()


def test_spans_of_a_request_lie_in_the_caller_s_trace():
    pytest.importorskip("opentelemetry.sdk", reason="needs the extra 'otel'")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        InMemorySpanExporter,
    )

    from lepton_jax.ship.watch import Traces

    kept = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    meter = Meter(traces=Traces(provider), energy=NOTHING)
    visit = meter.arrive("x", traceparent="00-" + "a" * 32 + "-" + "b" * 16 + "-01")
    visit.names("digits", "1")
    time.sleep(0.01)
    visit.mark("read")
    visit.mark("compute")
    meter.leave(visit, 200)
    for odd in ("", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"):
        meter.leave(meter.arrive(traceparent=odd), 500)

    spans = kept.get_finished_spans()
    read, compute, whole = spans[:3]
    assert [read.name, compute.name, whole.name] == ["read", "compute", "infer digits"]
    assert format(whole.context.trace_id, "032x") == "a" * 32
    assert format(whole.parent.span_id, "016x") == "b" * 16
    assert read.parent.span_id == whole.context.span_id
    assert whole.start_time <= read.start_time <= read.end_time <= whole.end_time
    assert read.end_time - read.start_time >= 10_000_000
    assert all(span.parent is None for span in spans[3:])


# ---- files for Prometheus and Grafana ----


def test_the_dashboard_is_the_one_that_its_tool_writes():
    assert (MONITORING / "grafana.json").read_text() == dashboard.text()


def test_alerts_and_dashboard_ask_for_metrics_that_there_are(meter):
    from tests.ship.test_drift_windows import shifted_model

    shifted_model(meter)
    model = meter.model("digits")
    visit = meter.arrive()
    visit.names("digits", "1")
    visit.mark("read")
    meter.leave(visit, 500)
    model.batch([1], size=2, seconds=0.1)
    known = names(meter) | {"lepton_serve_device_memory_bytes"}  # not on a CPU
    known |= {"lepton_serve_energy_joules_total"}  # not measured here
    rules = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0][
        "rules"
    ]
    asked = [rule["expr"] for rule in rules]
    asked += [
        query
        for row in dashboard.ROWS.values()
        for panel in row
        for _, query in panel.queries
    ]
    used = {name for text in asked for name in re.findall(r"lepton_serve_\w+", text)}
    assert used - known == set()

"""Write the Grafana dashboard of a server: docs/monitoring/grafana.json.

    python -m tools.dashboard

In Grafana: Dashboards, Import, upload the file, choose the Prometheus data source.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parents[1] / "docs" / "monitoring" / "grafana.json"
WIDTH = 24  # columns of Grafana's grid
HEIGHT = 8  # of a panel, in Grafana's rows
ACROSS = 3  # panels side by side
SCHEMA = 39  # of Grafana's JSON: that of Grafana 10, which later ones read

OF_MODEL = 'model=~"$model", instance=~"$instance"'
LATELY = "$__rate_interval"


@dataclass(frozen=True)
class Panel:
    """A picture of the dashboard.

    Attributes:
      title: above it.
      unit: Grafana's name of one.
      queries: (legend, PromQL).
      what: a sentence that explains it.
    """

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    what: str = ""


def _rate(name: str, more: str = "") -> str:
    return f"rate(lepton_serve_{name}{{{OF_MODEL}{more}}}[{LATELY}])"


def _by(labels: str, expression: str) -> str:
    return f"sum by ({labels}) ({expression})"


def _quantile(share: float, name: str, labels: str) -> str:
    buckets = _by(f"le, {labels}", _rate(f"{name}_bucket"))
    return f"histogram_quantile({share}, {buckets})"


def _gauge(name: str, more: str = "") -> str:
    return f"lepton_serve_{name}{{{OF_MODEL}{more}}}"


ROWS: dict[str, tuple[Panel, ...]] = {
    "Requests": (
        Panel(
            "Requests a second",
            "reqps",
            (("{{model}} {{status}}", _by("model, status", _rate("requests_total"))),),
        ),
        Panel(
            "Latency",
            "s",
            tuple(
                (
                    f"{{{{model}}}} p{share}",
                    _quantile(share / 100, "request_seconds", "model"),
                )
                for share in (50, 95, 99)
            ),
        ),
        Panel(
            "Errors a second",
            "reqps",
            (("{{model}} {{kind}}", _by("model, kind", _rate("errors_total"))),),
            "client: the client's fault; busy: refused, the queue was full; late: timed"
            " out; gone: the client went away; server: ours.",
        ),
        Panel(
            "Mean time by stage",
            "s",
            (
                (
                    "{{model}} {{stage}}",
                    _by("model, stage", _rate("stage_seconds_sum"))
                    + " / "
                    + _by("model, stage", _rate("stage_seconds_count")),
                ),
            ),
        ),
        Panel(
            "Queue",
            "short",
            (
                ("{{instance}} {{model}} waiting", _gauge("queue_rows")),
                ("{{instance}} {{model}} limit", _gauge("queue_limit_rows")),
            ),
            "Rows that wait for a batch, and how many may.",
        ),
        Panel(
            "Ready",
            "short",
            (("{{instance}}", 'lepton_serve_ready{instance=~"$instance"}'),),
        ),
    ),
    "Batches": (
        Panel(
            "Batch fill",
            "percentunit",
            (
                (
                    "{{model}}",
                    _by("model", _rate("batch_fill_ratio_sum"))
                    + " / "
                    + _by("model", _rate("batch_fill_ratio_count")),
                ),
            ),
            "Share of a batch that holds rows; the rest is padding.",
        ),
        Panel(
            "Rows a second",
            "short",
            (
                ("{{model}} rows", _by("model", _rate("rows_total"))),
                ("{{model}} padding", _by("model", _rate("padding_rows_total"))),
            ),
        ),
        Panel(
            "Time of computing",
            "percentunit",
            (
                (
                    "{{instance}} {{model}}",
                    _by("instance, model", _rate("busy_seconds_total")),
                ),
            ),
            "Seconds of computing in a second.",
        ),
    ),
    "Drift": (
        Panel(
            "Alarms",
            "short",
            (("{{model}} {{column}}: {{what}}", f"{_gauge('drift_alarm')} == 1"),),
            "What has moved further than it may, by rows enough to know it.",
        ),
        Panel(
            "Population stability index",
            "short",
            (("{{model}} {{column}}", _gauge("drift_psi")),),
            "Against the rows of training: 0.1 is small, 0.25 large.",
        ),
        Panel(
            "Missing and unseen",
            "percentunit",
            (
                ("{{model}} {{column}} missing", _gauge("drift_missing_ratio")),
                ("{{model}} {{column}} unseen", _gauge("drift_unseen_ratio")),
            ),
            "Share of missing cells, and of categories that training never saw.",
        ),
    ),
    "Machine and cost": (
        Panel(
            "Memory",
            "bytes",
            (
                (
                    "{{instance}} process",
                    'process_resident_memory_bytes{instance=~"$instance"}',
                ),
                (
                    "{{instance}} {{device}} {{what}}",
                    'lepton_serve_device_memory_bytes{instance=~"$instance"}',
                ),
            ),
        ),
        Panel(
            "Power",
            "watt",
            (
                (
                    "{{instance}} {{counter}}",
                    'rate(lepton_serve_energy_joules_total{instance=~"$instance"}'
                    f"[{LATELY}])",
                ),
            ),
            "Of the whole machine; empty where it has no counters that can be read.",
        ),
        Panel(
            "Price of 1,000 predictions",
            "short",
            (
                ("{{model}} computing", _gauge("price_per_1000_predictions")),
                ("{{model}} idle time too", _gauge("whole_price_per_1000_predictions")),
            ),
            "Padding is charged to the rows that were computed with it.",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana's plain data."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        place = {"x": 0, "y": y, "w": WIDTH, "h": 1}
        panels.append(
            {
                "type": "row",
                "title": title,
                "gridPos": place,
                "collapsed": False,
                "panels": [],
            }
        )
        y += 1
        for number, panel in enumerate(row):
            line, column = divmod(number, ACROSS)
            panels.append(_panel(panel, column, y + line * HEIGHT))
        y += HEIGHT * -(-len(row) // ACROSS)
    for number, made in enumerate(panels, 1):
        made["id"] = number
    return {
        "title": "Lepton: servers",
        "uid": "lepton-serve",
        "tags": ["lepton"],
        "schemaVersion": SCHEMA,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": _variables()},
        "panels": panels,
    }


def main() -> int:
    """Write the file; return 0."""
    FILE.write_text(text())
    print(FILE)
    return 0


def text() -> str:
    """Return the file's content."""
    return json.dumps(dashboard(), indent=1) + "\n"


# ---- internals ----


def _panel(panel: Panel, column: int, y: int) -> dict[str, Any]:
    width = WIDTH // ACROSS
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "gridPos": {"x": column * width, "y": y, "w": width, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}},
        "targets": [
            {"refId": chr(ord("A") + number), "legendFormat": legend, "expr": query}
            for number, (legend, query) in enumerate(panel.queries)
        ],
    }


def _variables() -> list[dict[str, Any]]:
    source = {
        "name": "source",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
    }
    return [source, _choice("instance", "ready"), _choice("model", "rows_total")]


def _choice(label: str, metric: str) -> dict[str, Any]:
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": {"type": "prometheus", "uid": "${source}"},
        "query": f"label_values(lepton_serve_{metric}, {label})",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "current": {"text": "All", "value": "$__all"},
    }


if __name__ == "__main__":
    sys.exit(main())

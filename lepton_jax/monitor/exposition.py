"""A run's status as metrics for Prometheus, in its text exposition format 0.0.4.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from lepton_jax.monitor.status import STATES

Status = Mapping[str, Any]  # as `Watch.status` gives it

# A value, and its labels.
Sample = tuple[Any, dict[str, Any]]

# The metrics that have one value: (name, kind, help, key of the status).
PLAIN = (
    (
        "step",
        "gauge",
        "Last step known to be done; a restart or a rollback takes it back.",
        "step",
    ),
    ("target_step", "gauge", "Step to reach.", "until"),
    (
        "checkpoint_step",
        "gauge",
        "Step of the last committed checkpoint.",
        "checkpoint",
    ),
    ("devices", "gauge", "Devices that the run trains on.", "devices"),
    (
        "steps_per_second",
        "gauge",
        "Over the last minute of training.",
        "steps_per_second",
    ),
    (
        "samples_per_second",
        "gauge",
        "Over the last minute of training.",
        "samples_per_second",
    ),
    (
        "data_wait_ratio",
        "gauge",
        "Share of the last minute of training in which host 0 waited for data.",
        "data_share",
    ),
    ("loss", "gauge", "Of the last step.", "loss"),
)
RESTARTS = (
    (
        "starts_total",
        "counter",
        "How often training began in this folder.",
        "starts",
    ),
    (
        "restarts_total",
        "counter",
        "How often it began again after a failure.",
        "restarts",
    ),
    (
        "restarts_left",
        "gauge",
        "Failures that are still survived.",
        "restarts_left",
    ),
    (
        "refused_connections_total",
        "counter",
        "Callers at the coordinator's port without proof of the run's token.",
        "refused_connections",
    ),
    (
        "rollbacks_total",
        "counter",
        "How often a policy went back to a checkpoint.",
        "rollbacks",
    ),
)

# The metrics of a host that have one value: (name, help, key of the host's row).
BY_HOST = (
    ("step", "Last step that was handed to the devices.", "step"),
    ("phase_seconds", "Time without any change.", "seconds_in_it"),
    (
        "phase_limit_seconds",
        "Time without any change after which the host counts as stuck.",
        "limit",
    ),
    ("silent_seconds", "Time since its worker's last line.", "seconds_silent"),
    (
        "data_wait_ratio",
        "Share of the last minute in which it waited for data.",
        "data_share",
    ),
    ("memory_bytes", "Of its process, resident.", "memory"),
    (
        "device_memory_bytes",
        "In use on that of its devices that has the most.",
        "device_memory",
    ),
)


def prometheus(status: Status) -> str:
    """Return a status as metrics.

    Args:
      status: as `Watch.status` gives it. Metrics that are not known are left out.
    """
    out = _Metrics()
    _add_run(out, status)
    _add_all(out, PLAIN, status)
    _add_training(out, status)
    _add_all(out, RESTARTS, status)
    _add_time(out, status)
    _add_hosts(out, status)
    return "\n".join(out.lines) + "\n"


class _Metrics:
    """Families of samples, as lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(
        self,
        name: str,
        kind: str,
        help: str,
        samples: Iterable[Sample],
    ) -> None:
        """Add a family.

        Samples without a value are left out, and the family with them if none is left.
        """
        lines = [
            f"lepton_{name}{_labels(labels)} {_value(value)}"
            for value, labels in samples
            if isinstance(value, int | float)
        ]
        if lines:
            self.lines.append(f"# HELP lepton_{name} {help}")
            self.lines.append(f"# TYPE lepton_{name} {kind}")
            self.lines += lines

    def add_one(
        self,
        name: str,
        kind: str,
        help: str,
        value: Any,
    ) -> None:
        """Add a family of one sample without labels."""
        self.add(
            name,
            kind,
            help,
            [(value, {})],
        )

    def add_labelled(
        self,
        name: str,
        help: str,
        label: str,
        values: Mapping[str, Any],
    ) -> None:
        """Add a gauge with a sample for each key, which becomes the label."""
        samples = [(value, {label: key}) for key, value in values.items()]
        self.add(name, "gauge", help, samples)


def _add_all(
    out: _Metrics,
    metrics: Iterable[tuple[str, str, str, str]],
    status: Status,
) -> None:
    for name, kind, help, key in metrics:
        out.add_one(name, kind, help, status[key])


def _add_run(out: _Metrics, status: Status) -> None:
    names = ("name", "folder", "version", "device_kind")
    labels = {name: status[name] for name in names}
    out.add(
        "run_info",
        "gauge",
        "Always 1; what the run is.",
        [(1, labels)],
    )
    out.add_labelled(
        "run_state",
        "1 for the state that the run is in.",
        "state",
        {state: int(status["state"] == state) for state in STATES},
    )


def _add_training(out: _Metrics, status: Status) -> None:
    out.add_labelled(
        "record",
        "What the last step recorded.",
        "name",
        status["record"],
    )
    evaluation = status["evaluation"] or {"step": None, "metrics": {}}
    out.add_labelled(
        "evaluation",
        "Of the last evaluation.",
        "metric",
        evaluation["metrics"],
    )
    out.add_one(
        "evaluation_step",
        "gauge",
        "Step of the last evaluation.",
        evaluation["step"],
    )


def _add_time(out: _Metrics, status: Status) -> None:
    seconds = status["seconds"]
    last_recovery = status["recoveries"][-1] if status["recoveries"] else {}
    out.add_one(
        "last_recovery_seconds",
        "gauge",
        "From noticing the last failure until all hosts had trained a step again.",
        last_recovery.get("seconds_to_stepped"),
    )
    out.add_one(
        "goodput_ratio",
        "gauge",
        "Time of the steps that count over the time since the first start.",
        status["goodput"],
    )
    out.add_labelled(
        "spent_seconds",
        "What the time since the first start went to; steps count, undone ones do not,"
        " and waiting for data is part of both.",
        "on",
        {name: spent for name, spent in seconds.items() if name != "wall"},
    )
    out.add_one("wall_seconds", "gauge", "Time since the first start.", seconds["wall"])
    cost = status["cost"] or {}
    out.add_one(
        "cost_dollars",
        "gauge",
        "Since the first start, at the list price of the plan's devices.",
        cost.get("so_far"),
    )
    out.add_one(
        "eta_seconds",
        "gauge",
        "Until the last step, as long as nothing fails.",
        status["eta"],
    )
    out.add_one(
        "event_age_seconds",
        "gauge",
        "Time since the run last wrote an event.",
        status["event_age"],
    )
    out.add_labelled(
        "planned_memory_bytes",
        "What the plan says that lies on each device.",
        "what",
        status["memory"]["planned"] or {},
    )
    out.add_one(
        "damaged_lines_total",
        "counter",
        "Lines of events.jsonl that can't be read.",
        status["damaged_lines"],
    )


def _add_hosts(out: _Metrics, status: Status) -> None:
    hosts = status["hosts"]
    out.add_labelled(
        "host_up",
        "1 where a worker runs.",
        "host",
        {host: int(row.get("state") == "running") for host, row in hosts.items()},
    )
    out.add(
        "host_phase",
        "gauge",
        "Always 1; the phase that the host is in.",
        [
            (1, {"host": host, "phase": row["phase"]})
            for host, row in hosts.items()
            if "phase" in row
        ],
    )
    for name, help, key in BY_HOST:
        values = {host: row.get(key) for host, row in hosts.items()}
        out.add_labelled(f"host_{name}", help, "host", values)

    out.add(
        "host_spent_seconds",
        "gauge",
        "Time in a phase since its process began.",
        [
            (spent, {"host": host, "phase": name})
            for host, row in hosts.items()
            for name, spent in (row.get("seconds") or {}).items()
        ],
    )
    slowest = str((status["slowest"] or {}).get("host"))
    out.add_labelled(
        "host_slowest",
        "1 for the host that the others wait for.",
        "host",
        {host: int(host == slowest) for host in hosts},
    )


def _labels(labels: Mapping[str, Any]) -> str:
    pairs = [
        f'{name}="{_escaped(value)}"'
        for name, value in labels.items()
        if value is not None
    ]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _escaped(value: Any) -> str:
    text = str(value).replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return text.encode("utf-8", "replace").decode()


def _value(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value) if isinstance(value, float) else str(int(value))

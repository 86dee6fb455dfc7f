"""Gauges that are worked out when somebody asks for the metrics.

Each is a family of `prometheus_client`, made anew: what a model that was unloaded once
had does not stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from lepton_jax.monitor.energy import EnergyMeter
from lepton_jax.ship.watch.families import MODEL, PREFIX, core

if TYPE_CHECKING:
    from lepton_jax.ship.watch.tallies import Tallies
    from lepton_jax.ship.watch.window import Moved

Model = tuple[str, str]

# Columns of one model with gauges of their own, for each is a series that Prometheus
# stores; of more, those that moved most. Assumption.
MOST_COLUMNS = 200

THOUSAND = 1_000
COLUMN = (*MODEL, "column")

# The figures of a device's memory that are worth a gauge, by JAX's names of them.
MEMORY = {
    "bytes_in_use": "in_use",
    "peak_bytes_in_use": "peak",
    "bytes_limit": "limit",
}


def gauge(
    name: str,
    help: str,
    labels: Iterable[str],
    samples: Iterable[tuple[Iterable[Any], float]],
) -> Any:
    """Return a family of gauges.

    Args:
      name: without the prefix.
      help: what it means.
      labels: their names.
      samples: (values of the labels, value).
    """
    family = core().GaugeMetricFamily(
        PREFIX + name,
        help,
        labels=tuple(labels),
    )
    for values, value in samples:
        family.add_metric([str(each) for each in values], value)
    return family


class Drifts:
    """Gauges of drift.

    Args:
      tallies: returns those of the models that are served now.
    """

    def __init__(self, tallies: Callable[[], Mapping[Model, Tallies]]) -> None:
        self._tallies = tallies

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        of_models = self._tallies()
        moved = {model: one.moved() for model, one in of_models.items()}
        yield gauge(
            "drift_window_rows",
            "Rows in the window that drift is told of.",
            MODEL,
            [(model, one.counted) for model, one in of_models.items()],
        )
        yield gauge(
            "drift_skipped_rows",
            "Rows that were not counted for drift, since the server started.",
            MODEL,
            [(model, one.skipped) for model, one in of_models.items()],
        )
        yield gauge(
            "drift_alarms",
            "Alarms of all columns: what moved further than it may.",
            MODEL,
            [
                (model, sum(sum(one.alarms.values()) for one in columns))
                for model, columns in moved.items()
            ],
        )
        yield from _of_columns(moved)


def _of_columns(moved: Mapping[Model, list[Moved]]) -> Iterator[Any]:
    """Yield the families with a gauge for each column."""
    shown = [
        ((*model, one.column), one)
        for model, columns in moved.items()
        for one in columns[:MOST_COLUMNS]
    ]
    yield gauge(
        "drift_psi",
        "Population stability index of a column against training's rows.",
        COLUMN,
        [(where, one.psi) for where, one in shown],
    )
    yield gauge(
        "drift_psi_noise",
        "The index that so many rows have without any drift.",
        COLUMN,
        [(where, one.noise) for where, one in shown],
    )
    yield gauge(
        "drift_missing_ratio",
        "Share of missing cells in the window.",
        COLUMN,
        [(where, one.missing[1]) for where, one in shown],
    )
    yield gauge(
        "drift_missing_training_ratio",
        "Share of missing cells in training.",
        COLUMN,
        [(where, one.missing[0]) for where, one in shown],
    )
    yield gauge(
        "drift_unseen_ratio",
        "Share of rows with a category that training never saw.",
        COLUMN,
        [(where, one.unseen) for where, one in shown if one.unseen is not None],
    )
    yield gauge(
        "drift_alarm",
        "1 where a column moved further than it may, by rows enough to know it.",
        (*COLUMN, "what"),
        [
            ((*where, what), int(is_on))
            for where, one in shown
            for what, is_on in one.alarms.items()
        ],
    )


class Costs:
    """Gauges of energy and money.

    Args:
      energy: of the machine.
      costs: returns what the models that are served now have cost.
    """

    def __init__(
        self,
        energy: EnergyMeter,
        costs: Callable[[], Mapping[Model, Mapping[str, float]]],
    ) -> None:
        self._energy = energy
        self._costs = costs

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        found = self._energy.found
        joules = self._energy.read()
        yield gauge(
            "energy_measured",
            "1 where the machine has energy counters that can be read.",
            ("reason",),
            [(("" if found.measured else "; ".join(found.reasons),), found.measured)],
        )
        family = core().CounterMetricFamily(
            f"{PREFIX}energy_joules",
            "Energy of the whole machine since the server started.",
            labels=("counter",),
        )
        for name, value in joules.items():
            family.add_metric([name], value)
        yield family

        costs = self._costs()
        names = dict.fromkeys(name for each in costs.values() for name in each)
        for name in names:
            yield gauge(
                name,
                HELP[name],
                MODEL,
                [(model, each[name]) for model, each in costs.items() if name in each],
            )


HELP = {
    "joules": "Energy charged to the model's batches, padding included.",
    "padding_joules": "The part of it that went to empty rows.",
    "joules_per_1000_predictions": "Energy charged for 1,000 rows.",
    "price": "Price charged to the model's batches, padding included.",
    "padding_price": "The part of it that went to empty rows.",
    "price_per_1000_predictions": "Price charged for 1,000 rows, of computing alone.",
    "whole_price_per_1000_predictions": (
        "Price of 1,000 rows when the machine's idle time is paid for as well, and"
        " shared out to the models by their time of computing."
    ),
}


class Devices:
    """Gauges of the devices: which there are, and their memory where JAX tells it."""

    def collect(self) -> Iterator[Any]:
        """Yield the families."""
        devices = {
            f"{device.platform}:{device.id}": device for device in jax.local_devices()
        }
        yield gauge(
            "device_info",
            "Always 1; the devices that the server computes on.",
            ("device", "kind"),
            [((name, device.device_kind), 1) for name, device in devices.items()],
        )
        samples = []
        for place, device in devices.items():
            figures = device.memory_stats() or {}
            samples += [
                ((place, name), figures[key])
                for key, name in MEMORY.items()
                if key in figures
            ]
        yield gauge(
            "device_memory_bytes",
            "Memory of a device: in use, at its peak, and all of it.",
            ("device", "what"),
            samples,
        )

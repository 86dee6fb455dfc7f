"""The events of a run, their display, and the page that it leaves behind.

Nothing here imports JAX.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lepton_jax.monitor.events import Lines, Monitor, Sink, encode, plain, read_events
from lepton_jax.monitor.exposition import prometheus
from lepton_jax.monitor.progress import Progress
from lepton_jax.monitor.samples import SampleTrace, read_samples
from lepton_jax.monitor.sinks import TensorBoard
from lepton_jax.monitor.status import Watch

__all__ = [
    "Lines",
    "Monitor",
    "Progress",
    "SampleTrace",
    "Sink",
    "TensorBoard",
    "Watch",
    "encode",
    "plain",
    "prometheus",
    "read_events",
    "read_samples",
    "write_data_report",
    "write_folds_report",
    "write_report",
]


def write_report(folder: Path) -> Path:
    """Write `folder/report.html` and return its path.

    See `lepton_jax.monitor.report.write_report`.
    """
    # Imported on demand: `python -m lepton_jax.monitor.report` must not find that
    # module imported already.
    from lepton_jax.monitor import report

    return report.write_report(folder)


def write_folds_report(folder: Path) -> Path:
    """Write the page of a cross validation and return its path.

    See `lepton_jax.monitor.folds_page.write_folds_report`.
    """
    from lepton_jax.monitor import folds_page

    return folds_page.write_folds_report(folder)


def write_data_report(path: Path, facts: Mapping[str, Any]) -> Path:
    """Write the page of a preparation and return its path.

    See `lepton_jax.monitor.data_page.write`.
    """
    from lepton_jax.monitor import data_page

    return data_page.write(path, facts)

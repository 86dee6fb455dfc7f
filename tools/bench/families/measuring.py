"""Plan one program, compile it whole, and set the two accounts side by side."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jaxlib

import lepton_jax as lepton
from lepton_jax.errors import PlanError
from lepton_jax.planner import ahead
from lepton_jax.train.program import Program
from tools.bench.families.programs import Drawn, draw


class Cache:
    """XLA's figures of whole programs, by digest; a line of JSON each.

    Args:
      file: where they are kept; None: nowhere.
    """

    def __init__(self, file: Path | None):
        self.file = file
        self.known: dict[str, dict[str, Any]] = {}
        if file is None or not file.exists():
            return
        for line in file.read_text().splitlines():
            entry = json.loads(line)
            self.known[entry.pop("digest")] = entry

    def add(self, digest: str, figures: Mapping[str, Any]) -> None:
        """Keep the figures of a program."""
        self.known[digest] = dict(figures)
        if self.file is not None:
            with self.file.open("a") as lines:
                lines.write(json.dumps({"digest": digest, **figures}) + "\n")


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes of a device.

    Attributes:
      peak: the likeliest peak.
      bound: what at least 97 % of peaks are below; None: the plan has no such figure.
      seconds: how long it took beyond planning.
      whole: whether XLA compiled the whole program for it.
    """

    peak: float
    bound: float | None
    seconds: float = 0.0
    whole: bool = False


def measure_cached(
    family: str,
    number: int,
    probe: bool,
    file: Path | None,
) -> dict[str, Any]:
    """Plan and compile a program, or look it up in a file."""
    if _Opened.cache is None or _Opened.cache.file != file:
        _Opened.cache = Cache(file)
    return measure(family, number, probe, _Opened.cache)


def measure(
    family: str,
    number: int,
    probe: bool,
    cache: Cache,
) -> dict[str, Any]:
    """Plan and compile a program.

    Returns:
      A row for `figures.summary`. "outcome" is "compared", "refused" (XLA finds that
      the program is too large for the device) or "no plan".
    """
    drawn = draw(family, number)
    case = drawn.case
    where = lepton.topology(drawn.topology)
    row: dict[str, Any] = {
        "family": family,
        "number": number,
        "topology": drawn.topology,
        "batch_size": case.batch_size,
    }
    traced = lepton.trace(case.recipe(), case.inputs, case.targets)
    began = time.process_time()
    try:
        plan = lepton.plan(traced, where, **case.fixed)
    except PlanError as error:
        return row | {"outcome": "no plan", "why": str(error)}

    row["planned"] = time.process_time() - began
    row["plan"] = plan.name
    row["mesh"] = dict(plan.mesh)
    row["batch_axes"] = list(plan.batch_axes)
    row["remat"] = plan.remat
    row["micro_batches"] = plan.micro_batches
    row["memory"] = plan.memory
    predicted = _probed(traced, plan) if probe else _predicted(plan)
    row |= vars(predicted)
    row["kinds"] = dict(plan.bytes_per_device)
    row |= compiled(drawn, traced, plan, cache)
    return row | _verdict(row)


def compiled(
    drawn: Drawn,
    traced: lepton.Trace,
    plan: lepton.Plan,
    cache: Cache,
) -> dict[str, Any]:
    """Return XLA's figures of a plan's train step, out of the cache if they are there.

    Returns:
      "xla": bytes at the peak; None: XLA refuses the program without a figure.
      "refused": whether it refuses; "compiling": the seconds of compiling.
    """
    where = lepton.topology(drawn.topology)
    devices = ahead.devices_for(where)
    mesh = ahead.mesh_devices(where, plan.mesh, devices)
    lowered = Program(traced, plan, mesh).lower()
    digest = _digest(lowered, drawn.topology, plan)
    if digest in cache.known:
        return cache.known[digest]

    began = time.process_time()
    try:
        _, memory = ahead.compile_for(lowered)
    except ahead.TooLarge as error:
        figures = {"xla": error.needed, "refused": True}
    else:
        figures = {"xla": memory.peak, "refused": False}
    figures["compiling"] = time.process_time() - began
    cache.add(digest, figures)
    return figures


# ---- internals ----


class _Opened:
    """The cache that this process has read."""

    cache: Cache | None = None


def _predicted(plan: Any) -> Prediction:
    """Read a plan's peak, and its bound if it has one."""
    return Prediction(plan.peak, getattr(plan, "peak_bound", None))


def _probed(traced: Any, plan: Any) -> Prediction:
    """Probe a plan, without what earlier probes kept."""
    from lepton_jax.planner import probe  # type: ignore[attr-defined]

    found = probe.probe(traced, plan, cache=None)
    return Prediction(found.peak, found.bound, found.seconds, found.whole)


def _verdict(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether the program fits, and how far off the prediction is.

    A CPU has no limit of its own: there a program fits that needs no more than the
    topology's share of the machine.
    """
    real = row["xla"]
    memory = row["memory"]
    fits = not row["refused"] and real <= memory
    verdict: dict[str, Any] = {
        "outcome": "refused" if row["refused"] else "compared",
        "fits": fits,
        "said": (row["bound"] or row["peak"]) <= memory,
    }
    if real is not None:
        verdict["error"] = row["peak"] / real - 1
    if row["bound"] is not None:
        verdict["within"] = real is not None and real <= row["bound"]
    return verdict


def _digest(
    lowered: Any,
    topology: str,
    plan: Any,
) -> str:
    """Return what decides XLA's figures, as one short text."""
    versions = f"{jax.__version__} {jaxlib.__version__} {_libtpu()}"
    parts = (
        topology,
        str(dict(plan.mesh)),
        versions,
        lowered.as_text(),
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _libtpu() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("libtpu")
    except PackageNotFoundError:
        return "none"

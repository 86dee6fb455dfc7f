"""Plan one program, compile it whole, and set the two accounts side by side."""

from __future__ import annotations

import hashlib
import json
import math
import os
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

    def add(
        self,
        digest: str,
        figures: Mapping[str, Any],
    ) -> None:
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
      bound: what at least 97 % of peaks are below; None: there is no such figure.
      said: whether the plan is said to fit.
      seconds: of computing, beyond planning.
      whole: whether XLA compiled the whole program for it.
    """

    peak: float
    bound: float | None
    said: bool
    seconds: float = 0.0
    whole: bool = False


def computing() -> float:
    """Return the seconds of computing of this process and of those that it waited for.

    On a machine with other work to do they vary less than the clock's.
    """
    times = os.times()
    return sum(times[:4])


@dataclass(frozen=True)
class Settings:
    """Choices of a measurement.

    Attributes:
      probe: whether the planner's probe predicts, rather than the plan.
      early: whether XLA is stopped once it has placed its arrays; else it compiles to
        the end, which takes ten times as long.
      file: where XLA's figures are kept; None: nowhere.
      limit: seconds after which XLA is stopped before the end; None: never.
    """

    probe: bool = False
    early: bool = False
    file: Path | None = None
    limit: float | None = None


def measure_cached(
    family: str,
    number: int,
    settings: Settings,
) -> dict[str, Any]:
    """Plan and compile a program, or look it up in the settings' file."""
    opened = _Opened.cache
    if opened is None or opened.file != settings.file:
        opened = Cache(settings.file)
        _Opened.cache = opened
    return measure(
        family,
        number,
        settings,
        opened,
    )


def measure(
    family: str,
    number: int,
    settings: Settings,
    cache: Cache,
) -> dict[str, Any]:
    """Plan and compile a program.

    Returns:
      A row for `figures.summary`. "outcome" is "compared", "refused" (XLA finds that
      the program is too large for the device), "late" (XLA took too long) or "no plan".
      If the probe predicts, "by plan" has what differs in the plan's own prediction.
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
    traced = lepton.trace(
        case.recipe(),
        case.inputs,
        case.targets,
    )
    began = computing()
    try:
        plan = lepton.plan(traced, where, **case.fixed)
    except PlanError as error:
        return row | {"outcome": "no plan", "why": str(error)}

    row["planned"] = computing() - began
    row["plan"] = plan.name
    row["mesh"] = dict(plan.mesh)
    row["batch_axes"] = list(plan.batch_axes)
    row["remat"] = plan.remat
    row["micro_batches"] = plan.micro_batches
    row["attention"] = plan.attention
    row["memory"] = plan.memory
    row["kinds"] = dict(plan.bytes_per_device)
    row |= account(
        drawn,
        traced,
        plan,
        settings,
        cache,
    )
    if row.get("late"):
        return row | {"outcome": "late", "why": f"not compiled in {row['late']:g} s"}

    by_plan = vars(_predicted(plan))
    if not settings.probe:
        return row | by_plan | _verdict(row | by_plan)
    by_probe = vars(_probed(traced, plan, cache))
    return row | {
        **by_probe,
        **_verdict(row | by_probe),
        "by plan": by_plan | _verdict(row | by_plan),
    }


def account(
    drawn: Drawn,
    traced: lepton.Trace,
    plan: lepton.Plan,
    settings: Settings,
    cache: Cache,
) -> dict[str, Any]:
    """Return XLA's figures of a plan's train step, out of the cache if they are there.

    Figures of programs that were compiled to the end also do where early ones would.

    Returns:
      "xla": bytes at the peak; None: XLA refuses the program without a figure.
      "refused": whether it refuses; "compiling": the seconds of compiling; "late": the
      limit in seconds, if they were more.
    """
    where = lepton.topology(drawn.topology)
    devices = ahead.devices_for(where)
    mesh = ahead.mesh_devices(where, plan.mesh, devices)
    lowered = Program(traced, plan, mesh).lower()
    digest = _digest(lowered, drawn.topology, plan)
    keys = [digest, f"early {digest}"] if settings.early else [digest]
    for key in keys:
        known = cache.known.get(key)
        if known is not None and _is_last_word(known, settings.limit):
            return known

    began = computing()
    figures: dict[str, Any]
    try:
        peak = _peak(lowered, mesh, settings)
    except ahead.TooLarge as error:
        figures = {"xla": error.needed, "refused": True}
    except TimeoutError:
        figures = {"xla": None, "refused": False, "late": settings.limit}
    else:
        figures = {"xla": peak, "refused": False}
    figures["compiling"] = computing() - began
    cache.add(keys[-1], figures)
    return figures


# ---- internals ----


class _Opened:
    """The cache that this process has read."""

    cache: Cache | None = None


def _is_last_word(known: Mapping[str, Any], limit: float | None) -> bool:
    """Whether another try with a limit would say no more than a known entry."""
    if not known.get("late"):
        return True
    return limit is not None and limit <= known["late"]


def _peak(
    lowered: Any,
    mesh: Any,
    settings: Settings,
) -> int:
    """Compile a program; return the bytes that it holds at the most.

    Raises:
      TooLarge: it does not fit the device's memory.
      TimeoutError: it takes longer than the limit.
    """
    # commits before the probe have no such module
    if settings.early:
        from lepton_jax.planner.probe import early

        return early.memory(lowered, list(mesh.flat)).peak
    if settings.limit is not None:
        from lepton_jax.planner.probe import early

        return early.finished(lowered, list(mesh.flat), settings.limit).peak
    return ahead.compile_for(lowered)[1].peak


def _predicted(plan: Any) -> Prediction:
    """Read what a plan says of its memory."""
    # Plans of earlier commits have neither a bound nor a word on whether they fit.
    fits = getattr(plan, "fits", "yes")
    return Prediction(
        peak=plan.peak,
        bound=getattr(plan, "peak_bound", 0) or None,
        said=fits == "yes",
    )


def _probed(
    traced: lepton.Trace,
    plan: lepton.Plan,
    cache: Cache,
) -> Prediction:
    """Probe a plan; its folder of figures lies next to the cache."""
    from lepton_jax.verify.probing import probe

    folder = None
    if cache.file is not None:
        folder = cache.file.with_suffix(".probes")
    began = computing()
    found = probe(traced, plan, cache=folder)
    return Prediction(
        peak=found.peak or math.inf,
        bound=found.bound,
        said=found.fits and found.bound <= plan.memory,
        seconds=computing() - began,
        whole=found.whole,
    )


def _verdict(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return whether the program fits, and how far off the prediction is.

    A CPU has no limit of its own: there a program fits that needs no more than the
    topology's share of the machine.
    """
    real = row["xla"]
    verdict: dict[str, Any] = {
        "outcome": "refused" if row["refused"] else "compared",
        "fits": not row["refused"] and real <= row["memory"],
    }
    if real is not None and math.isfinite(row["peak"]):
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
        "XLA's own peak",  # older files hold sums of its parts
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

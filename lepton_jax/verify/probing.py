"""The probe of a plan, on the devices of its topology."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology, topology
from lepton_jax.planner import Plan, Trace, ahead
from lepton_jax.planner import probe as probes
from lepton_jax.planner.probe import Probe, users_folder
from lepton_jax.train.program import Program

__all__ = ["Probe", "corrected", "devices_of", "probe", "users_folder"]

# Kinds of a plan's bytes that XLA has no say in.
GIVEN = ("params", "optimizer", "variables", "batch", "data")


def probe(
    trace: Trace,
    plan: Plan,
    on: Topology | Sequence[Any] | np.ndarray | None = None,
    *,
    cache: Path | None = None,
    whole: bool = False,
) -> Probe:
    """Let XLA say what memory a planned step takes; one step a call.

    On TPUs, which need not be there, and on CPUs another process compiles the step, and
    is stopped once XLA has placed its arrays. Elsewhere the step is compiled whole.

    Args:
      trace: of the recipe.
      plan: for it.
      on: the topology, or live devices in the mesh's order; None: the topology of the
        plan's name.
      cache: a folder of accounts that are known already, e.g. `users_folder()`; None:
        none is kept.
      whole: whether to compile the step to its end in any case.

    Raises:
      PlanError: there is no batch, or no compiler for such devices.
    """
    if trace.jaxpr is None:
        raise PlanError(
            "there is no batch to compile a train step for",
            where="probe",
            remedy="give the recipe its data",
        )
    devices = devices_of(plan, on)

    def lower(trace: Trace, plan: Plan) -> jax.stages.Lowered:
        return Program(trace, replace(plan, steps_per_call=1), devices).lower()

    return probes.probe(trace, plan, lower, devices, cache=cache, whole=whole)


def devices_of(
    plan: Plan,
    on: Topology | Sequence[Any] | np.ndarray | None,
) -> Any:
    """Return the devices to compile for: those given, or those of a topology."""
    if on is not None and not isinstance(on, Topology):
        return on
    where = on or topology(plan.topology)
    available = ahead.devices_for(where)
    return ahead.mesh_devices(where, plan.mesh, available)


def corrected(plan: Plan, found: Probe) -> Plan:
    """Return a plan whose peak is the one that XLA gives.

    The state and the batch stay as they are; what the step needs in addition grows or
    shrinks.
    """
    if found.peak is None:
        return plan
    held = plan.bytes_per_device
    given = sum(held.get(kind, 0) for kind in GIVEN)
    factor = max(0.0, found.peak - given) / max(1, plan.peak - given)
    figures = {
        kind: size if kind in GIVEN else round(size * factor)
        for kind, size in held.items()
    }
    return replace(plan, bytes_per_device=figures)

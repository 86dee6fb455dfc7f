"""A plan against XLA: the train step compiled ahead of time, next to the prediction.

`verify` compiles one plan and compares memory, FLOPs and collectives. `prove` probes
the best candidates, or compiles them, and takes the first that fits by XLA's account.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology, join, lay, topology
from lepton_jax.hardware.links import COLLECTIVES
from lepton_jax.planner import Plan, Trace, ahead, candidates
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.probe import early
from lepton_jax.planner.program.kernels import KERNELS, attention_flops
from lepton_jax.planner.program.ruled import hidden_flops
from lepton_jax.planner.program.staged import of_one_stage
from lepton_jax.planner.rewrite.own import OWN, OWN_OPERATIONS
from lepton_jax.planner.rewrite.staged_attention import STAGED_KERNELS
from lepton_jax.planner.show.text import meshed
from lepton_jax.planner.show.words import si
from lepton_jax.train.program import Program
from lepton_jax.verify import hlo
from lepton_jax.verify.expected import expected
from lepton_jax.verify.matching import Seconds, compare
from lepton_jax.verify.probing import Probe, corrected, devices_of, probe
from lepton_jax.verify.report import Verification

Check = Verification | Probe


def verify(
    trace: Trace,
    plan: Plan,
    on: Topology | Sequence[Any] | np.ndarray | None = None,
    *,
    whole: bool = False,
) -> Verification:
    """Compile the train step of a plan for its topology and compare; one step a call.

    The topology need not be there: then XLA is stopped once it has optimized the step
    and placed its arrays, and no code is made of it.

    Args:
      trace: the trace of the recipe.
      plan: the plan to compile.
      on: the topology, or live devices in the mesh's order; None: the topology of the
        plan's name.
      whole: whether to compile the step to its end in any case.

    Raises:
      PlanError: it can't be compiled for here, because libtpu, the GPU or enough
        virtual CPU devices are missing.
    """
    if trace.jaxpr is None:
        raise PlanError(
            "there is no batch to compile a train step for",
            where="verify",
            remedy="give the recipe its data",
        )
    devices = devices_of(plan, on)
    start = time.perf_counter()
    try:
        program = Program(trace, replace(plan, steps_per_call=1), devices)
        text, memory = _compiled(program.lower(), devices, whole)
    except ahead.TooLarge as error:
        seconds = time.perf_counter() - start
        return Verification(
            plan=plan,
            memory=None,
            memory_error=error,
            flops=0.0,
            rows=(),
            unexpected=(),
            seconds=seconds,
        )
    seconds = time.perf_counter() - start

    flat = devices.flat if hasattr(devices, "flat") else devices
    platform = next(iter(flat)).platform
    module = hlo.read(text)
    moves = expected(trace, plan, platform)
    kernels = _kernel_flops(trace, plan, platform)
    rows, unexpected, absent = compare(
        moves,
        module.collectives,
        plan.mesh,
        _collective_seconds(plan, on),
    )
    return Verification(
        plan=plan,
        memory=memory,
        memory_error=None,
        flops=module.dot_flops + kernels,
        rows=rows,
        unexpected=unexpected,
        seconds=seconds,
        notes=(*_notes(module, platform, trace), *_kernel_notes(kernels)),
        absent=absent,
    )


def _kernel_flops(trace: Trace, plan: Plan, platform: str) -> float:
    """Return the FLOP of a device's kernels, of which XLA's text does not tell."""
    is_splash = plan.attention.startswith("splash")
    if not is_splash and OWN not in trace.operations:
        return 0.0
    graph = replace(trace, forms=plan.forms).gradient(plan.remat)
    whole = 0.0
    for op in graph.operations():
        if is_splash and op.name in (*KERNELS, *STAGED_KERNELS):
            whole += op.times * attention_flops(of_one_stage(op))
        elif op.name in OWN_OPERATIONS:
            whole += op.times * hidden_flops(op.eqn, platform)
    return whole / math.prod(plan.mesh.values())


def _kernel_notes(flops: float) -> Iterator[str]:
    if flops:
        yield f"{si(flops)}FLOP of these are kernels' by the planner's own count"


def _compiled(
    lowered: Any,
    devices: Any,
    whole: bool,
) -> tuple[str, ahead.Memory]:
    """Return a compiled program as text, and XLA's account of its memory."""
    devices = list(getattr(devices, "flat", devices))
    if not whole and ahead.description(devices) is not None:
        placed = early.placed(lowered, devices)
        return placed.text, placed.memory
    compiled, memory = ahead.compile_for(lowered)
    return compiled.as_text() or "", memory


def _collective_seconds(
    plan: Plan,
    on: Any,
) -> Seconds | None:
    """Return what gives the seconds of a collective; None for an unknown topology."""
    try:
        where = on if isinstance(on, Topology) else topology(plan.topology)
        links = lay(plan.mesh, where)
    except PlanError:
        return None

    def seconds(kind: str, axes: tuple[str, ...], buffer: float) -> float:
        link = join([links[axis] for axis in axes])
        known = kind if kind in COLLECTIVES else "all-to-all"
        return link.seconds(known, buffer)

    return seconds


def prove(
    trace: Trace,
    where: Topology,
    count: int,
    *,
    whole: bool = False,
    cache: Path | None = None,
    **options: Any,
) -> tuple[Plan, Sequence[Check]]:
    """Return the best plan that fits by XLA's own account of memory.

    Args:
      trace: the trace of the recipe.
      where: the topology to plan for.
      count: how many of the best candidates to try.
      whole: whether to compile and verify them, instead of a probe of their memory.
      cache: a folder of what earlier probes found; None: nothing is kept.
      **options: options of `planner.plan`.

    Returns:
      The plan with XLA's figure of its memory, and the check of each candidate, best
      first.

    Raises:
      PlanError: none fits.
    """
    devices = ahead.devices_for(where)
    checks: list[Check] = []
    for plan in candidates(trace, where, count, **options):
        laid = ahead.mesh_devices(where, plan.mesh, devices)
        if whole:
            checks.append(verify(trace, plan, laid, whole=True))
        else:
            checks.append(probe(trace, plan, laid, cache=cache))

    fitting = [check for check in checks if check.fits]
    if options.get("objective") == "memory":
        fitting.sort(key=lambda check: check.peak or 0)
    if not fitting:
        raise _nothing_fits(checks, where, count)

    chosen = fitting[0]
    plan = _with_verdicts(chosen, checks)
    checks = [
        replace(check, plan=plan) if check is chosen else check for check in checks
    ]
    return plan, checks


def _with_verdicts(chosen: Check, checks: Sequence[Check]) -> Plan:
    """Return the plan that was chosen, with what XLA says of it and of the others."""
    notes = [
        *chosen.plan.notes,
        f"proven: XLA's peak is {size(chosen.peak or 0)} of {size(chosen.plan.memory)}",
        *(f"passed over: {_needs(check)}" for check in checks if not check.fits),
    ]
    plan = replace(chosen.plan, notes=tuple(notes))
    return corrected(plan, chosen) if isinstance(chosen, Probe) else plan


def _nothing_fits(
    checks: Sequence[Check],
    where: Topology,
    count: int,
) -> PlanError:
    best = min(checks, key=lambda check: check.peak or float("inf"))
    return PlanError(
        f"none of the {len(checks)} best plans fits by XLA's account: {_needs(best)}",
        where=f"proof for {where.name}",
        remedy=(
            f"prove more candidates than {count}, lower batch_size, raise"
            " micro_batches, set remat to full, or take more devices"
        ),
    )


def _needs(check: Check) -> str:
    needed = "more" if check.peak is None else size(check.peak)
    plan = check.plan
    return (
        f"{plan.name} (mesh {meshed(plan)}, remat {plan.remat}) needs {needed} of"
        f" {size(plan.memory)}"
    )


def _notes(
    module: hlo.Compiled,
    platform: str,
    trace: Trace,
) -> Iterable[str]:
    """Yield the limits of the figures that were read from a module."""
    if module.unknown_loops:
        yield (
            f"{len(module.unknown_loops)} loops count as one turn each, since XLA"
            " doesn't tell how many they have"
        )
    if module.rematerialized:
        yield f"XLA computes {module.rematerialized} instructions again to save memory"
    kernels = [
        f"{calls} x {name}"
        for name, calls in module.custom_calls.items()
        if "matmul" in name.lower() or "attention" in name.lower()
    ]
    if kernels:
        yield f"the FLOP of {', '.join(kernels)} are not counted"
    if platform == "cpu" and trace.recipe.precision != "float32":
        yield (
            "XLA for CPU sends 16-bit numbers as float32, and so are the planned bytes"
            " above"
        )

"""`plan`: the arrow from a trace to a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware import Topology
from lepton_jax.planner import pins as pinning
from lepton_jax.planner.assemble import axis_names, strategy
from lepton_jax.planner.build import build, without_data
from lepton_jax.planner.named import Names
from lepton_jax.planner.pins import Pins
from lepton_jax.planner.plan import Plan, Rival, check_effects
from lepton_jax.planner.schedule import size
from lepton_jax.planner.search import OBJECTIVES, Candidate, Problem, search
from lepton_jax.planner.trace import Trace
from lepton_jax.planner.trace import trace as traced

RIVALS = 5
DOUBLINGS = 8  # of a topology that is too small, tried for a remedy
HALVINGS = 3  # of a batch that is too large


def plan(trace: Trace, topology: Topology, *, objective: str = "time", mesh: Mapping[str, int] | None = None,
         pins: Mapping[str, Any] | None = None, remat: str | None = None, micro_batches: int | None = None) -> Plan:
    """Search for the best way to lay a traced recipe out on a topology. No array is allocated.

    Args:
      objective: "time" of a step, "memory" of a device, or "cost" of a step in money, for which `topology` is what it is:
        over several topologies see `frontier`.
      mesh: mesh axis name to size, outermost first; None: the search decides.
      pins: pattern of parameter paths ("**/embedding") to the PartitionSpec with which they are kept, over axes of `mesh`.
      remat: "none", "dots" or "full"; None: the mildest that fits.
      micro_batches: None: the recipe's, or the fewest that fit.

    Raises:
      PlanError: nothing fits (the message says what fills the memory and what would fit), or a pin is impossible.
    """
    return candidates(trace, topology, 1, objective=objective, mesh=mesh, pins=pins, remat=remat,
                      micro_batches=micro_batches)[0]


def candidates(trace: Trace, topology: Topology, count: int, *, objective: str = "time",
               mesh: Mapping[str, int] | None = None, pins: Mapping[str, Any] | None = None, remat: str | None = None,
               micro_batches: int | None = None) -> list[Plan]:
    """The `count` best plans, best first; the arguments are those of `plan`."""
    if objective not in OBJECTIVES:
        raise PlanError(f"objective {objective!r} is not known{nearest(str(objective), OBJECTIVES)}", where="plan",
                        remedy=f"use one of {', '.join(OBJECTIVES)}")
    if objective == "cost" and topology.price_per_hour is None:
        raise PlanError(f"the price of {topology.chip.name} is not in the catalogue", where=f"plan for {topology.name}",
                        remedy="give it in a TOML file of chips (--chips), or plan for time")
    if trace.jaxpr is None:
        return [without_data(trace, topology)]
    check_effects(trace, topology.devices)
    checked = pinning.read(trace, topology, Names(trace.gradient("none"), trace.arguments), pins, mesh, remat, micro_batches)
    problem = Problem(trace, topology, objective, checked)
    found = search(problem)
    if not found[0].fits:
        raise does_not_fit(problem, found)
    return [_plan(problem, chosen, found) for chosen in found[:count]]


def _plan(problem: Problem, chosen: Candidate, found: Sequence[Candidate]) -> Plan:
    a, names = chosen.assignment, problem.names(chosen.assignment.remat)
    a = replace(a, keep=_kept(names, a))
    best = problem.cost(a.remat).estimate(a, causes=True)
    rivals = [_rival(problem, chosen, c) for c in found if c is not chosen][:RIVALS]
    return build(problem.trace, problem.topology, names, a, objective=problem.objective, estimate=best, held=chosen.bytes,
                 rivals=rivals, axes=problem.pins.axes, reasons=_reasons(problem, chosen))


def _kept(names: Names, a: Any) -> int:
    """The axes that really keep the state in parts."""
    used = 0
    for spec, use in zip(names.storage(list(a.masks), a.keep, a.counts),
                         names.storage(list(a.masks), 0, a.counts), strict=True):
        for s, u in zip(spec, use, strict=True):
            used |= s & ~u
    return a.keep & used


def _reasons(problem: Problem, chosen: Candidate) -> dict[str, str]:
    a = chosen.assignment
    if a.remat == "none" and a.micro_batches == 1:
        return {}
    plain = problem.candidate(problem.untranslated(replace(a, remat="none", micro_batches=1))) if a.remat == "none" else \
        problem.candidate(replace(problem.untranslated(a), remat="none", micro_batches=1))
    return {"memory": f"without rematerialization and in one piece a step would take {size(plain.peak)} of "
                      f"{size(problem.topology.device.memory)}"} if not plain.fits else {}


def _rival(problem: Problem, chosen: Candidate, other: Candidate) -> Rival:
    names = problem.names(other.assignment.remat)
    a = replace(other.assignment, keep=_kept(names, other.assignment))
    axes = axis_names(a, names)
    if not other.fits:
        loses = f"does not fit: {size(other.peak)} of {size(problem.topology.device.memory)}"
    elif problem.objective == "memory":
        loses = f"{size(other.peak - chosen.peak)} more"
    elif other.score > chosen.score * 1.0005:
        loses = f"{other.score / chosen.score - 1:.1%} slower"
    else:
        loses = "equal in time; less simple"
    return Rival(strategy(a, axes, names), dict(zip(axes, a.sizes, strict=True)), a.remat, a.micro_batches,
                 other.estimate.total, float(other.peak), loses)


def does_not_fit(problem: Problem, found: Sequence[Candidate]) -> PlanError:
    """What fills the memory, and the nearest change that fits."""
    best = min(found, key=lambda c: c.peak)
    largest = sorted(best.bytes.items(), key=lambda x: -x[1])
    fills = ", ".join(f"{kind} {size(n)}" for kind, n in largest if n > 0.02 * best.peak)
    a, topology = best.assignment, problem.topology
    names = problem.names(a.remat)
    return PlanError(f"nothing fits: the leanest plan ({strategy(a, axis_names(a, names), names)}, remat {a.remat}, "
                     f"{a.micro_batches} micro-batches) holds {size(best.peak)} on each device of "
                     f"{size(topology.device.memory)}: {fills}", where=f"plan for {topology.name}",
                     remedy=_nearest_change(problem, best))


def _nearest_change(problem: Problem, best: Candidate) -> str:
    """Fewer samples, more rematerialization, or the smallest topology of the same chip that holds it."""
    changes, pins, trace = [], problem.pins, problem.trace
    if pins.remat not in (None, "full") or pins.micro_batches is not None or pins.meshes:
        free = Problem(trace, problem.topology, problem.objective, Pins())
        if search(free)[0].fits:
            fixed = (("the mesh", pins.meshes), ("remat", pins.remat), ("micro_batches", pins.micro_batches))
            what = [word for word, on in fixed if on]
            return f"let the planner choose {' and '.join(what)}: then it fits"
    state = sum(best.bytes.get(k, 0) for k in ("params", "optimizer", "variables"))
    rest = best.peak - state
    room = problem.limit - state
    rows = trace.recipe.batch_size
    if room > 0 and rest > 0 and rows > 1:
        fewer = fewer_samples(problem, min(rows // 2, 2 ** int(math.log2(max(1, rows * room / rest)))))
        changes += [f"a batch_size of {fewer}"] if fewer else []
    larger = larger_topology(problem)
    if larger:
        changes.append(f"{larger}, the smallest that holds it")
    smaller = "a smaller model, smaller samples" if room > 0 else "a smaller model"
    return "use " + ", or ".join(changes or [smaller, "chips with more memory"])


def fewer_samples(problem: Problem, guess: int) -> int | None:
    """A batch size that fits: the guess or one of its first halves."""
    trace = problem.trace
    for rows in sorted({guess >> k for k in range(HALVINGS) if guess >> k}, reverse=True):
        less = traced(trace.recipe.with_(batch_size=rows), trace.inputs, trace.targets, trace.samples)
        try:
            if search(Problem(less, problem.topology, problem.objective, problem.pins))[0].fits:
                return rows
        except PlanError:  # no plan for so few
            continue
    return None


def larger_topology(problem: Problem) -> str | None:
    """The smallest topology of the same chip, in doublings, that something fits on."""
    shape = list(problem.topology.shape)
    least = sum(state for pair in problem.memory("none").each for state in pair)
    for _ in range(DOUBLINGS):
        dim = shape.index(min(shape))
        shape[dim] *= 2
        topology = replace(problem.topology, shape=tuple(shape))
        if least / topology.devices > topology.device.memory:
            continue  # not even the state, evenly split
        try:
            if search(Problem(problem.trace, topology, problem.objective, Pins()))[0].fits:
                return topology.name
        except PlanError:
            continue
    return None

"""`plan`: the arrow from a trace to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import axis_names, strategy
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.patience import LIMIT_SECONDS, Patience
from lepton_jax.planner.plans import Plan, Rival, check_effects
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search import advice
from lepton_jax.planner.search import pins as pinning
from lepton_jax.planner.search.build import build, without_data
from lepton_jax.planner.search.descent import (
    ALIKE,
    ALIKE_SECONDS,
    OBJECTIVES,
    Candidate,
    Problem,
    search,
)
from lepton_jax.planner.show.text import SIMPLEST, duration

RIVALS = 5
DOUBLINGS = 8  # of a topology that is too small, tried for a remedy
EQUAL = 5e-4  # share of the objective below which plans are said to be equal


def plan(
    trace: Trace,
    topology: Topology,
    *,
    objective: str = "time",
    mesh: Mapping[str, int] | None = None,
    pins: Mapping[str, Any] | None = None,
    remat: str | None = None,
    micro_batches: int | None = None,
    time_limit: float | None = LIMIT_SECONDS,
) -> Plan:
    """Search for the best way to lay a traced recipe out on a topology. No array is
    allocated.

    Args:
      objective: "time" of a step, "memory" of a device, or "cost" of a step in money,
        for which `topology` is what it is: over several topologies see `frontier`.
      mesh: mesh axis name to size, outermost first; None: the search decides.
      pins: pattern of parameter paths ("**/embedding") to the PartitionSpec with which
        they are kept, over axes of `mesh`.
      remat: "none", "dots" or "full"; None: the mildest that fits.
      micro_batches: None: the recipe's, or the fewest that fit.
      time_limit: seconds of computing after which the search stops and the best plan so
        far is taken, which the plan's notes then say; None: no limit. What takes longer
        than 2 s says on stderr how far it is.

    Raises:
      PlanError: nothing fits (the message says what fills the memory and what would
        fit), or a pin is impossible.
    """
    return candidates(
        trace,
        topology,
        1,
        objective=objective,
        mesh=mesh,
        pins=pins,
        remat=remat,
        micro_batches=micro_batches,
        time_limit=time_limit,
    )[0]


def candidates(
    trace: Trace,
    topology: Topology,
    count: int,
    *,
    objective: str = "time",
    mesh: Mapping[str, int] | None = None,
    pins: Mapping[str, Any] | None = None,
    remat: str | None = None,
    micro_batches: int | None = None,
    time_limit: float | None = LIMIT_SECONDS,
) -> list[Plan]:
    """The `count` best plans, best first; the arguments are those of `plan`."""
    if objective not in OBJECTIVES:
        raise PlanError(
            f"objective {objective!r} is not"
            f" known{nearest(str(objective), OBJECTIVES)}",
            where="plan",
            remedy=f"use one of {', '.join(OBJECTIVES)}",
        )
    if objective == "cost" and topology.price_per_hour is None:
        raise PlanError(
            f"the price of {topology.chip.name} is not in the catalogue",
            where=f"plan for {topology.name}",
            remedy="give it in a TOML file of chips (--chips), or plan for time",
        )
    if trace.jaxpr is None:
        return [without_data(trace, topology)]
    check_effects(trace, topology.devices)
    if time_limit is not None and not time_limit > 0:
        raise PlanError(
            f"time_limit is {time_limit!r}",
            where="plan",
            remedy="give seconds above 0, or None for no limit",
        )
    with Patience(f"planning for {topology.name}", time_limit) as patience:
        patience.detail = "tracing the gradient"
        names = Names(trace.gradient("none"), trace.arguments)
        checked = pinning.read(
            trace,
            topology,
            names,
            pins,
            mesh,
            remat,
            micro_batches,
        )
        problem = Problem(trace, topology, objective, checked, patience)
        found = search(problem)
        if not found[0].fits:
            raise advice.does_not_fit(problem, found, DOUBLINGS)
        return [_plan(problem, chosen, found) for chosen in found[:count]]


def _plan(
    problem: Problem,
    chosen: Candidate,
    found: Sequence[Candidate],
) -> Plan:
    a = chosen.assignment
    names = problem.names(chosen.assignment.remat)
    a = replace(a, keep=_kept(names, a))
    best = problem.cost(a.remat).estimate(a, causes=True)
    rivals = [_rival(problem, chosen, c) for c in _rivals(chosen, found)]
    return build(
        problem.trace,
        problem.topology,
        names,
        a,
        objective=problem.objective,
        estimate=best,
        held=chosen.bytes,
        rivals=rivals,
        axes=problem.pins.axes,
        reasons=_reasons(problem, chosen, found),
        notes=_notes(problem, chosen),
    )


def _rivals(chosen: Candidate, found: Sequence[Candidate]) -> list[Candidate]:
    """The first of the others, the one that the objective would take among them."""
    others = [c for c in found if c is not chosen]
    best = min(
        (c for c in others if c.fits),
        key=lambda c: c.score,
        default=None,
    )
    rivals = others[:RIVALS]
    if best is not None and best.score < chosen.score and best not in rivals:
        rivals[-1] = best
    return rivals


def _notes(problem: Problem, chosen: Candidate) -> list[str]:
    patience = problem.patience
    notes = list(problem.roles.notes)
    if chosen.assignment.micro_batches > 1 and problem.whole:
        notes.append(problem.batches.note(chosen.assignment.micro_batches))
    if not patience.cut:
        return notes
    return [
        *notes,
        (
            f"the search stopped after {patience.limit:.0f} s of computing, before it"
            " had tried everything: this is the best plan so far; time_limit"
            " (--time-limit) lets it look for longer"
        ),
    ]


def _kept(names: Names, a: Any) -> int:
    """The axes that really keep the state in parts."""
    used = 0
    for spec, use in zip(
        names.storage(
            list(a.masks),
            a.keep,
            a.counts,
        ),
        names.storage(
            list(a.masks),
            0,
            a.counts,
        ),
        strict=True,
    ):
        for s, u in zip(spec, use, strict=True):
            used |= s & ~u
    return a.keep & used


def _reasons(
    problem: Problem, chosen: Candidate, found: Sequence[Candidate]
) -> dict[str, str]:
    return (
        _simpler(problem, chosen, found)
        | _memory(problem, chosen)
        | _whole(problem, chosen, found)
    )


def _whole(
    problem: Problem, chosen: Candidate, found: Sequence[Candidate]
) -> dict[str, str]:
    """Why a batch is kept in one piece where micro-batches would be faster."""
    faster = [
        c
        for c in found
        if c.fits and c.score < chosen.score and c.assignment.micro_batches > 1
    ]
    if chosen.assignment.micro_batches > 1 or not faster or not problem.whole:
        return {}
    return {
        "in one piece": f"micro-batches would change the model: {problem.batches.why}"
    }


def _simpler(
    problem: Problem, chosen: Candidate, found: Sequence[Candidate]
) -> dict[str, str]:
    """Why a plan is chosen that is not the fastest."""
    fastest = min(
        (c for c in found if c.fits),
        key=lambda c: c.score,
    )
    if problem.objective == "memory" or _alike(chosen.score, fastest.score):
        return {}
    return {
        SIMPLEST: (
            f"another plan is {_gain(chosen.score, fastest.score)}, but less simple;"
            f" plans within {ALIKE:.1%}, or within {duration(ALIKE_SECONDS)}, which is"
            " what dispatching a call costs, are held to be as fast"
        )
    }


def _alike(score: float, other: float) -> bool:
    return abs(score - other) <= EQUAL * min(score, other)


def _gain(slower: float, faster: float) -> str:
    """ "15% faster, by 80.0 µs"."""
    return f"{_percent(slower / faster - 1)} faster, by {duration(slower - faster)}"


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def _memory(problem: Problem, chosen: Candidate) -> dict[str, str]:
    a = chosen.assignment
    if a.remat == "none" and a.micro_batches == 1:
        return {}
    plain = (
        problem.candidate(
            problem.untranslated(
                replace(
                    a,
                    remat="none",
                    micro_batches=1,
                )
            )
        )
        if a.remat == "none"
        else problem.candidate(
            replace(
                problem.untranslated(a),
                remat="none",
                micro_batches=1,
            )
        )
    )
    return (
        {
            "memory": (
                "without rematerialization and in one piece a step would take"
                f" {size(plain.peak)} of {size(problem.topology.device.memory)}"
            )
        }
        if not plain.fits
        else {}
    )


def _rival(
    problem: Problem,
    chosen: Candidate,
    other: Candidate,
) -> Rival:
    names = problem.names(other.assignment.remat)
    a = replace(other.assignment, keep=_kept(names, other.assignment))
    axes = axis_names(a, names)
    if not other.fits:
        loses = (
            f"does not fit: {size(other.peak)} of"
            f" {size(problem.topology.device.memory)}"
        )
    elif problem.objective == "memory":
        loses = f"{size(other.peak - chosen.peak)} more"
    elif _alike(other.score, chosen.score):
        loses = "equal in time; less simple"
    elif other.score > chosen.score:
        loses = f"{other.score / chosen.score - 1:.1%} slower"
    else:
        loses = f"{_gain(chosen.score, other.score)}; less simple"
    return Rival(
        strategy(a, axes, names),
        dict(
            zip(
                axes,
                a.sizes,
                strict=True,
            )
        ),
        a.remat,
        a.micro_batches,
        other.estimate.total,
        float(other.peak),
        loses,
    )

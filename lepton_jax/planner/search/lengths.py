"""How attention meets a sequence that is split, and why, in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

from lepton_jax.errors import PlanError
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.plans import CONTEXTS
from lepton_jax.planner.program import around
from lepton_jax.planner.program.graph import Operation
from lepton_jax.planner.program.kernels import HEADS, KERNELS
from lepton_jax.planner.program.layout import Layout
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.rewrite.ring import halved
from lepton_jax.planner.search.masks import split_length
from lepton_jax.planner.search.problem import Candidate, Problem
from lepton_jax.planner.search.roles import sequence_axes

ALL_TO_ALL, RING = CONTEXTS


class Way(NamedTuple):
    """Ways in which the kernels of a program meet their sequence.

    Attributes:
      kernel: the first whose sequence is split.
      shares: its mesh axes.
    """

    kernel: Operation
    shares: around.Shares


def context(names: Names, assignment: Assignment) -> str:
    """Return how attention meets its sequence, as in `Plan`."""
    way = _way(names, assignment)
    if way is None:
        return ""
    return ALL_TO_ALL if way.shares.exchanged else RING


def reasons(
    problem: Problem,
    chosen: Candidate,
    spelled: Callable[[float], str],
) -> dict[str, str]:
    """Return the decision how attention meets its sequence, and why.

    Args:
      problem: what is planned.
      chosen: the plan's candidate.
      spelled: seconds in words.
    """
    assignment = chosen.assignment
    names = problem.names(assignment.remat)
    way = _way(names, assignment)
    if way is None:
        return {}
    what = "; ".join(_phrases(way, assignment))

    other = replace(assignment, ring=not assignment.ring)
    if _way(names, other) == way:
        heads = min(v.shape[HEADS] for v in way.kernel.inputs[:2] if v is not None)
        why = f"{heads} heads can't be exchanged any further"
    else:
        seconds = problem.cost(assignment.remat).estimate(other).total
        why = f"with {context(names, other)} a step would take {spelled(seconds)}"
    return {f"context {context(names, assignment)}": f"{what}; {why}"}


def check_asked(problem: Problem, chosen: Candidate) -> None:
    """Check that attention can meet a split sequence in the way that was asked for.

    Raises:
      PlanError: it can't, since no kernel computes it, or a pipeline does.
    """
    assignment = chosen.assignment
    names = problem.names(assignment.remat)
    asked = problem.pins.context
    mesh = dict(zip(problem.pins.axes, assignment.sizes, strict=False))
    if asked is None or not sequence_axes(mesh):
        return
    if _way(names, assignment) is not None:
        return
    why = "no kernel computes it here, and each device gathers the sequence"
    remedy = "leave out context, or train on longer samples, which a kernel computes"
    if problem.trace.forms.stages.count > 1:
        why = "in a pipeline each device gathers the sequence for it"
        remedy = "leave out context, or the stages"
    raise PlanError(
        f"context {asked!r} is asked for, and attention can't be computed so: {why}",
        where=f"plan for {problem.topology.name}",
        remedy=remedy,
    )


# ---- internals ----


def _way(names: Names, assignment: Assignment) -> Way | None:
    """Return how kernels meet their sequence; None: it is whole."""
    if not split_length(names, assignment):
        return None
    layout = Layout(
        names.graph,
        assignment.sizes,
        names.uses(list(assignment.masks)),
        storage=[],
        ring=assignment.ring,
    )
    for op in names.graph.operations():
        if op.name in KERNELS:
            shares = layout.shares(op)
            if shares.exchanged or shares.ring:
                return Way(op, shares)
    return None


def _phrases(way: Way, assignment: Assignment) -> Iterator[str]:
    counts = assignment.counts
    how = way.kernel.params["how"]
    if way.shares.exchanged:
        devices = counts[way.shares.exchanged]
        yield f"{devices} devices exchange parts of the sequence for heads, and back"
    if not way.shares.ring:
        return
    devices = counts[way.shares.ring]
    yield f"keys and values go around {devices} devices with parts of the sequence"
    if halved(how):
        yield "each has an early and a late half, so that all have as much work"
    elif how.causal:
        yield "only as far as the window reaches; the first devices have less work"

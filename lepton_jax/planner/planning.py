"""`plan`: the arrow from a trace to a plan.

The search (`search/`) finds candidates. Here the request is checked, and the best
candidate becomes a plan that says why it was chosen, what else there was, and by how
much each rival loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment, axis_names, strategy
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.patience import LIMIT_SECONDS, Patience
from lepton_jax.planner.plans import OBJECTIVES, SIMPLEST, Plan, Rival, check_effects
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search import advice, lengths, limits, staging
from lepton_jax.planner.search import pins as pinning
from lepton_jax.planner.search.build import Verdict, build, without_data
from lepton_jax.planner.search.descent import search
from lepton_jax.planner.search.problem import Candidate, Problem
from lepton_jax.planner.show.words import duration


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
    **forms: Any,
) -> Plan:
    """Search for the best way to lay a traced recipe out on a topology.

    No array is allocated.

    Args:
      trace: of the recipe.
      topology: the devices, which need not be there.
      objective: "time" of a step, "memory" of a device, or "cost" of a step in money,
        for which `topology` is what it is: over several topologies see `frontier`.
      mesh: mesh axis name to size, outermost first; None: the search decides.
      pins: pattern of parameter paths ("**/embedding") to the PartitionSpec with which
        they are kept, over axes of `mesh`.
      remat: "none", "dots", "full" or "keep ...", as a plan shows it; None: the mildest
        that fits.
      micro_batches: parts of a batch; None: the recipe's, or the fewest that fit.
      time_limit: seconds of computing after which the search stops and the best plan so
        far is taken, which the plan's notes then say; None: no limit. What takes longer
        than 2 s says on stderr how far it is.
      **forms: forms of the step that are fixed, by the field of `Plan` that has them:
        context, "all-to-all" or "ring"; flags, of XLA's, by name;
        stages, of a pipeline for a stack of equal layers: their number, or (stages,
        micro-batches in flight), or these and the chunks of a stage; 1: no pipeline;
        None: those of a mesh axis called "stage", or the search decides.

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
        **forms,
    )[0]


def candidates(
    trace: Trace,
    topology: Topology,
    count: int,
    **asked: Any,
) -> list[Plan]:
    """Return the `count` best plans, best first.

    Args:
      trace: of the recipe.
      topology: the devices, which need not be there.
      count: number of plans, at the most.
      asked: the keyword arguments of `plan`.

    Raises:
      PlanError: as in `plan`.
    """
    request = pinning.Request(**asked)
    _check_objective(request, topology)
    if trace.jaxpr is None:
        return [without_data(trace, topology)]
    trace = trace.on(topology, request.micro_batches)
    check_effects(trace, topology.devices)
    _check_time_limit(request)

    with Patience(f"planning for {topology.name}", request.time_limit) as patience:
        problem, ranked = _best(trace, topology, request, patience)
        if not ranked[0].may_fit:
            raise advice.does_not_fit(problem, ranked, limits.DOUBLINGS)
        lengths.check_asked(problem, ranked[0])
        return [_plan(problem, chosen, ranked) for chosen in ranked[:count]]


def _best(
    trace: Trace,
    topology: Topology,
    request: pinning.Request,
    patience: Patience,
) -> tuple[Problem, list[Candidate]]:
    """Return the best of the searches without a pipeline and with some.

    Each comes as its problem and its candidates, best first.
    """
    own = staging.asked(request, trace, f"plan for {topology.name}")
    if own.count is not None and own.count > 1:
        found = [
            _searched(trace.staged(stages), topology, request, patience)
            for stages in staging.options(own, trace, topology)
        ]
        return max(found, key=_merit)

    problem, ranked = _searched(trace, topology, request, patience)
    best = _refined(problem, ranked, request)
    if own.count == 1 or request.mesh is not None:
        return best
    for stages in staging.worth_trying(best[0], best[1][0]):
        if patience.cut:
            break
        other = _searched(best[0].trace.staged(stages), topology, request, patience)
        other[0].unstaged = best[0].unstaged or best[1][0]
        if other[1][0].may_fit:
            best = max(best, other, key=_merit)
    return best


def _searched(
    trace: Trace,
    topology: Topology,
    request: pinning.Request,
    patience: Patience,
) -> tuple[Problem, list[Candidate]]:
    """Return the problem that was asked, and its candidates, best first."""
    patience.detail = "tracing the gradient"
    names = Names(trace.gradient("none"), trace.arguments)
    pins = pinning.read(request, trace, topology, names)
    pins = staging.staged(pins, trace.forms.stages, topology)
    problem = Problem(trace, topology, request.objective, pins, patience)
    return problem, search(problem)


def _refined(
    problem: Problem,
    ranked: list[Candidate],
    request: pinning.Request,
) -> tuple[Problem, list[Candidate]]:
    """Search again with the loss in pieces that suit the micro-batches found.

    How many pieces are good depends on the micro-batches, and these on how much the
    pieces leave in memory: with the same micro-batches or twice as many, less may have
    to be computed again. The best search counts.
    """
    best = (problem, ranked)
    if request.micro_batches or problem.trace.recipe.micro_batches:
        return best
    parts = ranked[0].assignment.micro_batches
    tried = {problem.trace.forms}
    for count in (parts, 2 * parts):
        trace = problem.trace.on(problem.topology, count)
        if trace.forms in tried or problem.patience.cut:
            continue
        tried.add(trace.forms)
        other = _searched(trace, problem.topology, request, problem.patience)
        best = max(best, other, key=_merit)
    return best


def _merit(searched: tuple[Problem, list[Candidate]]) -> tuple[bool, bool, float]:
    """Return what makes the best candidate of a search better than another's."""
    candidate = searched[1][0]
    return candidate.fits, candidate.may_fit, -candidate.score


def _check_objective(request: pinning.Request, topology: Topology) -> None:
    objective = request.objective
    if objective not in OBJECTIVES:
        similar = nearest(str(objective), OBJECTIVES)
        raise PlanError(
            f"objective {objective!r} is not known{similar}",
            where="plan",
            remedy=f"use one of {', '.join(OBJECTIVES)}",
        )
    if objective == "cost" and topology.price_per_hour is None:
        raise PlanError(
            f"the price of {topology.chip.name} is not in the catalogue",
            where=f"plan for {topology.name}",
            remedy="give it in a TOML file of chips (--chips), or plan for time",
        )


def _check_time_limit(request: pinning.Request) -> None:
    limit = request.time_limit
    if limit is not None and not limit > 0:
        raise PlanError(
            f"time_limit is {limit!r}",
            where="plan",
            remedy="give seconds above 0, or None for no limit",
        )


# ---- from a candidate to a plan ----


def _plan(
    problem: Problem,
    chosen: Candidate,
    ranked: Sequence[Candidate],
) -> Plan:
    names = problem.names(chosen.assignment.remat)
    assignment = _with_real_keep(names, chosen.assignment)
    cost = problem.cost(assignment.remat)
    estimate = cost.estimate(assignment, causes=True)
    rivals = _rivals(chosen, ranked)
    verdict = Verdict(
        objective=problem.objective,
        rivals=tuple(_rival(problem, chosen, rival) for rival in rivals),
        reasons=_reasons(problem, chosen, ranked),
        notes=tuple(_notes(problem, chosen)),
        bounds=chosen.bounds,
        flags=problem.pins.flags,
    )
    return build(
        problem.trace,
        problem.topology,
        names,
        assignment,
        estimate=estimate,
        held=chosen.bytes,
        axes=problem.pins.axes,
        verdict=verdict,
    )


def _with_real_keep(names: Names, assignment: Assignment) -> Assignment:
    """Return the assignment with only the axes that really keep the state in parts."""
    masks = list(assignment.masks)
    counts = assignment.counts
    stored = names.storage(masks, assignment.keep, counts)
    used = names.storage(masks, 0, counts)
    real = 0
    for stored_spec, used_spec in zip(stored, used, strict=True):
        for stored_mask, used_mask in zip(stored_spec, used_spec, strict=True):
            real |= stored_mask & ~used_mask
    return replace(assignment, keep=assignment.keep & real)


def _notes(
    problem: Problem,
    chosen: Candidate,
) -> list[str]:
    """Return what the person who reads the plan should know of the search."""
    patience = problem.patience
    parts = chosen.assignment.micro_batches
    notes = list(problem.roles.notes)
    if not chosen.fits:
        notes.append(_may_not_fit(problem, chosen))
    if parts > 1 and problem.whole:
        notes.append(problem.batches.note(parts))
    flight = problem.trace.forms.stages.parts
    if flight > 1 and problem.batches.change:
        notes.append(problem.batches.note_in_flight(flight))
    if patience.cut:
        notes.append(
            f"the search stopped after {patience.limit:.0f} s of computing, before it"
            " had tried everything: this is the best plan so far; time_limit"
            " (--time-limit) lets it look for longer"
        )
    return notes


def _may_not_fit(problem: Problem, chosen: Candidate) -> str:
    """Return the note of a plan that fits by its peak, but not by its bound."""
    memory = size(problem.topology.device.memory)
    return (
        f"it may not fit: {size(chosen.peak)} of {memory} are predicted, and it can be"
        f" {size(chosen.bounds.most)}; no plan surely fits, and this is the leanest."
        " prove (--prove) compiles it and lets XLA's own figures decide; a smaller"
        " batch or more devices make room"
    )


# ---- why it was chosen ----


def _reasons(
    problem: Problem, chosen: Candidate, ranked: Sequence[Candidate]
) -> dict[str, str]:
    reasons = {
        SIMPLEST: _why_not_the_fastest(problem, chosen, ranked),
        "memory": _why_not_plain(problem, chosen),
        "in one piece": _why_in_one_piece(problem, chosen, ranked),
        "in stages": _why_in_stages(problem),
        **lengths.reasons(problem, chosen, duration),
    }
    return {decision: why for decision, why in reasons.items() if why}


def _why_not_the_fastest(
    problem: Problem, chosen: Candidate, ranked: Sequence[Candidate]
) -> str | None:
    """Return why a plan was chosen that is not the fastest; None if it is."""
    scores = [c.score for c in ranked if c.fits]
    if not chosen.fits or problem.objective == "memory":
        return None
    fastest = min(scores)
    if _alike(chosen.score, fastest):
        return None
    return (
        f"another plan is {_gain(chosen.score, fastest)}, but less simple;"
        f" plans within {limits.ALIKE:.1%}, or within"
        f" {duration(limits.ALIKE_SECONDS)}, which is"
        " what dispatching a call costs, are held to be as fast"
    )


def _why_not_plain(problem: Problem, chosen: Candidate) -> str | None:
    """Return why activations are computed again, or a batch is taken in parts."""
    a = chosen.assignment
    if a.remat == "none" and a.micro_batches == 1:
        return None
    form = problem.untranslated(a)
    plain = problem.candidate(
        replace(
            form,
            remat="none",
            micro_batches=1,
        )
    )
    if plain.fits:
        return None
    would = "may" if plain.may_fit else "would"
    bytes_ = plain.bounds.most if plain.may_fit else plain.peak
    return (
        f"without rematerialization and in one piece a step {would} take"
        f" {size(bytes_)} of {size(problem.topology.device.memory)}"
    )


def _why_in_one_piece(
    problem: Problem, chosen: Candidate, ranked: Sequence[Candidate]
) -> str | None:
    """Return why a batch stays in one piece where micro-batches would be faster."""
    faster = [c for c in ranked if c.fits and c.score < chosen.score]
    is_faster_in_parts = any(c.assignment.micro_batches > 1 for c in faster)
    is_in_parts = chosen.assignment.micro_batches > 1
    if is_in_parts or not is_faster_in_parts or not problem.whole:
        return None
    return f"micro-batches would change the model: {problem.batches.why}"


def _why_in_stages(problem: Problem) -> str | None:
    """Return why a pipeline was chosen that nobody asked for."""
    plain = problem.unstaged
    if plain is None:
        return None
    if not plain.may_fit:
        memory = size(problem.topology.device.memory)
        return f"without a pipeline nothing fits: {size(plain.peak)} of {memory}"
    took = duration(plain.estimate.total)
    waits = duration(plain.estimate.seconds["communication"])
    return f"the best plan without a pipeline takes {took} a step, and waits {waits}"


# ---- rivals ----


def _rivals(
    chosen: Candidate,
    ranked: Sequence[Candidate],
) -> list[Candidate]:
    """Return the first of the others, and the one with the best score among them."""
    others = [c for c in ranked if c is not chosen]
    fitting = [c for c in others if c.fits]
    rivals = others[: limits.RIVALS]
    if fitting:
        best = min(fitting, key=lambda c: c.score)
        if best.score < chosen.score and best not in rivals:
            rivals[-1] = best
    return rivals


def _rival(
    problem: Problem,
    chosen: Candidate,
    other: Candidate,
) -> Rival:
    names = problem.names(other.assignment.remat)
    assignment = _with_real_keep(names, other.assignment)
    axes = axis_names(assignment, names)
    return Rival(
        name=strategy(assignment, axes, names),
        mesh=dict(
            zip(
                axes,
                assignment.sizes,
                strict=True,
            )
        ),
        remat=assignment.remat,
        micro_batches=assignment.micro_batches,
        seconds=other.estimate.total,
        bytes=float(other.peak),
        loses=_loses(problem, chosen, other),
    )


def _loses(
    problem: Problem,
    chosen: Candidate,
    other: Candidate,
) -> str:
    """Return by how much a candidate loses against the chosen one, in words."""
    memory = size(problem.topology.device.memory)
    if not other.may_fit:
        return f"does not fit: {size(other.peak)} of {memory}"
    if not other.fits and chosen.fits:
        return f"may not fit: up to {size(other.bounds.most)} of {memory}"
    if problem.objective == "memory":
        return f"{size(other.peak - chosen.peak)} more"
    if _alike(other.score, chosen.score):
        return "equal in time; less simple"
    if other.score > chosen.score:
        return f"{other.score / chosen.score - 1:.1%} slower"
    return f"{_gain(chosen.score, other.score)}; less simple"


def _alike(score: float, other: float) -> bool:
    difference = abs(score - other)
    return difference <= limits.EQUAL * min(score, other)


def _gain(slower: float, faster: float) -> str:
    """Return a gain in words, as in "15% faster, by 80.0 µs"."""
    share = slower / faster - 1
    percent = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
    return f"{percent} faster, by {duration(slower - faster)}"

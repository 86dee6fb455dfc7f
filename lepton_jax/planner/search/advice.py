"""Advice where nothing fits: the nearest change, tried before it is advised.

The changes are, in this order: to let the planner choose what was pinned, to take fewer
samples a step, and to take more devices of the same chip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lepton_jax.errors import PlanError
from lepton_jax.planner.assignment import Assignment, axis_names, strategy
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.program.trace import trace as traced
from lepton_jax.planner.search.descent import search
from lepton_jax.planner.search.finalists import fewest, powers
from lepton_jax.planner.search.limits import (
    ADVICE_SECONDS,
    GUESSES,
    LITTLE,
    NAMED_SHARE,
    SOLID,
)
from lepton_jax.planner.search.problem import Candidate, Problem


def does_not_fit(
    problem: Problem, candidates: Sequence[Candidate], doublings: int
) -> PlanError:
    """Return the error that says what fills the memory, and the nearest change.

    Args:
      problem: what was searched.
      candidates: what the search found, none of which fits.
      doublings: number of larger topologies to try.
    """
    best = leanest(candidates)
    device = size(problem.topology.device.memory)
    what = (
        f"nothing fits: the leanest plan ({_described(problem, best)}) holds"
        f" {size(best.peak)} on each device of {device}: {_contents(best)}"
    )
    remedy = nearest_change(problem, candidates, doublings)
    patience = problem.patience
    if patience.cut:
        what += f"; the search stopped after {patience.limit:.0f} s of computing"
        remedy += ", or let it look for longer with time_limit (--time-limit)"
    return PlanError(what, where=f"plan for {problem.topology.name}", remedy=remedy)


def _described(problem: Problem, candidate: Candidate) -> str:
    """Return strategy, rematerialization and micro-batches in words."""
    a = candidate.assignment
    names = problem.names(a.remat)
    parts = f"{a.micro_batches} micro-batch{'es' if a.micro_batches > 1 else ''}"
    return f"{strategy(a, axis_names(a, names), names)}, remat {a.remat}, {parts}"


def _contents(candidate: Candidate) -> str:
    """Return what holds the memory, the largest first."""
    kinds = sorted(candidate.bytes.items(), key=lambda kind: -kind[1])
    least = NAMED_SHARE * candidate.peak
    return ", ".join(f"{kind} {size(count)}" for kind, count in kinds if count > least)


def leanest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the simplest of the candidates that hold about the least.

    If many micro-batches or a stricter rematerialization free only a little, they are
    not worth naming.
    """
    bound = min(c.peak for c in candidates) * (1 + LITTLE)
    lean = [c for c in candidates if c.peak <= bound]
    policies = list(POLICIES)

    def simplicity(c: Candidate) -> tuple[int, int, int]:
        a = c.assignment
        return a.micro_batches, policies.index(a.remat), c.peak

    return min(lean, key=simplicity)


def nearest_change(
    problem: Problem,
    candidates: Sequence[Candidate],
    doublings: int,
) -> str:
    """Return the remedy: which pins to leave out, or what else to use."""
    pinned = _pinned(problem)
    if pinned:
        free = problem.without_pins(problem.topology, problem.patience.limit)
        if search(free)[0].fits:
            return f"let the planner choose {' and '.join(pinned)}: then it fits"

    changes = []
    room = problem.limit - _state(leanest(candidates))
    if room > 0 and problem.trace.recipe.batch_size > 1:
        fewer = fewer_samples(problem, candidates)
        if fewer:
            changes.append(f"a batch_size of {fewer}")
    larger = larger_topology(problem, doublings)
    if larger:
        changes.append(f"{larger}, the smallest that holds it")
    if not changes:
        model = "a smaller model, smaller samples" if room > 0 else "a smaller model"
        changes = [model, "chips with more memory"]
    return "use " + ", or ".join(changes)


def _pinned(problem: Problem) -> list[str]:
    """Return the settings that the planner may not choose; empty if none matters.

    The strictest rematerialization matters only together with other pins.
    """
    pins = problem.pins
    settings = {
        "the mesh": pins.meshes,
        "remat": pins.remat,
        "micro_batches": pins.micro_batches,
    }
    words = [word for word, setting in settings.items() if setting]
    return [] if words == ["remat"] and pins.remat == "full" else words


def _state(candidate: Candidate) -> int:
    """Return the bytes of a device that do not depend on the batch."""
    kinds = ("params", "optimizer", "variables")
    return sum(candidate.bytes.get(kind, 0) for kind in kinds)


# ---- fewer samples ----


@dataclass
class Trial:
    """Tries smaller batches with the assignments of a search in which nothing fitted.

    Args:
      problem: what was searched.
      assignments: some of its assignments, with masks of the policy "none", each with
        the rematerialization under which it holds the least.
    """

    problem: Problem
    assignments: list[Assignment]

    def smaller(self, rows: int) -> Problem:
        """Return the same problem with a batch of so many rows."""
        trace = self.problem.trace
        recipe = trace.recipe.with_(batch_size=rows)
        return self.problem.on_trace(
            traced(recipe, trace.inputs, trace.targets, trace.samples)
        )

    def peak(self, rows: int) -> float:
        """Return the bytes of the leanest plan, or of the first that fits."""
        smaller = self.smaller(rows)
        batch = smaller.names("none").batch
        asked = smaller.pins.micro_batches
        least = math.inf
        for assignment in self.assignments:
            moved = self._moved(assignment, smaller)
            if moved is None:
                continue
            split = 1 if batch is None else moved.counts[moved.masks[batch]]
            options = [asked] if asked else powers(rows // split)
            parts = fewest(smaller, moved, options)
            peak = smaller.peak(replace(moved, micro_batches=parts))
            least = min(least, peak)
            if least <= smaller.limit:
                return least
        return least

    def fits(self, rows: int) -> bool:
        """Whether a whole search finds a plan for so many rows."""
        return search(self.smaller(rows))[0].fits

    def _moved(
        self,
        assignment: Assignment,
        smaller: Problem,
    ) -> Assignment | None:
        """Return the assignment for the smaller batch; None where it does not divide.

        A batch that does not divide is not split.
        """
        old_names = [group.name for group in self.problem.names("none").groups]
        by_name = dict(zip(old_names, assignment.masks, strict=True))
        names = smaller.names("none")
        counts = assignment.counts
        masks = []
        for k, group in enumerate(names.groups):
            mask = by_name.get(group.name, 0)
            divides = group.divisor % counts[mask] == 0
            if not divides and k != names.batch:
                return None
            masks.append(mask if divides else 0)
        return replace(assignment, masks=tuple(masks))


def fewer_samples(problem: Problem, candidates: Sequence[Candidate]) -> int | None:
    """Return the largest batch size that fits, as far as `ADVICE_SECONDS` reach.

    Multiples of the number of devices come first, then of those that the leanest plan
    splits the batch over, since any other size leaves devices idle.

    Returns:
      Rows; None: no size fits.
    """
    leanest_of: dict[tuple, Candidate] = {}
    for candidate in sorted(candidates, key=lambda c: c.peak):
        a = problem.untranslated(candidate.assignment)
        leanest_of.setdefault((a.sizes, a.masks, a.keep), candidate)
    chosen = list(leanest_of.values())[:SOLID]
    trial = Trial(problem, [problem.untranslated(c.assignment) for c in chosen])

    first = trial.assignments[0]
    batch = problem.names("none").batch
    split = 1 if batch is None else first.counts[first.masks[batch]]
    parts = problem.pins.micro_batches or 1
    patience = Patience("planning", ADVICE_SECONDS)
    for count in dict.fromkeys([problem.topology.devices, split, 1]):
        rows = _largest(trial, count * parts, chosen[0], patience)
        if rows:
            return rows
    return None


def _largest(
    trial: Trial,
    step: int,
    failed: Candidate,
    patience: Patience,
) -> int | None:
    """Return the largest multiple of `step` below the batch size that fits.

    Args:
      trial: tries a size.
      step: rows.
      failed: the leanest plan for the whole batch.
      patience: how long to look.
    """
    total = trial.problem.trace.recipe.batch_size
    most = -(-total // step)
    count = _guessed(trial, step, failed, patience)
    while count > 0 and not trial.fits(count * step):
        count //= 2
    if count == 0:
        return None

    # a whole search may find what is leaner than the assignments that were tried
    stride = 1
    growing = True
    while stride > 0 and not patience.over():
        if count + stride < most and trial.fits((count + stride) * step):
            count += stride
            stride *= 2 if growing else 1
        else:
            growing = False
            stride //= 2
    return count * step


def _guessed(
    trial: Trial,
    step: int,
    failed: Candidate,
    patience: Patience,
) -> int:
    """Return the most steps of rows for which one of the trial's assignments fits.

    Memory grows with the rows nearly in a straight line, so few sizes are traced: each
    is guessed from the two around it. If 0 steps hold 2 GiB, 16 steps hold 10 GiB and
    the limit is 6 GiB, the guess is 8 steps. Where the line is bent, guesses would only
    creep, so after `GUESSES` of them the rest is halved.
    """
    limit = trial.problem.limit
    total = trial.problem.trace.recipe.batch_size

    # the most steps that fit so far, and their bytes
    low = 0
    low_bytes = float(_state(failed))
    # the fewest steps that don't, and theirs
    high = -(-total // step)
    high_bytes = float(failed.peak)

    tried = 0
    while high - low > 1 and not patience.over():
        trial.problem.patience.detail = (
            f"nothing fits; trying batches of {low * step:,} to {high * step:,}"
        )
        share = (limit - low_bytes) / max(high_bytes - low_bytes, 1.0)
        guess = low + math.floor(share * (high - low))
        if tried >= GUESSES:
            guess = (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        held = trial.peak(middle * step)
        tried += 1
        if held <= limit:
            low = middle
            low_bytes = held
        else:
            high = middle
            high_bytes = held
    return low


# ---- more devices ----


def larger_topology(problem: Problem, doublings: int) -> str | None:
    """Return the smallest topology of the same chip that something fits on.

    Its shape is the problem's, with the shortest dim doubled up to `doublings` times.
    """
    shape = list(problem.topology.shape)
    state = sum(sum(pair) for pair in problem.memory("none").state_bytes)
    patience = Patience("planning", ADVICE_SECONDS)
    for _ in range(doublings):
        dim = shape.index(min(shape))
        shape[dim] *= 2
        topology = replace(problem.topology, shape=tuple(shape))
        # not even the state fits, evenly split
        if state / topology.devices > topology.device.memory:
            continue
        if patience.over():
            return None

        problem.patience.detail = f"trying {topology.name}"
        try:
            if search(problem.without_pins(topology, ADVICE_SECONDS))[0].fits:
                return topology.name
        except PlanError:
            continue
    return None

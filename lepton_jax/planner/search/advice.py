"""Advice where nothing fits: the nearest change, tried before it is advised.

The changes are, in this order: to let the planner choose what was pinned, to take fewer
samples a step, and to take more devices of the same chip. What surely fits, by its
upper bound, goes before what may fit, as predicted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lepton_jax.errors import PlanError
from lepton_jax.planner.assignment import Assignment, axis_names, strategy
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.remat import place
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
from lepton_jax.planner.search.masks import divides, reordered, sample_axes
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
    held = candidate.bytes
    least = NAMED_SHARE * candidate.peak
    kinds = [kind for kind, count in held.items() if count > least]
    kinds.sort(key=lambda kind: -held[kind])
    return ", ".join(f"{kind} {size(held[kind])}" for kind in kinds)


def leanest(candidates: Sequence[Candidate]) -> Candidate:
    """Return the simplest of the candidates that hold about the least.

    If many micro-batches or a stricter rematerialization free only a little, they are
    not worth naming.
    """
    least = min(c.peak for c in candidates)
    bound = least * (1 + LITTLE)
    lean = [c for c in candidates if c.peak <= bound]

    def simplicity(candidate: Candidate) -> tuple[int, int, int]:
        assignment = candidate.assignment
        return assignment.micro_batches, place(assignment.remat), candidate.peak

    return min(lean, key=simplicity)


class Offer(NamedTuple):
    """A change with which something fits.

    Attributes:
      words: what to do.
      surely: whether the upper bound fits; False: the predicted peak alone does.
    """

    words: str
    surely: bool


def nearest_change(
    problem: Problem,
    candidates: Sequence[Candidate],
    doublings: int,
) -> str:
    """Return the remedy: which pins to leave out, or what else to use."""
    unpinned = _unpinned(problem)
    if unpinned and unpinned.surely:
        return unpinned.words

    larger = larger_topology(problem, doublings)
    sure = _changes(problem, candidates, larger, surely=True)
    if sure:
        return f"use {sure}"
    if unpinned:
        return unpinned.words
    less_sure = _changes(problem, candidates, larger, surely=False)
    if less_sure:
        return f"use {less_sure}: then it may fit"

    has_room = _room(problem, candidates) > 0
    model = "a smaller model, smaller samples" if has_room else "a smaller model"
    return f"use {model}, or chips with more memory"


def _unpinned(problem: Problem) -> Offer | None:
    """Return the advice to leave out the pins; None where that is no help."""
    pinned = _pinned(problem)
    if not pinned:
        return None
    free = problem.without_pins(problem.topology, problem.patience.limit)
    best, *_ = search(free)
    if not best.may_fit:
        return None
    fits = "fits" if best.fits else "may fit"
    words = f"let the planner choose {' and '.join(pinned)}: then it {fits}"
    return Offer(words, best.fits)


def _changes(
    problem: Problem,
    candidates: Sequence[Candidate],
    larger: Offer | None,
    surely: bool,
) -> str:
    """Return fewer samples and more devices that fit; empty if neither does."""
    changes = []
    if _room(problem, candidates) > 0 and problem.trace.recipe.batch_size > 1:
        fewer = fewer_samples(problem, candidates, surely)
        if fewer:
            changes.append(f"a batch_size of {fewer}")
    if larger and larger.surely == surely:
        changes.append(larger.words)
    return ", or ".join(changes)


def _room(problem: Problem, candidates: Sequence[Candidate]) -> float:
    """Return the bytes that the state leaves to the batch."""
    return problem.limit - _state(leanest(candidates))


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
    if words == ["remat"] and pins.remat == "full":
        return []
    return words


def _state(candidate: Candidate) -> int:
    """Return the bytes of a device that do not depend on the batch."""
    held = candidate.bytes
    kinds = ("params", "optimizer", "variables")
    return sum(held.get(kind, 0) for kind in kinds)


# ---- fewer samples ----


@dataclass
class Trial:
    """Tries smaller batches with the assignments of a search in which nothing fitted.

    Args:
      problem: what was searched.
      assignments: some of its assignments, with masks of the policy "none", each with
        the rematerialization under which it holds the least.
      surely: whether the upper bound has to fit, or the predicted peak.
    """

    problem: Problem
    assignments: list[Assignment]
    surely: bool

    def smaller(self, rows: int) -> Problem:
        """Return the same problem with a batch of `rows`."""
        trace = self.problem.trace
        recipe = trace.recipe.with_(batch_size=rows)
        smaller = traced(
            recipe,
            trace.inputs,
            trace.targets,
            trace.samples,
        )
        return self.problem.on_trace(smaller)

    def bound(self, rows: int) -> float:
        """Return the most bytes of the leanest plan, or of the first that fits."""
        smaller = self.smaller(rows)
        names = smaller.names("none")
        asked = smaller.pins.micro_batches
        least = math.inf
        for assignment in self.assignments:
            moved = self._moved(assignment, smaller)
            if moved is None:
                continue
            split = moved.counts[sample_axes(moved, names)]
            options = [asked] if asked else powers(rows // split)
            parts = fewest(smaller, moved, options)
            form = replace(moved, micro_batches=parts)
            bound = smaller.bound(form, self.surely)
            least = min(least, bound)
            if least <= smaller.limit:
                return least
        return least

    def fits(self, rows: int) -> bool:
        """Whether a whole search finds a plan for a batch of `rows`."""
        best, *_ = search(self.smaller(rows))
        return best.fits if self.surely else best.may_fit

    def _moved(
        self,
        assignment: Assignment,
        smaller: Problem,
    ) -> Assignment | None:
        """Return the assignment for the smaller batch; None where it does not divide.

        A batch that does not divide is not split.
        """
        names = smaller.names("none")
        masks = reordered(assignment, self.problem.names("none"), names)
        for k, mask in enumerate(masks):
            if divides(names, k, assignment.counts[mask]):
                continue
            if k != names.batch:
                return None
            masks[k] = 0
        return replace(assignment, masks=tuple(masks))


def fewer_samples(
    problem: Problem,
    candidates: Sequence[Candidate],
    surely: bool,
) -> int | None:
    """Return the largest batch size that fits, as far as `ADVICE_SECONDS` reach.

    Multiples of the number of devices come first, then of those that the leanest plan
    splits the batch over, since any other size leaves devices idle.

    Args:
      problem: what was searched.
      candidates: what the search found, none of which fits.
      surely: whether the upper bound has to fit, or the predicted peak.

    Returns:
      Rows; None: no size fits.
    """
    by_peak = sorted(candidates, key=lambda c: c.peak)
    failed = by_peak[0]
    forms = _leanest_forms(problem, by_peak)
    trial = Trial(problem, forms[:SOLID], surely)

    first = trial.assignments[0]
    split = first.counts[sample_axes(first, problem.names("none"))]
    parts = problem.pins.micro_batches or 1
    patience = Patience("planning", ADVICE_SECONDS)
    counts = [problem.topology.devices, split, 1]
    for count in dict.fromkeys(counts):
        rows = _largest(trial, count * parts, failed, patience)
        if rows:
            return rows
    return None


def _leanest_forms(
    problem: Problem,
    by_peak: Sequence[Candidate],
) -> list[Assignment]:
    """Return each assignment once, under the policy with which it holds the least."""
    forms: dict[tuple, Assignment] = {}
    for candidate in by_peak:
        form = problem.untranslated(candidate.assignment)
        forms.setdefault((form.sizes, form.masks, form.keep), form)
    return list(forms.values())


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
        more = count + stride
        if more < most and trial.fits(more * step):
            count = more
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
    high_bytes = float(failed.bounds.most if trial.surely else failed.peak)

    tried = 0
    while high - low > 1 and not patience.over():
        trial.problem.patience.detail = (
            f"nothing fits; trying batches of {low * step:,} to {high * step:,}"
        )
        slope = max(high_bytes - low_bytes, 1.0)
        share = (limit - low_bytes) / slope
        guess = low + math.floor(share * (high - low))
        if tried >= GUESSES:
            guess = (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        held = trial.bound(middle * step)
        tried += 1
        if held <= limit:
            low = middle
            low_bytes = held
        else:
            high = middle
            high_bytes = held
    return low


# ---- more devices ----


def larger_topology(problem: Problem, doublings: int) -> Offer | None:
    """Return the smallest topology of the same chip that something surely fits on.

    If there is none, it is the smallest that something may fit on. Its shape is the
    problem's, with the shortest dim doubled up to `doublings` times.
    """
    less_sure = None
    shape = list(problem.topology.shape)
    state_bytes = problem.memory("none").state_bytes
    state = sum(sum(pair) for pair in state_bytes)
    patience = Patience("planning", ADVICE_SECONDS)
    for _ in range(doublings):
        dim = shape.index(min(shape))
        shape[dim] *= 2
        topology = replace(problem.topology, shape=tuple(shape))
        # not even the state fits, evenly split
        if state / topology.devices > topology.device.memory:
            continue
        if patience.over():
            break

        problem.patience.detail = f"trying {topology.name}"
        try:
            best, *_ = search(problem.without_pins(topology, ADVICE_SECONDS))
        except PlanError:
            continue
        if best.fits:
            return Offer(f"{topology.name}, the smallest that holds it", True)
        if best.may_fit and less_sure is None:
            less_sure = Offer(topology.name, False)
    return less_sure

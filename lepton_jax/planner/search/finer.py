"""Rematerialization value by value, for the plans that come first.

The search knows three policies. Where the memory has room between two of them, a policy
in between keeps as much as fits: first what is dearest to compute again for its bytes,
which for products is the longest sum (Jain et al. 2020, "Checkmate", solve this exactly
for straight code; products of layers are few, and their prices stand far apart).

What a policy in between takes and saves is read off the two around it. One candidate is
then traced and predicted like all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.keeping import Keeping, Kept
from lepton_jax.planner.search.finalists import powers, rows_of_a_device
from lepton_jax.planner.search.limits import (
    FINER_GAIN,
    FINER_LAYOUTS,
    FINER_PARTS,
    FINER_ROOM,
    FINER_TRIES,
)
from lepton_jax.planner.search.problem import Candidate, Problem


class Finer(NamedTuple):
    """A policy between two others, before it is traced.

    Attributes:
      assignment: with the policy "full".
      room: bytes that are left under it.
      share: bytes of a device over those of all, of what may be kept.
      seconds: of a step, about.
    """

    assignment: Assignment
    room: float
    share: float
    seconds: float


def finer(problem: Problem, ranked: Sequence[Candidate]) -> Candidate | None:
    """Return a plan that keeps as much as fits; None: it would gain too little.

    Args:
      problem: what is planned.
      ranked: candidates, best first.
    """
    best = ranked[0]
    is_pinned = problem.pins.remat is not None
    is_whole = best.assignment.remat == "none"
    if is_pinned or is_whole or not best.fits or problem.objective == "memory":
        return None

    values = [value for value in problem.trace.keepable() if value.bytes]
    if not values:
        return None
    offers = [
        offer
        for form in _layouts(problem, ranked)
        for parts in _micro_batches(problem, best.assignment, form)
        for offer in _between(problem, form, parts, values)
    ]
    offers.sort(key=lambda offer: offer.seconds)
    if not offers or offers[0].seconds > best.estimate.total * (1 - FINER_GAIN):
        return None
    return _traced(problem, offers[0], values)


def chosen(values: Sequence[Kept], room: float) -> Keeping:
    """Return which values are kept in some bytes, by what they save for a byte.

    Of those that save the same, small ones come first, which leaves the least room.
    What is left of it keeps values of one loop in its first turns.

    >>> from lepton_jax.planner.program.keeping import Kept
    >>> values = [Kept(0, 4, 60, 120.0, None), Kept(1, 4, 50, 90.0, None)]
    >>> values += [Kept(2, 4, 30, 60.0, None), Kept(3, 1, 10, 1.0, None)]
    >>> chosen(values, room=130)
    Keeping(always=(2, 0, 3), first=(1,), turns=2)
    """

    def dearness(value: Kept) -> tuple[float, int]:
        return -value.flops / value.bytes, value.bytes

    always = []
    others = []
    for value in sorted(values, key=dearness):
        if value.bytes <= room:
            always.append(value.key)
            room -= value.bytes
        else:
            others.append(value)
    if not others or not always:
        return Keeping(tuple(always))

    length = others[0].turns
    first = [value for value in others if value.turns == length]
    turns = int(length * room / sum(value.bytes for value in first))
    if not turns:
        return Keeping(tuple(always))
    return Keeping(tuple(always), tuple(value.key for value in first), turns)


# ---- internals ----


def _layouts(problem: Problem, ranked: Sequence[Candidate]) -> list[Assignment]:
    """Return the first layouts that differ, with masks of the policy "none"."""
    layouts: dict[Assignment, None] = {}
    for candidate in ranked:
        form = problem.untranslated(candidate.assignment)
        if candidate.fits:
            layouts[replace(form, remat="full", micro_batches=1)] = None
    return list(layouts)[:FINER_LAYOUTS]


def _micro_batches(
    problem: Problem,
    best: Assignment,
    form: Assignment,
) -> list[int]:
    """Return the numbers of micro-batches to look at."""
    if problem.pins.micro_batches or problem.whole:
        return [best.micro_batches]
    rows = rows_of_a_device(problem, form)
    # more micro-batches communicate more often
    return [
        parts for parts in powers(rows) if parts <= FINER_PARTS * best.micro_batches
    ]


def _between(
    problem: Problem,
    form: Assignment,
    parts: int,
    values: Sequence[Kept],
) -> Iterator[Finer]:
    """Yield the policy between "full", which fits, and one that keeps everything."""
    full = replace(form, remat="full", micro_batches=parts)
    dots = replace(form, remat="dots", micro_batches=parts)
    least = problem.bound(full)
    most = problem.bound(dots)
    room = problem.limit - least
    mild = [value for value in values if value.mild]
    is_enough = most <= problem.limit and len(mild) == len(values)
    if room <= 0 or most <= least or is_enough:
        return

    share = (most - least) / sum(value.bytes for value in mild)
    spared = _spared(values, chosen(values, room / share))
    fraction = spared / sum(value.flops for value in mild)
    slow = problem.cost("full").estimate(problem.translated(full)).total
    fast = problem.cost("dots").estimate(problem.translated(dots)).total
    yield Finer(full, room, share, slow - fraction * (slow - fast))


def _spared(values: Sequence[Kept], keeping: Keeping) -> float:
    """Return the FLOP that need not be computed again."""
    spared = 0.0
    for value in values:
        if value.key in keeping.always:
            spared += value.flops
        elif value.key in keeping.first:
            spared += value.flops * keeping.turns / value.turns
    return spared


def _traced(
    problem: Problem,
    offer: Finer,
    values: Sequence[Kept],
) -> Candidate | None:
    """Return an offer's candidate, with less kept where it proves to be too large."""
    room = offer.room
    for _ in range(FINER_TRIES):
        keeping = chosen(values, room / offer.share)
        if problem.trace.forms.stages.count > 1:
            # a pipeline's layers are one loop, and alike
            keeping = Keeping(keeping.always)
        if not keeping.keys:
            return None
        form = replace(offer.assignment, remat=str(keeping))
        candidate = problem.candidate(form)
        if candidate.fits:
            return candidate
        room *= FINER_ROOM
    return None

"""Rematerialization value by value, for the plans that come first.

The search knows three policies. Where the memory has room between two of them, a policy
in between keeps as much as fits: first what is dearest to compute again for its bytes,
which for products is the longest sum (Jain et al. 2020, "Checkmate", solve this exactly
for straight code; products of layers are few, and their prices stand far apart).

Where the hosts' memory is known, as much as copies beside the products can move is kept
there, if that gains more than it costs to read.

What a policy in between takes and saves is read off the two around it. One candidate is
then traced and predicted like all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.cost import Estimate
from lepton_jax.planner.estimate.offload import OUT_BESIDE
from lepton_jax.planner.program.keeping import ALL_ATTENTION, Keeping, Kept, Key
from lepton_jax.planner.search.finalists import powers, rows_of_a_device
from lepton_jax.planner.search.limits import (
    FINER_GAIN,
    FINER_LAYOUTS,
    FINER_PARTS,
    FINER_ROOM,
    FINER_TRIES,
    FINER_TURNS,
    OFFLOAD_BESIDE,
    OFFLOAD_GAIN,
    OFFLOAD_MEMORY,
)
from lepton_jax.planner.search.problem import Candidate, Problem


class Finer(NamedTuple):
    """A policy between two others, before it is traced.

    Attributes:
      assignment: with the policy "full".
      room: bytes that are left under it.
      host: bytes of all devices that they may keep in their hosts' memory.
      share: bytes of a device over those of all, of what may be kept.
      seconds: of a step, about.
    """

    assignment: Assignment
    room: float
    host: float
    share: float
    seconds: float

    @property
    def price(self) -> float:
        """Seconds by which offers are compared."""
        if not self.host:
            return self.seconds
        return self.seconds * (1 + OFFLOAD_GAIN)

    def keeping(self, values: Sequence[Kept], room: float) -> Keeping:
        """Return what is kept in some bytes of a device, and in its host's memory."""
        return chosen(values, room / self.share, self.host)


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
    offers.sort(key=lambda offer: offer.price)
    if not offers or offers[0].seconds > best.estimate.total * (1 - FINER_GAIN):
        return None
    return _traced(problem, offers[0], values)


def chosen(values: Sequence[Kept], room: float, host: float = 0.0) -> Keeping:
    """Return which values are kept in some bytes, by what they save for a byte.

    Of those that save the same, small ones come first, which leaves the least room.
    What does not fit is kept in the host's memory; what is left of the room keeps
    values of one loop in its first turns.

    Args:
      values: that may be kept.
      room: bytes of all devices.
      host: bytes of all hosts' memory.

    >>> from lepton_jax.planner.program.keeping import Kept
    >>> values = [Kept(0, 4, 60, 120.0, None), Kept(1, 4, 50, 90.0, None)]
    >>> values += [Kept(2, 4, 30, 60.0, None), Kept(3, 1, 10, 1.0, None)]
    >>> chosen(values, room=130)
    Keeping(always=(2, 0, 3), first=(1,), turns=2, host=())
    >>> chosen(values, room=100, host=50)
    Keeping(always=(2, 0, 3), first=(), turns=0, host=(1,))
    """

    def dearness(value: Kept) -> tuple[float, int]:
        return -value.flops / value.bytes, value.bytes

    always, others, room = _fitting(sorted(values, key=dearness), room)
    away, others, _ = _fitting(others, host, _may_be_away)
    keeping = Keeping(_keys(always), host=_keys(away))
    if not others or not always:
        return keeping

    length = others[0].turns
    first = [value for value in others if value.turns == length]
    size = sum(value.bytes for value in first)
    turns = int(length * room / size)
    if turns < max(1, FINER_TURNS * length):
        return keeping
    return keeping._replace(first=_keys(first), turns=turns)


# ---- internals ----


def _keys(values: Sequence[Kept]) -> tuple[Key, ...]:
    return tuple(value.key for value in values)


def _fitting(
    values: Sequence[Kept],
    room: float,
    may: Callable[[Kept], bool] = lambda value: True,
) -> tuple[list[Kept], list[Kept], float]:
    """Divide values into those that fit into some bytes, in their order, and others.

    Returns:
      Both, and the bytes that are left.
    """
    fit = []
    others = []
    for value in values:
        if value.bytes <= room and may(value):
            fit.append(value)
            room -= value.bytes
        else:
            others.append(value)
    return fit, others, room


def _may_be_away(value: Kept) -> bool:
    """Whether a value may be kept in the host's memory: one with a name."""
    return value.key != ALL_ATTENTION


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
    """Yield policies between "full", which fits, and one that keeps everything.

    The first keeps nothing on the hosts.
    """
    full = replace(form, remat="full", micro_batches=parts)
    dots = replace(form, remat="dots", micro_batches=parts)
    least = problem.bound(full)
    most = problem.bound(dots)
    room = problem.limit - least
    mild = [value for value in values if value.mild]
    is_enough = most <= problem.limit and len(mild) == len(values)
    if room <= 0 or most <= least or is_enough:
        return

    size = sum(value.bytes for value in mild)
    flops = sum(value.flops for value in mild)
    share = (most - least) / size
    slow = _estimate(problem, full)
    fast = _estimate(problem, dots)
    per_flop = (slow.total - fast.total) / flops
    computing = fast.total - fast.seconds["communication"]
    away = _host_room(problem, computing, parts)
    for host in sorted({0.0, away}):
        offer = Finer(full, room, host, share, slow.total)
        spared = _spared(values, offer.keeping(values, room))
        yield offer._replace(seconds=slow.total - spared * per_flop)


def _estimate(problem: Problem, form: Assignment) -> Estimate:
    translated = problem.translated(form)
    return problem.cost(form.remat).estimate(translated)


def _host_room(problem: Problem, computing: float, parts: int) -> float:
    """Return the bytes of a whole batch that devices may keep on their hosts.

    Args:
      problem: what is planned.
      computing: seconds of a step's products and memory traffic.
      parts: micro-batches, of which one is kept at a time.
    """
    chip = problem.topology.device
    if problem.trace.forms.stages.count > 1:
        return 0.0  # a pipeline's turns come too often
    moved = OFFLOAD_BESIDE * OUT_BESIDE * computing * chip.host_bandwidth
    kept = parts * OFFLOAD_MEMORY * chip.host_memory
    return problem.topology.devices * min(moved, kept)


def _spared(values: Sequence[Kept], keeping: Keeping) -> float:
    """Return the FLOP that need not be computed again."""
    everywhere = {*keeping.always, *keeping.host}
    spared = 0.0
    for value in values:
        if value.key in everywhere:
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
        keeping = offer.keeping(values, room)
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

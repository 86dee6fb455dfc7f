"""The end of the search: rematerialization, micro-batches, and the order of plans.

The descent compares assignments without rematerialization and in one piece. Here the
best of them become plans that can run: each gets the mildest rematerialization and the
fewest micro-batches that fit. Then they are ordered: by the objective, and among those
that are about as good the simplest comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace

from lepton_jax.hardware import across_slices
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.remat import POLICIES, place
from lepton_jax.planner.search.limits import (
    ALIKE,
    ALIKE_SECONDS,
    IDLE_WORK,
    LITTLE,
    MOST_WHOLE,
)
from lepton_jax.planner.search.masks import has, real_axes, sample_axes
from lepton_jax.planner.search.problem import Candidate, Problem

# ---- rematerialization and micro-batches ----


def finish(
    problem: Problem,
    assignment: Assignment,
) -> Iterator[Candidate]:
    """Yield a candidate for each rematerialization, mildest first.

    Each has the fewest micro-batches that fit, or those from which on more free little.
    """
    rows = rows_of_a_device(problem, assignment)
    asked = problem.pins.micro_batches
    options = [asked] if asked else powers(rows)
    if not options:
        return

    for remat in policies(problem):
        form = replace(assignment, remat=remat)
        parts = fewest(problem, form, options)
        final = replace(form, micro_batches=parts)
        candidate = problem.candidate(final)
        yield candidate
        if candidate.fits and parts == 1 and problem.objective != "memory":
            return


def rows_of_a_device(problem: Problem, assignment: Assignment) -> int:
    """Return the samples that micro-batches can divide on a device, 1 at the least.

    Args:
      problem: what is planned.
      assignment: its masks are in the order of the groups of the policy "none".
    """
    names = problem.names("none")
    if names.batch is None:
        return 1
    samples = sample_axes(assignment, names)
    rows = problem.trace.recipe.batch_size // assignment.counts[samples]
    stages = problem.trace.forms.stages
    if stages.count > 1:
        # those of a micro-batch in flight, which stages do not divide
        inside = assignment.counts[samples & ~problem.pins.stage_axes]
        part = problem.trace.recipe.batch_size // stages.parts
        rows = min(rows, part // inside)
    return max(1, rows)


def policies(problem: Problem) -> list[str]:
    """Return the rematerialization policies to try, mildest first."""
    pinned = problem.pins.remat
    return [pinned] if pinned else list(POLICIES)


def fewest(
    problem: Problem,
    assignment: Assignment,
    options: list[int],
) -> int:
    """Return the fewest micro-batches that fit.

    Where none do, these are the fewest from which on more free little.

    Args:
      problem: what is planned.
      assignment: its own micro-batches do not count.
      options: numbers of micro-batches, from few to many.
    """
    peaks: dict[int, int] = {}

    def peak(parts: int) -> int:
        if parts not in peaks:
            form = replace(assignment, micro_batches=parts)
            peaks[parts] = problem.bound(form)
        return peaks[parts]

    last = options[-1]
    for number, parts in enumerate(options):
        if peak(parts) <= problem.limit:
            return parts

        # the sums of the gradients come with the second micro-batch
        if number < 2:
            continue
        before = options[number - 1]
        freed = peaks[before] - peak(parts)
        is_little = freed < LITTLE * peak(parts)
        if is_little and peak(last) > problem.limit:
            break

    least = min(peaks.values())
    bound = least * (1 + LITTLE)
    return min(parts for parts, held in peaks.items() if held <= bound)


def powers(n: int) -> list[int]:
    """Return the powers of two that divide n, and n itself.

    >>> powers(24)
    [1, 2, 4, 8, 24]
    """
    divisors = [1]
    while n % (2 * divisors[-1]) == 0:
        divisors.append(2 * divisors[-1])
    if divisors[-1] != n:
        divisors.append(n)
    return divisors


def in_one_piece(
    problem: Problem,
    assignments: list[Assignment],
) -> Candidate | None:
    """Return the first plan without micro-batches that fits, leanest state first."""
    memory = problem.memory("none")
    lean = sorted(assignments, key=memory.state)
    for assignment in lean[:MOST_WHOLE]:
        for remat in policies(problem):
            if problem.patience.over():
                return None
            whole = replace(assignment, remat=remat, micro_batches=1)
            if problem.bound(whole) <= problem.limit:
                return problem.candidate(whole)
    return None


# ---- comparison ----


def order(
    problem: Problem,
    candidates: Iterable[Candidate],
) -> list[Candidate]:
    """Sort by the objective; among those that are alike, the simpler comes first.

    What may not fit stands behind, leanest first, and what does not fit last. Where
    micro-batches would change the model, candidates without them come first.
    """
    ranked = sorted(candidates, key=_rank)
    pool = [c for c in ranked if c.fits]
    if not pool:
        return ranked

    whole = [c for c in pool if c.assignment.micro_batches == 1]
    only_some = 0 < len(whole) < len(pool)
    if only_some and problem.whole:
        pool = whole

    def simplicity(candidate: Candidate) -> tuple:
        assignment = problem.untranslated(candidate.assignment)
        return complexity(problem, assignment), candidate.score

    slack = 0.0 if problem.objective == "memory" else ALIKE_SECONDS
    best = pool[0].score
    bound = best * (1 + ALIKE) + slack
    alike = [c for c in pool if c.score <= bound]
    alike.sort(key=simplicity)
    ahead = alike + [c for c in pool if c not in alike]
    return ahead + [c for c in ranked if c not in ahead]


def _rank(candidate: Candidate) -> tuple[int, float]:
    if candidate.fits:
        return 0, candidate.score
    behind = 1 if candidate.may_fit else 2
    return behind, candidate.bounds.most


def complexity(problem: Problem, assignment: Assignment) -> tuple:
    """Return what makes a plan harder to follow, the weightiest first."""
    samples = sample_axes(assignment, problem.names("none"))
    axes = real_axes(assignment.sizes)
    not_batch = [axis for axis in axes if not has(samples, axis)]
    split_groups = [mask for mask in assignment.masks if mask]
    across = across_slices(assignment.sizes, problem.topology)
    return (
        assignment.micro_batches,
        place(assignment.remat),
        # of several slices, the network between them had better only sum gradients
        assignment.keep & across,
        len(not_batch),
        len(axes),
        len(split_groups),
        assignment.keep,
    )


def idle(problem: Problem, assignment: Assignment) -> bool:
    """Whether devices compute the same as others, for a third of the work or more."""
    estimate = problem.cost("none").estimate(assignment)
    work = estimate.flops * math.prod(assignment.sizes)
    return work > IDLE_WORK * problem.least_flops(assignment)


def merged(assignment: Assignment) -> Assignment:
    """Join neighbouring mesh axes that split the same things.

    Here both axes split group 0 alone, so they are one axis of 8 devices:

    >>> one = merged(Assignment((4, 2), (0b11, 0b00), 0b00))
    >>> one.sizes, one.masks
    ((8,), (1, 0))
    """
    masks = (*assignment.masks, assignment.keep)
    for axis in range(len(assignment.sizes) - 1):
        left = [has(mask, axis) for mask in masks]
        right = [has(mask, axis + 1) for mask in masks]
        if left == right:
            return merged(_joined(assignment, axis))
    return assignment


def _joined(assignment: Assignment, axis: int) -> Assignment:
    """Return the assignment with a mesh axis and the next one as one."""
    sizes = list(assignment.sizes)
    sizes[axis] *= sizes.pop(axis + 1)
    masks = [_without(mask, axis + 1) for mask in assignment.masks]
    return replace(
        assignment,
        sizes=tuple(sizes),
        masks=tuple(masks),
        keep=_without(assignment.keep, axis + 1),
    )


def _without(mask: int, axis: int) -> int:
    """Return a mask without an axis; those above it have moved down by one."""
    low = (1 << axis) - 1
    return mask & low | mask >> 1 & ~low

"""The search: a greedy descent from what experts write, and the best of what it finds.

It decides the sizes of the mesh, the mesh axes that split each named axis, the axes
over which the state is kept in parts, rematerialization and micro-batches.

A worked example: a two-layer MLP on eight H200, on a mesh of one axis. Its named axes
are the 784 features of a sample, the 4096 samples, the 2048 hidden units and the 10
classes.

>>> import jax, optax
>>> import lepton_jax as lepton
>>> from lepton_jax.planner.search.pins import Pins
>>> recipe = lepton.Recipe(
...     model=lambda rngs: lepton.models.MLP((784, 2048, 10), rngs=rngs),
...     loss=lepton.losses.cross_entropy,
...     optimizer=optax.adam(1e-3),
...     batch_size=4096,
... )
>>> sample = jax.ShapeDtypeStruct((1, 784), "float32")
>>> label = jax.ShapeDtypeStruct((1,), "int32")
>>> trace = lepton.trace(recipe, sample, label)
>>> problem = Problem(trace, lepton.topology("h200:8"), "time", Pins())
>>> [(group.name, group.size) for group in problem.names("none").groups][1:3]
[('batch', 4096), ('layers/0/bias.0', 2048)]

One start leaves all devices idle. A turn flips one pair of a group and a mesh axis; it
is impossible where the extent does not divide, as 10 classes over 8 devices.

>>> start = Assignment(sizes=(8,), masks=(0, 0, 0, 0), keep=0)
>>> for turn in turns(problem, start.sizes):
...     neighbour = turned(problem, start, turn)
...     if neighbour is not None:
...         microseconds = 1e6 * problem.lightly(neighbour).score
...         print(neighbour.masks, neighbour.keep, f"{microseconds:.0f}")
(1, 0, 0, 0) 0 537
(0, 1, 0, 0) 0 253
(0, 0, 1, 0) 0 72
(0, 0, 0, 0) 1 130

The descent takes each turn that is better than what it has (here 174 microseconds with
nothing split), and goes on until no turn is. It ends with the hidden units split, which
is tensor parallelism: summing the gradients of 1.6 million weights over the devices
would take longer than the small matrices do.

>>> descend(problem, start).assignment.masks
(0, 0, 1, 0)

The search descends from each start on each mesh shape (`shapes.py`). The best few then
get the mildest rematerialization and the fewest micro-batches that fit, and are put in
order (`finalists.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.search.finalists import (
    complexity,
    finish,
    idle,
    in_one_piece,
    merged,
    order,
)
from lepton_jax.planner.search.finer import finer
from lepton_jax.planner.search.limits import (
    ALIKE,
    ALIKE_SECONDS,
    FINALISTS,
    LEAST_GAIN,
    MOST_GROUPS,
    MOST_PAIRED,
    SMALL_MESH,
)
from lepton_jax.planner.search.masks import (
    divides,
    nothing_split,
    real_axes,
    sample_axes,
)
from lepton_jax.planner.search.problem import Candidate, Problem, Scored
from lepton_jax.planner.search.shapes import meshes, sequences, starts


class Turn(NamedTuple):
    """A pair that the descent turns on or off.

    Attributes:
      group: number of a named axis; None: whether the axes keep the state in parts.
      axes: mask of mesh axes.
    """

    group: int | None
    axes: int


# one turn, or two that only help together
Move = tuple[Turn, ...]


# ---- the whole search ----


def search(problem: Problem) -> list[Candidate]:
    """Return the candidates, best first: those that fit before those that don't."""
    if problem.topology.devices == 1:
        alone = nothing_split((1,), problem.names("none"))
        return _refined(problem, finish(problem, alone))

    ranked = _ranked(problem, _explored(problem))
    candidates = _finished(problem, ranked[:FINALISTS])
    if _only_in_parts(candidates) and problem.whole:
        assignments = [scored.assignment for scored in ranked]
        whole = in_one_piece(problem, assignments)
        if whole is not None:
            candidates.append(whole)
    return _refined(problem, candidates)


def _explored(problem: Problem) -> list[Scored]:
    """Return the assignments that descents begin and end with, on each mesh shape."""
    best: dict[Assignment, Scored] = {}
    shapes = problem.pins.meshes or meshes(problem.topology)
    for number, sizes in enumerate(shapes):
        place = f"mesh shape {number + 1} of {len(shapes)}"
        problem.patience.detail = place + _best_so_far(best.values())
        for start in _beginnings(problem, sizes):
            # what experts write on the first shape is looked at in any case
            if number and problem.patience.over():
                break
            ends = (problem.lightly(start), descend(problem, start))
            for score, assignment in ends:
                if not problem.pins.meshes:
                    assignment = merged(assignment)
                before = best.get(assignment)
                if before is None or before.score > score:
                    best[assignment] = Scored(score, assignment)
    return list(best.values())


def _beginnings(
    problem: Problem,
    sizes: tuple[int, ...],
) -> list[Assignment]:
    """Return the starting points on one mesh shape, as far as the pins allow them."""
    names = problem.names("none")
    begins = list(starts(problem, sizes))
    if not begins:
        nothing = nothing_split(sizes, names)
        begins = [problem.pins.force(nothing, names)]

    allowed: list[Assignment] = []
    for start in begins:
        allowed += problem.roles.starts(start)
    return list(dict.fromkeys(allowed or begins))


def _ranked(
    problem: Problem,
    explored: list[Scored],
) -> list[Scored]:
    """Sort by light score, but with the simplest of those that are alike in front."""
    ranked = sorted(explored, key=lambda scored: scored.score)
    busy = [s for s in ranked if not idle(problem, s.assignment)]
    ranked = busy or ranked

    def simplicity(scored: Scored) -> tuple:
        return complexity(problem, scored.assignment), scored.score

    best = ranked[0].score
    bound = best * (1 + ALIKE) + ALIKE_SECONDS
    alike = [scored for scored in ranked if scored.score <= bound]
    alike.sort(key=simplicity)
    simplest = alike[: FINALISTS // 2]
    rest = [scored for scored in ranked if scored not in simplest]
    return [*simplest, *rest]


def _finished(
    problem: Problem,
    finalists: list[Scored],
) -> list[Candidate]:
    """Return the finalists' candidates, as many as there is time for."""
    patience = problem.patience
    finished: dict[Assignment, Candidate] = {}
    for number, scored in enumerate(finalists):
        fitting = [c for c in finished.values() if c.fits]
        seconds = [c.estimate.total for c in fitting]
        if seconds and patience.over():
            break

        best = f", best so far {min(seconds):.3g} s a step" if seconds else ""
        patience.detail = f"finalist {number + 1} of {len(finalists)}{best}"
        for candidate in finish(problem, scored.assignment):
            key = problem.untranslated(candidate.assignment)
            finished[key] = candidate
    return list(finished.values())


def _refined(
    problem: Problem,
    candidates: Iterable[Candidate],
) -> list[Candidate]:
    """Return the candidates in their order, with one that keeps as much as fits."""
    ranked = order(problem, candidates)
    if ranked and not problem.patience.over():
        problem.patience.detail = "looking what else may be kept"
        more = finer(problem, ranked)
        if more is not None:
            return order(problem, [*ranked, more])
    return ranked


def _only_in_parts(candidates: Iterable[Candidate]) -> bool:
    """Whether something fits, but only in micro-batches."""
    fitting = [c.assignment for c in candidates if c.fits]
    return bool(fitting) and all(a.micro_batches > 1 for a in fitting)


def _best_so_far(explored: Iterable[Scored]) -> str:
    best = min((scored.score for scored in explored), default=None)
    return "" if best is None else f", best so far about {best:.3g}"


# ---- the descent ----


def descend(problem: Problem, start: Assignment) -> Scored:
    """Return the assignment from which no further turn is better."""
    best = problem.lightly(start)
    moves = _moves(problem, start.sizes)
    improved = True
    while improved:
        improved = False
        for move in moves:
            if problem.patience.over():
                return best
            neighbour = _moved(problem, best.assignment, move)
            if neighbour is None or not problem.roles.allowed(neighbour):
                continue
            scored = problem.lightly(neighbour)
            if scored.score < best.score * (1 - LEAST_GAIN):
                best = scored
                improved = True
    return best


def _moves(
    problem: Problem,
    sizes: tuple[int, ...],
) -> list[Move]:
    """Return each turn, and on a small mesh also each pair of turns."""
    singles = turns(problem, sizes)
    is_small = problem.topology.devices <= SMALL_MESH
    moves: list[Move] = [(turn,) for turn in singles]
    if is_small and len(singles) <= MOST_PAIRED:
        moves += itertools.combinations(singles, 2)
    return moves


def _moved(
    problem: Problem,
    assignment: Assignment,
    move: Move,
) -> Assignment | None:
    for turn in move:
        changed = turned(problem, assignment, turn)
        if changed is None:
            return None
        assignment = changed
    return assignment


def turns(
    problem: Problem,
    sizes: tuple[int, ...],
) -> list[Turn]:
    """Return the pairs that may be turned on a mesh of these sizes.

    On a small mesh several mesh axes may turn at once.
    """
    flips = [1 << axis for axis in real_axes(sizes)]
    if problem.topology.devices <= SMALL_MESH:
        every = sum(flips)
        flips = [mask for mask in range(1, every + 1) if not mask & ~every]

    names = problem.names("none")
    groups: list[int | None] = []
    for k in considered(names):
        if names.groups[k].name not in problem.pins.groups:
            groups.append(k)
    groups.append(None)
    pairs = itertools.product(groups, flips)
    return [Turn(group, axes) for group, axes in pairs]


def turned(
    problem: Problem,
    assignment: Assignment,
    turn: Turn,
) -> Assignment | None:
    """Return the assignment with one pair turned.

    It is None where the extents do not divide, or where it would make no sense: the
    samples have the axis already wherever both are.
    """
    names = problem.names("none")
    k = turn.group
    if k is None:
        return replace(assignment, keep=assignment.keep ^ turn.axes)

    mask = assignment.masks[k] ^ turn.axes
    if not divides(names, k, assignment.counts[mask]):
        return None

    added = mask & turn.axes
    shared = problem.shared(names)
    is_batch = k == names.batch
    may_share = is_batch or k in shared
    if added & sample_axes(assignment, names) and not may_share:
        return None

    masks = list(assignment.masks)
    masks[k] = mask
    # where the batch gets an axis, groups that may not share it lose it
    if is_batch and added:
        for other, held in enumerate(masks):
            if other != k and other not in shared:
                masks[other] = held & ~added
    result = replace(assignment, masks=tuple(masks))
    return problem.pins.force(result, names)


def considered(names: Names) -> list[int]:
    """Return the groups worth splitting: the heaviest, the batch and sequences."""
    groups = list(range(len(names.groups)))[:MOST_GROUPS]
    if names.batch is not None:
        groups.append(names.batch)
    groups += sequences(names)
    return list(dict.fromkeys(groups))

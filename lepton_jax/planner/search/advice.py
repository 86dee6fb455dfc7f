"""Advice where nothing fits: the nearest change, tried before it is advised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment, axis_names, strategy
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.program.trace import trace as traced
from lepton_jax.planner.search.descent import (
    LITTLE,
    Candidate,
    Problem,
    fewest,
    powers,
    search,
)
from lepton_jax.planner.search.pins import Pins

# seconds of computing for each kind of change. Assumption: who is told that nothing
# fits waits for advice about as long as for a plan
ADVICE_SECONDS = 10.0
GUESSES = 4  # sizes that are guessed from the two around them; then the rest is halved
SOLID = 4  # assignments of the failed search that are tried on a smaller batch


def does_not_fit(
    problem: Problem, found: Sequence[Candidate], doublings: int
) -> PlanError:
    """What fills the memory, and the nearest change that fits.

    Args:
      problem: what was searched.
      found: its candidates, none of which fits.
      doublings: how many larger topologies are tried.
    """
    best = leanest(found)
    largest = sorted(
        best.bytes.items(),
        key=lambda x: -x[1],
    )
    fills = ", ".join(
        f"{kind} {size(n)}" for kind, n in largest if n > 0.02 * best.peak
    )
    a = best.assignment
    topology = problem.topology
    patience = problem.patience
    names = problem.names(a.remat)
    parts = f"{a.micro_batches} micro-batch{'es' if a.micro_batches > 1 else ''}"
    what = (
        f"nothing fits: the leanest plan ({strategy(a, axis_names(a, names), names)}, "
        f"remat {a.remat}, {parts}) holds {size(best.peak)} on each device of "
        f"{size(topology.device.memory)}: {fills}"
    )
    remedy = nearest_change(problem, found, doublings)
    if patience.cut:
        what += f"; the search stopped after {patience.limit:.0f} s of computing"
        remedy += ", or let it look for longer with time_limit (--time-limit)"
    return PlanError(what, where=f"plan for {topology.name}", remedy=remedy)


def leanest(found: Sequence[Candidate]) -> Candidate:
    """The simplest of the candidates that hold about the least.

    What many micro-batches or a stricter rematerialization free too little of is not
    worth naming.
    """
    least = min(c.peak for c in found)
    lean = [c for c in found if c.peak <= least * (1 + LITTLE)]
    policies = list(POLICIES)

    def simplicity(c: Candidate) -> tuple[int, int, int]:
        a = c.assignment
        return a.micro_batches, policies.index(a.remat), c.peak

    return min(lean, key=simplicity)


def nearest_change(
    problem: Problem,
    found: Sequence[Candidate],
    doublings: int,
) -> str:
    """Fewer samples, more rematerialization, or the smallest topology of the same chip
    that holds it.
    """
    changes = []
    pins = problem.pins
    trace = problem.trace
    best = leanest(found)
    if (
        pins.remat not in (None, "full")
        or pins.micro_batches is not None
        or pins.meshes
    ):
        free = unpinned(
            problem,
            problem.topology,
            problem.patience.limit,
        )
        if search(free)[0].fits:
            fixed = (
                ("the mesh", pins.meshes),
                ("remat", pins.remat),
                ("micro_batches", pins.micro_batches),
            )
            what = [word for word, on in fixed if on]
            return f"let the planner choose {' and '.join(what)}: then it fits"
    room = problem.limit - _state(best)
    if room > 0 and trace.recipe.batch_size > 1:
        fewer = fewer_samples(problem, found)
        changes += [f"a batch_size of {fewer}"] if fewer else []
    larger = larger_topology(problem, doublings)
    if larger:
        changes.append(f"{larger}, the smallest that holds it")
    smaller = "a smaller model, smaller samples" if room > 0 else "a smaller model"
    return "use " + ", or ".join(changes or [smaller, "chips with more memory"])


def _state(candidate: Candidate) -> int:
    """Bytes of a device that the batch has no part in."""
    kinds = ("params", "optimizer", "variables")
    return sum(candidate.bytes.get(kind, 0) for kind in kinds)


def unpinned(
    problem: Problem,
    topology: Topology,
    limit: float | None,
) -> Problem:
    """The same problem without pins, maybe elsewhere, with a clock of its own.

    What does not depend on either is shared.
    """
    clock = Patience("planning", limit)
    free = Problem(
        problem.trace,
        topology,
        problem.objective,
        Pins(),
        clock,
    )
    if not problem.pins.storage:
        free._names = problem._names
        free._sizes = problem._sizes
    return free


@dataclass
class Trial:
    """Tries smaller batches with the assignments of a search in which nothing fitted.

    Args:
      problem: that search's.
      assignments: some of its assignments, with masks of the policy "none", each with
        the rematerialization under which it holds the least.
    """

    problem: Problem
    assignments: list[Assignment]

    def smaller(self, rows: int) -> Problem:
        """The same problem with a batch of so many rows."""
        trace = self.problem.trace
        recipe = trace.recipe.with_(batch_size=rows)
        less = traced(
            recipe,
            trace.inputs,
            trace.targets,
            trace.samples,
        )
        clock = Patience("planning", self.problem.patience.limit)
        whole = self.problem
        return Problem(
            less,
            whole.topology,
            whole.objective,
            whole.pins,
            clock,
        )

    def peak(self, rows: int) -> float:
        """Bytes of the leanest plan for so many rows, or of the first that fits."""
        less = self.smaller(rows)
        least = math.inf
        for assignment in self.assignments:
            moved = self._moved(assignment, less)
            if moved is None:
                continue
            batch = less.names("none").batch
            split = 1 if batch is None else moved.counts[moved.masks[batch]]
            asked = less.pins.micro_batches
            options = [asked] if asked else powers(rows // split)
            parts = fewest(less, moved, options)
            least = min(
                least,
                less.peak(
                    replace(
                        moved,
                        micro_batches=parts,
                    )
                ),
            )
            if least <= less.limit:
                return least
        return least

    def fits(self, rows: int) -> bool:
        """Whether a whole search finds a plan for so many rows."""
        return search(self.smaller(rows))[0].fits

    def _moved(
        self,
        assignment: Assignment,
        less: Problem,
    ) -> Assignment | None:
        """An assignment for the smaller batch; None where that does not divide.

        A batch that does not divide is not split.
        """
        groups = self.problem.names("none").groups
        by_name = dict(
            zip(
                (g.name for g in groups),
                assignment.masks,
                strict=True,
            )
        )
        names = less.names("none")
        counts = assignment.counts
        masks = []
        for number, group in enumerate(names.groups):
            mask = by_name.get(group.name, 0)
            if group.divisor % counts[mask]:
                if number != names.batch:
                    return None
                mask = 0
            masks.append(mask)
        return replace(assignment, masks=tuple(masks))


def fewer_samples(problem: Problem, found: Sequence[Candidate]) -> int | None:
    """The largest batch size that fits, as far as `ADVICE_SECONDS` reach; None: none
    does.

    Multiples of the number of devices come first, then of those that the leanest plan
    splits the batch over, since any other size leaves devices idle. Memory grows with
    the rows nearly in a straight line, so few sizes are traced: each is guessed from
    the two around it.
    """
    total = problem.trace.recipe.batch_size
    batch = problem.names("none").batch
    solid: dict[tuple, Candidate] = {}
    for candidate in sorted(found, key=lambda c: c.peak):
        a = problem.untranslated(candidate.assignment)
        solid.setdefault((a.sizes, a.masks, a.keep), candidate)
    chosen = list(solid.values())[:SOLID]
    assignments = [problem.untranslated(c.assignment) for c in chosen]
    first = assignments[0]
    split = 1 if batch is None else first.counts[first.masks[batch]]
    parts = problem.pins.micro_batches or 1
    trial = Trial(problem, assignments)

    patience = Patience("planning", ADVICE_SECONDS)
    for count in dict.fromkeys([problem.topology.devices, split, 1]):
        fits = _largest(
            trial,
            count * parts,
            total,
            chosen[0],
            patience,
        )
        if fits:
            return fits
    return None


def _largest(
    trial: Trial,
    step: int,
    total: int,
    failed: Candidate,
    patience: Patience,
) -> int | None:
    """The largest multiple of a step below `total` that fits.

    Args:
      trial: tries a size.
      step: rows.
      total: rows that are too many.
      failed: the leanest plan for them.
      patience: how long to look.
    """
    limit = trial.problem.limit
    # in steps: what fits, and its bytes
    low = 0
    below = float(_state(failed))
    # what doesn't
    high = -(-total // step)
    above = float(failed.peak)
    tried = 0
    while high - low > 1 and not patience.over():
        trial.problem.patience.detail = (
            f"nothing fits; trying batches of {low * step:,} to {high * step:,}"
        )
        share = (limit - below) / max(above - below, 1.0)
        guess = low + math.floor(share * (high - low))
        if tried >= GUESSES:  # the line is bent
            guess = (low + high) // 2
        middle = min(max(guess, low + 1), high - 1)
        held = trial.peak(middle * step)
        tried += 1
        if held <= limit:
            low = middle
            below = held
        else:
            high = middle
            above = held
    while low > 0 and not trial.fits(low * step):
        low //= 2
    if low == 0:
        return None

    # a whole search may find what is leaner than the assignments that were tried
    stride = 1
    growing = True
    most = -(-total // step)
    while stride > 0 and not patience.over():
        if low + stride < most and trial.fits((low + stride) * step):
            low += stride
            stride *= 2 if growing else 1
        else:
            growing = False
            stride //= 2
    return low * step


def larger_topology(problem: Problem, doublings: int) -> str | None:
    """The smallest topology of the same chip, in doublings, that something fits on."""
    shape = list(problem.topology.shape)
    least = sum(state for pair in problem.memory("none").each for state in pair)
    patience = Patience("planning", ADVICE_SECONDS)
    for _ in range(doublings):
        dim = shape.index(min(shape))
        shape[dim] *= 2
        topology = replace(problem.topology, shape=tuple(shape))
        if least / topology.devices > topology.device.memory:
            continue  # not even the state, evenly split
        if patience.over():
            return None
        problem.patience.detail = f"trying {topology.name}"
        try:
            if search(unpinned(problem, topology, ADVICE_SECONDS))[0].fits:
                return topology.name
        except PlanError:
            continue
    return None

"""The search: mesh shapes x assignments of mesh axes to named axes x rematerialization
x micro-batches, for an objective.

For each mesh shape a greedy descent runs from a few starting points that stand for what
experts write by hand; each turns the assignment of one mesh axis to one named axis on
or off while that helps. The best of them all then get the mildest rematerialization and
the fewest micro-batches that fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from lepton_jax.hardware import Topology
from lepton_jax.planner.assignment import Assignment, expert_groups
from lepton_jax.planner.estimate.cost import Cost, Estimate, optimizer_bytes
from lepton_jax.planner.estimate.feeding import residence, slow_loops, steps_per_call
from lepton_jax.planner.estimate.memory import Timeline, predict
from lepton_jax.planner.estimate.sizes import Sizes
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.program.micro_batches import MicroBatches
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.remat import POLICIES
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.search.pins import Pins
from lepton_jax.planner.search.roles import Roles

OBJECTIVES = ("time", "memory", "cost")
# of a device's memory may be planned for: predictions err by some percent
MARGIN = 0.92
# of convolutions on TPUs they fall short by up to 30 % (bench.py planner-memory)
MARGIN_CONVOLVING = 0.7
# plans that differ by less in the objective are equally good, and so are those that
# differ by less than
ALIKE = 0.005
# what dispatching a call costs the host: the simplest of them is taken
ALIKE_SECONDS = 1e-4
MOST_GROUPS = 10
MOST_MESHES = 18
FINALISTS = 8
MOST_PAIRED = 20  # turns up to which two at a time are tried, too
# Twice as many micro-batches that free less than this share of the peak free little:
# what they could free at the most halves each time
LITTLE = 0.01
MOST_WHOLE = 16  # leaner assignments that are tried in one piece, where samples meet
# devices up to which it is worth looking for what no expert would write
SMALL_MESH = 16


@dataclass(frozen=True)
class Candidate:
    """An assignment with its prediction; `score` is what the objective minimizes."""

    assignment: Assignment
    estimate: Estimate
    peak: int
    bytes: dict[str, int]
    fits: bool
    score: float


class Memory:
    """What an assignment holds on a device, for one rematerialization policy."""

    def __init__(
        self,
        trace: Trace,
        names: Names,
        topology: Topology,
        sizes: Sizes,
    ):
        self.trace = trace
        self.names = names
        self.topology = topology
        self.sizes = sizes
        self._timeline = Timeline(names.graph, topology.platform)
        self.each = optimizer_bytes(trace, names)
        self._straight = slow_loops(trace, topology)
        self._steps = steps_per_call(trace, topology)[0]
        self._data = residence(trace, topology)[0]

    def predict(self, assignment: Assignment) -> dict[str, int]:
        # micro-batches in straight code: XLA keeps what each of them needs at once
        if self._straight:
            assignment = replace(assignment, micro_batches=1)
        return predict(
            self.trace,
            self.names,
            assignment,
            self.topology,
            timeline=self._timeline,
            sizes=self.sizes,
            steps_per_call=self._steps,
            data=self._data,
        )[0]

    def state(self, assignment: Assignment) -> float:
        """Bytes of parameters, their gradients and the optimizer's state."""
        total = 0.0
        counts = assignment.counts
        for spec, (own, more) in zip(
            self.names.storage(
                list(assignment.masks),
                assignment.keep,
                counts,
            ),
            self.each,
            strict=True,
        ):
            mask = 0
            for m in spec:
                mask |= m
            total += (2 * own + more) / counts[mask]
        return total


@dataclass
class Problem:
    """A traced recipe on a topology, with what costs and memory need of it, by
    rematerialization policy.
    """

    trace: Trace
    topology: Topology
    objective: str
    pins: Pins
    patience: Patience = field(default_factory=lambda: Patience("planning"))
    _lightly: dict[Assignment, float] = field(default_factory=dict)
    _names: dict[str, Names] = field(default_factory=dict)
    _sizes: dict[str, Sizes] = field(default_factory=dict)
    _costs: dict[str, Cost] = field(default_factory=dict)
    _memories: dict[str, Memory] = field(default_factory=dict)
    _shared: set[int] | None = None
    _roles: Roles | None = None
    _batches: MicroBatches | None = None
    _flops: float | None = None

    def names(self, remat: str) -> Names:
        if remat not in self._names:
            before = self.patience.detail
            self.patience.detail = f"tracing the gradient, remat {remat}"
            self._names[remat] = Names(
                self.trace.gradient(remat),
                self.trace.arguments,
                self.pins.storage,
            )
            self.patience.detail = before
        return self._names[remat]

    def sizes(self, remat: str) -> Sizes:
        if remat not in self._sizes:
            self._sizes[remat] = Sizes(self.names(remat).graph, self.names(remat))
        return self._sizes[remat]

    def cost(self, remat: str) -> Cost:
        if remat not in self._costs:
            self._costs[remat] = Cost(
                self.trace,
                self.names(remat),
                self.topology,
                self.sizes(remat),
            )
        return self._costs[remat]

    def memory(self, remat: str) -> Memory:
        if remat not in self._memories:
            self._memories[remat] = Memory(
                self.trace,
                self.names(remat),
                self.topology,
                self.sizes(remat),
            )
        return self._memories[remat]

    def shared(self, names: Names) -> set[int]:
        """Groups that may share a mesh axis with the samples: experts, and rows that
        are looked up.
        """
        if self._shared is None:
            self._shared = expert_groups(names) | names.rows
        return self._shared

    @property
    def roles(self) -> Roles:
        """Roles that the names of a pinned mesh's axes allow."""
        if self._roles is None:
            self._roles = Roles(self.names("none"), self.pins)
        return self._roles

    @property
    def batches(self) -> MicroBatches:
        """Changes that micro-batches would make to the model."""
        if self._batches is None:
            self.patience.detail = "looking where samples meet"
            self._batches = MicroBatches(self.trace)
        return self._batches

    @property
    def whole(self) -> bool:
        """Whether a batch should stay in one piece, since nobody asked for several."""
        return self.pins.micro_batches is None and self.batches.change

    def lightly(self, assignment: Assignment) -> tuple[float, Assignment]:
        """The time of an assignment, made worse by how much of the state would not
        fit.
        """
        if assignment not in self._lightly:
            self._lightly[assignment] = self._light(assignment)
        return self._lightly[assignment], assignment

    def _light(self, assignment: Assignment) -> float:
        seconds = self.cost("none").estimate(assignment).total
        held = self.memory("none").state(assignment)
        score = held if self.objective == "memory" else seconds
        return (
            score * (1 + 10 * max(0.0, held / self.limit - 0.9))
            + 1e-9 * held / self.limit
        )

    def least_flops(self, a: Assignment) -> float:
        """FLOP of a step on one device, all of it."""
        if self._flops is None:
            self._flops = (
                self.cost("none")
                .estimate(
                    replace(
                        a,
                        masks=(0,) * len(a.masks),
                        keep=0,
                    )
                )
                .flops
            )
        return self._flops

    @property
    def limit(self) -> float:
        convolves = (
            self.topology.platform == "tpu"
            and "conv_general_dilated" in self.trace.operations
        )
        return self.topology.device.memory * (
            MARGIN_CONVOLVING if convolves else MARGIN
        )

    def candidate(self, assignment: Assignment) -> Candidate:
        """Both predictions of an assignment whose masks are those of the policy
        "none".
        """
        assignment = self.translated(assignment)
        estimate = self.cost(assignment.remat).estimate(assignment)
        held = self.memory(assignment.remat).predict(assignment)
        peak = sum(held.values())
        score = float(peak) if self.objective == "memory" else estimate.total
        return Candidate(
            assignment,
            estimate,
            peak,
            held,
            peak <= self.limit,
            score,
        )

    def peak(self, assignment: Assignment) -> int:
        """Bytes that an assignment whose masks are those of "none" holds at the
        most.
        """
        assignment = self.translated(assignment)
        return sum(self.memory(assignment.remat).predict(assignment).values())

    def translated(self, assignment: Assignment) -> Assignment:
        """Masks in the order of the groups of the assignment's own policy."""
        if assignment.remat == "none":
            return assignment
        by_name = dict(
            zip(
                (g.name for g in self.names("none").groups),
                assignment.masks,
                strict=True,
            )
        )
        return replace(
            assignment,
            masks=tuple(
                by_name.get(g.name, 0) for g in self.names(assignment.remat).groups
            ),
        )

    def untranslated(self, assignment: Assignment) -> Assignment:
        if assignment.remat == "none":
            return assignment
        by_name = dict(
            zip(
                (g.name for g in self.names(assignment.remat).groups),
                assignment.masks,
                strict=True,
            )
        )
        return replace(
            assignment,
            masks=tuple(by_name.get(g.name, 0) for g in self.names("none").groups),
        )


def search(problem: Problem) -> list[Candidate]:
    """Candidates, best first: those that fit before those that don't."""
    if problem.topology.devices == 1:
        return order(
            problem,
            finish(
                problem,
                Assignment(
                    (1,),
                    (0,) * len(problem.names("none").groups),
                    0,
                ),
            ),
        )
    found: dict[tuple, tuple[float, Assignment]] = {}
    names = problem.names("none")
    patience = problem.patience
    shapes = problem.pins.meshes or meshes(problem.topology, names)
    for number, sizes in enumerate(shapes):
        patience.detail = _looked_at(number, len(shapes), found)
        nothing = problem.pins.force(
            Assignment(sizes, (0,) * len(names.groups), 0), names
        )
        begins = [*starts(problem, sizes)] or [nothing]
        begins = [
            ok for start in begins for ok in problem.roles.starts(start)
        ] or begins
        for start in dict.fromkeys(begins):
            # what experts write is looked at in any case
            if number and patience.over():
                break
            for score, a in (problem.lightly(start), descend(problem, start)):
                a = a if problem.pins.meshes else merged(a)
                key = (a.sizes, a.masks, a.keep)
                if key not in found or found[key][0] > score:
                    found[key] = (score, a)
    ranked = sorted(
        found.values(),
        key=lambda f: f[0],
    )
    ranked = [f for f in ranked if not idle(problem, f[1])] or ranked
    alike = [f for f in ranked if f[0] <= ranked[0][0] * (1 + ALIKE) + ALIKE_SECONDS]
    alike.sort(key=lambda f: (_complexity(problem, f[1]), f[0]))
    ranked = [
        *alike[: FINALISTS // 2],
        *(f for f in ranked if f not in alike[: FINALISTS // 2]),
    ]
    finished: dict[tuple, Candidate] = {}
    for number, (_, a) in enumerate(ranked[:FINALISTS]):
        fits = [c.estimate.total for c in finished.values() if c.fits]
        if fits and patience.over():
            break
        done = f", best so far {min(fits):.3g} s a step" if fits else ""
        patience.detail = f"finalist {number + 1} of {len(ranked[:FINALISTS])}{done}"
        for final in finish(problem, a):
            a = problem.untranslated(final.assignment)
            finished[a.sizes, a.masks, a.keep, a.remat, a.micro_batches] = final
    if _cut_up(finished.values()) and problem.whole:
        whole = in_one_piece(problem, [a for _, a in ranked])
        if whole is not None:
            finished[()] = whole
    return order(problem, finished.values())


def _cut_up(candidates: Iterable[Candidate]) -> bool:
    """Whether something fits, but only in micro-batches."""
    fits = [c.assignment.micro_batches for c in candidates if c.fits]
    return bool(fits) and min(fits) > 1


def in_one_piece(problem: Problem, assignments: list[Assignment]) -> Candidate | None:
    """The first plan without micro-batches that fits, the leanest state first."""
    memory = problem.memory("none")
    lean = sorted(assignments, key=memory.state)[:MOST_WHOLE]
    for assignment in lean:
        for remat in [problem.pins.remat] if problem.pins.remat else POLICIES:
            if problem.patience.over():
                return None
            whole = replace(assignment, remat=remat, micro_batches=1)
            if problem.peak(whole) <= problem.limit:
                return problem.candidate(whole)
    return None


def _looked_at(
    number: int,
    count: int,
    found: dict,
) -> str:
    """Progress of a search, for the person who waits."""
    best = min(
        (score for score, _ in found.values()),
        default=None,
    )
    told = "" if best is None else f", best so far about {best:.3g}"
    return f"mesh shape {number + 1} of {count}{told}"


def idle(problem: Problem, a: Assignment) -> bool:
    """Whether devices compute the same as others, for a third of the work or more."""
    estimate = problem.cost("none").estimate(a)
    return estimate.flops * math.prod(a.sizes) > 1.5 * problem.least_flops(a)


def merged(a: Assignment) -> Assignment:
    """Neighbouring mesh axes that split the same things as one."""
    for bit in range(len(a.sizes) - 1):
        roles = [tuple(m >> b & 1 for m in (*a.masks, a.keep)) for b in (bit, bit + 1)]
        if roles[0] == roles[1]:
            sizes = (
                *a.sizes[:bit],
                a.sizes[bit] * a.sizes[bit + 1],
                *a.sizes[bit + 2 :],
            )
            return merged(
                replace(
                    a,
                    sizes=sizes,
                    masks=tuple(_without(m, bit + 1) for m in a.masks),
                    keep=_without(a.keep, bit + 1),
                )
            )
    return a


def _without(mask: int, bit: int) -> int:
    """A mask whose bits from `bit` on have moved down by one."""
    low = (1 << bit) - 1
    return mask & low | mask >> 1 & ~low


def order(problem: Problem, candidates: Iterable[Candidate]) -> list[Candidate]:
    """By the objective; among those that are alike, the simpler first.

    Where micro-batches would change the model, those without come first.
    """
    rest = sorted(
        candidates,
        key=lambda c: (not c.fits, c.score if c.fits else c.peak),
    )
    pool = [c for c in rest if c.fits]
    whole = [c for c in pool if c.assignment.micro_batches == 1]
    if 0 < len(whole) < len(pool) and problem.whole:
        pool = whole
    if not pool:
        return rest

    slack = 0.0 if problem.objective == "memory" else ALIKE_SECONDS
    alike = [c for c in pool if c.score <= pool[0].score * (1 + ALIKE) + slack]
    alike.sort(
        key=lambda c: (
            _complexity(problem, problem.untranslated(c.assignment)),
            c.score,
        )
    )
    first = [*alike, *(c for c in pool if c not in alike)]
    return [*first, *(c for c in rest if c not in first)]


def _complexity(problem: Problem, a: Assignment) -> tuple:
    """What makes a plan harder to follow, the weightiest first."""
    names = problem.names("none")
    policies = list(POLICIES)
    batch = 0 if names.batch is None else a.masks[names.batch]
    beside = sum(n > 1 and not batch >> bit & 1 for bit, n in enumerate(a.sizes))
    return (
        a.micro_batches,
        policies.index(a.remat),
        beside,
        sum(n > 1 for n in a.sizes),
        sum(m != 0 for m in a.masks),
        a.keep,
    )


def meshes(topology: Topology, names: Names) -> list[tuple[int, ...]]:
    """Factorizations of the number of devices into at most three axes, the likelier
    first.
    """
    n = topology.devices
    pairs = [(n // k, k) for k in _divisors(n) if 1 < k < n]
    triples = [
        (a, b, c)
        for a, rest in [(n // k, k) for k in _divisors(n) if 1 < k < n]
        for b, c in [(rest // k, k) for k in _divisors(rest) if 1 < k < rest]
        if a >= b >= c and c <= 16
    ]
    triples.sort(key=lambda t: (abs(math.log2(t[2]) - 2), -t[0]))
    return [(n,), *pairs[:12], *triples][:MOST_MESHES] if n > 1 else [(1,)]


def powers(n: int) -> list[int]:
    """Powers of two that divide n, and n itself."""
    found = [1]
    while n % (2 * found[-1]) == 0:
        found.append(2 * found[-1])
    return found if found[-1] == n else [*found, n]


def _divisors(n: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return small + [n // k for k in reversed(small) if k * k != n]


def starts(problem: Problem, sizes: tuple[int, ...]) -> Iterator[Assignment]:
    """Data parallelism, FSDP, both with an axis left for others, experts, sequences,
    rows of embeddings.
    """
    names = problem.names("none")
    count = len(sizes)
    every = (1 << count) - 1
    last = 1 << (count - 1)
    batch = names.batch

    def start(masks: dict[int, int], keep: int) -> list[Assignment]:
        if any(
            names.groups[k].divisor
            % math.prod(n for i, n in enumerate(sizes) if m >> i & 1)
            for k, m in masks.items()
        ):
            return []
        full = tuple(masks.get(k, 0) for k in range(len(names.groups)))
        return [problem.pins.force(Assignment(sizes, full, keep), names)]

    if batch is None:
        yield from start({}, every)
        yield from start({}, 0)
        return
    experts = expert_groups(names)
    rows = names.rows
    later = sequences(names)
    if count == 1 or problem.pins.meshes:
        yield from start({batch: every}, 0)
        yield from start({batch: every}, every)
        if rows:
            yield from start({batch: every, **dict.fromkeys(rows, every)}, 0)
    if count == 1:
        yield from start({}, 0)
        for k in later:
            yield from start({k: every}, every)
    else:
        yield from start({batch: every & ~last}, every & ~last)
        for k in later:
            yield from start({batch: every & ~last, k: last}, every)
        yield from start({batch: every}, last)
        if problem.topology.devices <= SMALL_MESH:
            yield from start({}, 0)
            yield from start({batch: last}, 0)
    if count == 3:
        yield from start({batch: 1}, 1)
    for k in experts:
        yield from start({batch: every, k: last}, every & ~last)
        if count > 1:
            yield from start({batch: every & ~last, k: last}, every & ~last)


def sequences(names: Names) -> list[int]:
    """Groups of inputs' later dims that no parameter has."""
    return [
        k
        for k, g in enumerate(names.groups)
        if k != names.batch
        and all(
            names.paths[i].startswith(("inputs", "targets")) and d > 0
            for i, d in g.members
        )
    ]


def descend(problem: Problem, start: Assignment) -> tuple[float, Assignment]:
    """The best assignment reached by turning one (named axis, mesh axis) pair on or off
    at a time.
    """
    names = problem.names("none")
    best = problem.lightly(start)
    one = turns(problem, names, start.sizes)
    moves: list[tuple] = [(turn,) for turn in one]
    if problem.topology.devices <= SMALL_MESH and len(one) <= MOST_PAIRED:
        moves += itertools.combinations(one, 2)
    improved = True
    while improved:
        improved = False
        for move in moves:
            if problem.patience.over():
                return best
            neighbour: Assignment | None = best[1]
            for k, flip in move:
                neighbour = neighbour and turned(
                    problem,
                    names,
                    neighbour,
                    k,
                    flip,
                )
            if neighbour is not None and problem.roles.allowed(neighbour):
                there = problem.lightly(neighbour)
                if there[0] < best[0] * (1 - 1e-6):
                    best = there
                    improved = True
    return best


def turns(
    problem: Problem,
    names: Names,
    sizes: tuple[int, ...],
) -> list[tuple[int | None, int]]:
    """(group, mesh axes) pairs that may be turned; group None: whether the axes keep
    the state in parts.
    """
    bits = [1 << i for i, n in enumerate(sizes) if n > 1]
    if problem.topology.devices <= SMALL_MESH:
        bits = [
            mask
            for mask in range(1, 1 << len(sizes))
            if all(1 << i in bits for i in range(len(sizes)) if mask >> i & 1)
        ]
    free = [
        k for k in considered(names) if names.groups[k].name not in problem.pins.groups
    ]
    return [(k, flip) for k in (*free, None) for flip in bits]


def turned(
    problem: Problem,
    names: Names,
    a: Assignment,
    k: int | None,
    flip: int,
) -> Assignment | None:
    """The assignment with one pair turned; None where that is impossible or
    senseless.
    """
    if k is None:
        return replace(a, keep=a.keep ^ flip)
    mask = a.masks[k] ^ flip
    if names.groups[k].divisor % a.counts[mask]:
        return None
    shared = problem.shared(names)
    more = mask & flip
    if (
        k != names.batch
        and names.batch is not None
        and more & a.masks[names.batch]
        and k not in shared
    ):
        return None  # samples have the axis already wherever both are
    masks = list(a.masks)
    masks[k] = mask
    if k == names.batch and more:
        masks = [m if j == k or j in shared else m & ~more for j, m in enumerate(masks)]
    return problem.pins.force(replace(a, masks=tuple(masks)), names)


def considered(names: Names) -> list[int]:
    """The groups worth splitting: the heaviest, the batch and sequences."""
    return list(
        dict.fromkeys(
            [
                *range(min(len(names.groups), MOST_GROUPS)),
                *([] if names.batch is None else [names.batch]),
                *sequences(names),
            ]
        )
    )


def finish(problem: Problem, assignment: Assignment) -> Iterator[Candidate]:
    """For each rematerialization the fewest micro-batches that fit, or from which on
    more free little.
    """
    names = problem.names("none")
    batch = names.batch
    rows = 1
    if batch is not None:
        rows = (
            problem.trace.recipe.batch_size
            // assignment.counts[assignment.masks[batch]]
        )
    asked = problem.pins.micro_batches
    for remat in [problem.pins.remat] if problem.pins.remat else POLICIES:
        options = [asked] if asked else powers(rows)
        if not options:
            continue
        parts = fewest(
            problem,
            replace(assignment, remat=remat),
            options,
        )
        final = problem.candidate(
            replace(
                assignment,
                remat=remat,
                micro_batches=parts,
            )
        )
        yield final
        if final.fits and parts == 1 and problem.objective != "memory":
            return


def fewest(
    problem: Problem,
    assignment: Assignment,
    options: list[int],
) -> int:
    """The fewest micro-batches that fit; where none do, those from which on more free
    little.

    Args:
      problem, assignment: what is planned; its own micro-batches do not count.
      options: numbers of micro-batches, from few to many.
    """
    peaks: dict[int, int] = {}

    def peak(parts: int) -> int:
        if parts not in peaks:
            peaks[parts] = problem.peak(replace(assignment, micro_batches=parts))
        return peaks[parts]

    last = options[-1]
    for number, parts in enumerate(options):
        if peak(parts) <= problem.limit:
            return parts
        # the sums of the gradients come with the second micro-batch
        freed = peaks[options[number - 1]] - peak(parts) if number > 1 else math.inf
        if freed < LITTLE * peak(parts) and peak(last) > problem.limit:
            break
    least = min(peaks.values())
    return next(n for n in options if n in peaks and peaks[n] <= least * (1 + LITTLE))

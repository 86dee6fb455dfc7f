"""Seconds of a step under an assignment, from cited figures of the chips alone.

A cost is the sum of four kinds of seconds on one device: matmuls, memory traffic,
communication that shows, and the optimizer's update. Take one layer, x[1024, 512] @
w[512, 256], on eight devices:

1. The work is a list of jobs: the product, its two products in the backward pass, and
   the gather of w where it is stored split. Jobs that are alike, such as those of equal
   layers outside of loops, are one job with a count.
2. `Layout.decide` says how the assignment splits each job and which collectives it
   needs. If the eight devices split the batch, a device multiplies [128, 512] by
   [512, 256] (`matmul_seconds`). The gradient of w is then a partial sum on each
   device, so an all-reduce of 512 * 256 numbers follows. If w is stored split as well,
   it is a reduce-scatter, and w is gathered before it is used.
3. Collectives of one kind over the same axes are joined into one within a loop's body
   or outside of loops, as XLA does, so that their latency counts once. `Link.seconds`
   gives the seconds of each.
4. Gathers of parameters and reductions of gradients run while the device computes
   (XLA's latency-hiding scheduler on TPU and GPU): only `HIDDEN_SHARE` of them shows,
   or what is longer than the computing. What moves activations waits for them and is
   waited for. On a CPU nothing overlaps, and all-gathers are not joined.
5. Elementwise operations read and write each value once per fused group (`traffic`).
   The update reads and writes the parameters and the optimizer's state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.compat import source_line
from lepton_jax.hardware import (
    Link,
    Topology,
    convolution_flops,
    join,
    lay,
    matmul_seconds,
)
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.sizes import Sizes
from lepton_jax.planner.program.graph import (
    BARRIER,
    Block,
    Graph,
    Operation,
    Value,
)
from lepton_jax.planner.program.layout import (
    Contraction,
    Decision,
    Index,
    Layout,
    Move,
    contraction,
    meets_stored,
)
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.rules import ELEMENTWISE, REDUCTIONS
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.xla.figures import HIDDEN_SHARE
from lepton_jax.planner.xla.operations import DOTS, FREE
from lepton_jax.trees import by_path, nbytes

# Operations that a fused group of elementwise operations may hold.
FUSIBLE = {
    *ELEMENTWISE,
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "concatenate",
    "split",
    "slice",
    "pad",
    "rev",
} - {BARRIER}

# Chips of a square torus from which on libtpu of jax 0.10 and 0.12 replaces collectives
# over the whole of it; found by compiling for v5e:4x4, v5e:8x8 and v5p:4x4x4.
WHOLE_TORUS = 64


@dataclass
class Job:
    """Operations that are alike, as one piece of work.

    Attributes:
      op: the first of them.
      product: its indices, if it is a contraction.
      count: how often a step runs it, micro-batches apart.
      groups: named axes that decide how it is split.
      loop: number of the loop in whose body it stands; 0 outside of loops.
      share: less than 1 for a term of a sum, since XLA reduces the sum over the
        devices and not each term.
      gather: the value of a job that only gathers a stored value.
      taps: share of a convolution's taps that meet an element of its input.
    """

    op: Operation
    product: Contraction | None
    count: int
    groups: tuple[int, ...]
    loop: int
    share: float
    gather: Value | None = None
    taps: float = 1.0


class Collective(NamedTuple):
    """A collective of a job, as XLA compiles it.

    Attributes:
      kind: such as "all-reduce".
      axes: mask of the mesh axes.
      bytes: bytes of the buffer on a device.
      hidden: whether it runs while the device computes, and joins others of its loop.
    """

    kind: str
    axes: int
    bytes: float
    hidden: bool


class Work(NamedTuple):
    """One run of a job on one device."""

    seconds: float
    flops: float
    collectives: tuple[Collective, ...]


@dataclass
class Estimate:
    """Seconds of a step.

    Attributes:
      seconds: by kind.
      flops: FLOPs of a device.
      moves: communication by (kind, axes): [count, bytes, seconds, causes].
    """

    seconds: dict[str, float]
    flops: float
    moves: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        """Seconds of all kinds together."""
        return sum(self.seconds.values())


# Bytes of joined collectives, by (job or loop, kind, axes, runs in a step).
Joined = dict[tuple[int, str, int, int], float]
Ledger = dict[tuple[str, int], list[Any]]


class Cost:
    """The cost of one graph on one topology.

    Args:
      trace: the trace of the recipe.
      names: named axes of the graph of a rematerialization policy.
      topology: chips and links.
      sizes: bytes of the graph's values, if they exist already.
    """

    def __init__(
        self,
        trace: Trace,
        names: Names,
        topology: Topology,
        sizes: Sizes | None = None,
    ):
        self.names = names
        self.topology = topology
        self.chip = topology.device
        self.graph = names.graph
        self.prefers = meets_stored(self.graph)
        # XLA's CPU backend reduces each term of a sum over devices by itself.
        cpu = topology.platform == "cpu"
        shares = {} if cpu else sum_shares(self.graph.block)
        self.jobs = _Jobs(names, self.prefers, shares).jobs
        self.sizes = sizes or Sizes(self.graph, names)
        self._traffic = self.sizes.by_row(traffic(self.graph))
        self._optimizer = optimizer_bytes(trace, names)
        self._memo: dict[tuple, Work] = {}
        self._mesh: tuple[int, ...] = ()
        self._links: list[Link] = []

    def estimate(
        self,
        assignment: Assignment,
        causes: bool = False,
    ) -> Estimate:
        """Return the seconds of one step.

        Args:
          assignment: how the program is split.
          causes: whether to list the collectives with the operations that need them.
        """
        self._lay(assignment.sizes)
        layout = self.layout(assignment)
        parts = assignment.micro_batches
        compute = 0.0
        flops = 0.0
        shown: Joined = defaultdict(float)
        hidden: Joined = defaultdict(float)
        ledger: Ledger = {}

        for number, job in enumerate(self.jobs):
            work = self._work(number, job, assignment, layout)
            runs = job.count * parts
            compute += work.seconds * job.count * parts
            flops += work.flops * job.count * parts
            for move in work.collectives:
                kind = move.kind
                if move.hidden:
                    key = (job.loop, kind, move.axes, job.op.times * parts)
                    hidden[key] += move.bytes * (job.count // job.op.times)
                else:
                    shown[number, kind, move.axes, runs] += move.bytes
                if causes:
                    _note(ledger, move, job, parts)

        # Collectives read and write the memory, besides sending.
        sent = [*shown.items(), *hidden.items()]
        communicated = sum(2 * size * key[-1] for key, size in sent)
        seconds = {"matmul": compute, "memory": self._memory(assignment, communicated)}
        exposed = self._communication(shown, ledger)
        next_to = self._communication(hidden, ledger)
        if self.topology.platform == "cpu":
            exposed += next_to
        else:
            busy = sum(seconds.values())
            exposed += max(HIDDEN_SHARE * next_to, next_to - busy)
        seconds["communication"] = exposed
        seconds["optimizer"] = self._update(layout)
        return Estimate(seconds, flops, ledger)

    def layout(self, assignment: Assignment) -> Layout:
        """Return how the assignment splits each value and operation."""
        masks = list(assignment.masks)
        return Layout(
            self.graph,
            assignment.sizes,
            self.names.uses(masks),
            self.names.storage(masks, assignment.keep, assignment.counts),
            self.prefers,
            self.names.batched,
            assignment.micro_batches,
        )

    def _lay(self, sizes: tuple[int, ...]) -> None:
        """Lay mesh axes of these sizes on the links, for each set of axes."""
        if sizes == self._mesh:
            return
        self._mesh = sizes
        self._memo = {}
        axes = {str(i): size for i, size in enumerate(sizes)}
        links = list(lay(axes, self.topology).values())
        self._links = []
        for mask in range(1 << len(sizes)):
            chosen = [link for i, link in enumerate(links) if mask >> i & 1]
            self._links.append(join(chosen or links[:1]))

    def _communication(
        self,
        moves: Joined,
        ledger: Ledger,
    ) -> float:
        total = 0.0
        for (_, kind, axes, runs), size in moves.items():
            seconds = self._links[axes].seconds(kind, size) * runs
            total += seconds
            if (kind, axes) in ledger:
                ledger[kind, axes][2] += seconds
        return total

    def _memory(
        self,
        assignment: Assignment,
        communicated: float,
    ) -> float:
        """Return the seconds of elementwise groups' and collectives' memory traffic."""
        passed = self.sizes.total(assignment, self._traffic)
        moved = passed * assignment.micro_batches + communicated
        return moved / (self.chip.bandwidth * self.chip.memory_fraction)

    def _update(self, layout: Layout) -> float:
        """Return the seconds of the update's memory traffic.

        It reads the gradients, and reads and writes the parameters and their state.
        """
        moved = 0.0
        for spec, (own, state) in zip(layout.storage, self._optimizer, strict=True):
            mask = 0
            for axes in spec:
                mask |= axes
            moved += (3 * own + 2 * state) / layout.counts[mask]
        return moved / (self.chip.bandwidth * self.chip.memory_fraction)

    # ---- one job ----

    def _work(
        self,
        number: int,
        job: Job,
        assignment: Assignment,
        layout: Layout,
    ) -> Work:
        masks = assignment.masks
        chosen = [masks[group] for group in job.groups]
        key = (number, assignment.micro_batches, assignment.keep, *chosen)
        work = self._memo.get(key)
        if work is None:
            work = self._computed_work(job, layout)
            self._memo[key] = work
        return work

    def _computed_work(
        self,
        job: Job,
        layout: Layout,
    ) -> Work:
        if job.gather is not None:
            moves = _gathers(job.gather, layout)
            return Work(
                0.0,
                0.0,
                self._compiled(moves, job, layout),
            )

        decision = layout.decide(job.op, job.product)
        # Gathers of stored values are jobs of their own.
        moves = tuple(m for m in decision.moves if not _gathers_stored(job.op, m))
        collectives = self._compiled(moves, job, layout)
        if job.op.name not in DOTS or job.product is None:
            return Work(0.0, 0.0, collectives)

        shape = self._matmul(job, job.product, layout, decision)
        seconds = self._matmul_seconds(job, job.product, shape)
        m, n, k, batch = shape
        flops = 2.0 * m * n * k * batch * job.taps
        return Work(seconds, flops, collectives)

    def _compiled(
        self,
        moves: tuple[Move, ...],
        job: Job,
        layout: Layout,
    ) -> tuple[Collective, ...]:
        return tuple(self._compiled_move(move, job, layout) for move in moves)

    def _compiled_move(
        self,
        move: Move,
        job: Job,
        layout: Layout,
    ) -> Collective:
        kind = as_compiled(
            move.kind,
            layout.counts[move.axes],
            self.topology,
        )
        bytes_ = move.bytes
        if kind == "all-reduce" and job.share < 1:
            bytes_ *= job.share
        hidden = job.gather is not None or (
            move.where == "out" and job.op.outputs[0].stored is not None
        )
        # XLA's CPU backend joins no all-gathers.
        if kind == "all-gather" and self.topology.platform == "cpu":
            hidden = False
        return Collective(kind, move.axes, bytes_, hidden)

    def _matmul_seconds(
        self,
        job: Job,
        product: Contraction,
        shape: tuple[int, int, int, int],
    ) -> float:
        m, n, k, batch = shape
        dtype = job.op.inputs[0].dtype  # type: ignore[union-attr]
        seconds = matmul_seconds(
            self.chip,
            m,
            n,
            k,
            batch,
            dtype,
        )
        if product.groups > 1:
            # It may run as one dense product whose kernel is mostly zeros.
            dense = matmul_seconds(
                self.chip,
                m,
                n * batch,
                k * batch,
                1,
                dtype,
            )
            seconds = min(seconds, dense)
        return seconds

    def _matmul(
        self,
        job: Job,
        product: Contraction,
        layout: Layout,
        decision: Decision,
    ) -> tuple[int, int, int, int]:
        """Return m, n, k and batch of a product or a convolution on a device."""
        op = job.op
        assert product.right is not None
        left = op.inputs[product.left]
        right = op.inputs[product.right]
        out = op.outputs[0]
        assert left is not None and right is not None
        values = (left, right, out)
        specs = (
            decision.inputs.get(product.left, layout.use(left)),
            decision.inputs.get(product.right, layout.use(right)),
            decision.natural or layout.spec(out),
        )

        shape = _Shape()
        for index in product.indices:
            side = next(s for s in (0, 1, 2) if index[s] is not None)
            dim = index[side]
            assert dim is not None
            whole = values[side].shape[dim]
            extent = whole / layout.counts[specs[side][dim]]
            if layout.parts > 1 and self._is_batch(values[side].nodes[dim]):
                extent /= layout.parts

            if product.groups > 1 and index is product.indices[0]:
                assert index.right is not None
                shares = product.groups * extent / left.shape[dim]
                columns = right.shape[index.right] / product.groups
                by_batch = op.params["batch_group_count"] > 1
                shape.add_groups(shares, columns, extent, by_batch)
            else:
                shape.add(index, extent)

        if op.name == "conv_general_dilated":
            numbers = op.params["dimension_numbers"]
            shape.m *= math.prod(out.shape[d] for d in numbers.out_spec[2:])
            shape.k *= math.prod(right.shape[d] for d in numbers.rhs_spec[2:])
        return shape.rounded()

    def _is_batch(self, node: int) -> bool:
        return self.names.of.get(self.graph.find(node)) == self.names.batch


@dataclass
class _Shape:
    """Extents of a batch of products [m, k] x [k, n] on a device."""

    m: float = 1.0
    n: float = 1.0
    k: float = 1.0
    batch: float = 1.0

    def add(
        self,
        index: Index,
        extent: float,
    ) -> None:
        if index.out is None:
            self.k *= extent
        elif index.left is not None and index.right is not None:
            self.batch *= extent
        elif index.left is not None:
            self.m *= extent
        else:
            self.n *= extent

    def add_groups(
        self,
        groups: float,
        columns: float,
        extent: float,
        by_batch: bool,
    ) -> None:
        """Count a grouped convolution's index of groups.

        Args:
          groups: groups on this device.
          columns: output channels of a group.
          extent: what the index has on this device: samples or input channels.
          by_batch: whether the samples are in groups, and not the channels.
        """
        self.batch *= groups
        self.n *= columns
        if by_batch:
            self.m *= extent / groups
        else:
            self.k *= extent / groups

    def rounded(self) -> tuple[int, int, int, int]:
        extents = (self.m, self.n, self.k, self.batch)
        m, n, k, batch = (max(1, round(extent)) for extent in extents)
        return m, n, k, batch


def _gathers(
    value: Value,
    layout: Layout,
) -> tuple[Move, ...]:
    """Return the all-gather of a stored value, none if it is stored as it is used."""
    have = layout.spec(value)
    use = layout.use(value)
    axes = 0
    for h, u in zip(have, use, strict=True):
        axes |= h & ~u
    if not axes:
        return ()
    return (
        Move(
            "all-gather",
            axes,
            layout.bytes(value, use),
            "input",
        ),
    )


def _gathers_stored(op: Operation, move: Move) -> bool:
    if not move.where.startswith("input"):
        return False
    value = op.inputs[int(move.where.removeprefix("input "))]
    return value is not None and value.stored is not None


def _note(
    ledger: Ledger,
    move: Collective,
    job: Job,
    parts: int,
) -> None:
    """Count a collective, and the line that needs it."""
    runs = job.count * parts
    entry = ledger.setdefault((move.kind, move.axes), [0, 0.0, 0.0, {}])
    entry[0] += runs
    entry[1] += move.bytes * job.count * parts
    causes = entry[3]
    line = source_line(job.op.eqn, job.op.callers).rsplit("/", 1)[-1]
    cause = f"{job.op.name} at {line}"
    causes[cause] = causes.get(cause, 0.0) + move.bytes * job.count * parts


# ---- the jobs of a graph ----


class _Jobs:
    """Collects the jobs of a graph.

    Args:
      names: the graph's named axes.
      prefers: for a value, the dim that gets its mesh axes first.
      shares: see `sum_shares`.
    """

    def __init__(
        self,
        names: Names,
        prefers: dict[int, int],
        shares: dict[int, float],
    ):
        self.names = names
        self.graph = names.graph
        self.prefers = prefers
        self.shares = shares
        self.jobs: list[Job] = []
        self._known: dict[tuple, Job] = {}
        self._gathered: set[int] = set()
        self._loops = 0
        self._walk(self.graph.block, 0)

    def _walk(
        self,
        block: Block,
        loop: int,
    ) -> None:
        for op in block.operations:
            product = contraction(op)
            values = [v for v in (*op.inputs, *op.outputs[:1]) if v is not None]
            # An empty array computes and moves nothing.
            empty = any(0 in v.shape for v in values)
            if (product is not None or op.whole) and not empty:
                self._add(op, product, loop, values, None)
            if not op.blocks and any(v.stored is None for v in op.outputs):
                self._add_gathers(op, loop)
            if op.blocks:
                self._loops += 1
                inside = self._loops
                for inner in op.blocks:
                    self._walk(inner, inside)

    def _add_gathers(
        self,
        op: Operation,
        loop: int,
    ) -> None:
        """Add the gathers of stored values that an operation is the first to read."""
        for value in op.inputs:
            if value is None or value.stored is None:
                continue
            # One that lasts is gathered in the forward and in the backward pass.
            if value.index in self._gathered and value.index not in self.graph.lasting:
                continue
            self._gathered.add(value.index)
            self._add(op, None, loop, [value], value)

    def _add(
        self,
        op: Operation,
        product: Contraction | None,
        loop: int,
        values: list[Value],
        gather: Value | None,
    ) -> None:
        groups = self._groups(values)
        if not groups and op.name not in DOTS:
            return
        looks = tuple(self._look(value) for value in values)
        # A print has no outputs.
        share = self.shares.get(op.outputs[0].index, 1.0) if op.outputs else 1.0
        key = (op.name, op.times, product, looks, gather is not None, loop, share)
        if key in self._known:
            self._known[key].count += op.times
            return
        taps = used_taps(op)
        job = Job(
            op,
            product,
            op.times,
            groups,
            loop,
            share,
            gather,
            taps,
        )
        self._known[key] = job
        self.jobs.append(job)

    def _groups(self, values: list[Value]) -> tuple[int, ...]:
        """Return the named axes of some values, and of the parameters behind them."""
        numbers: dict[int, None] = {}
        for value in values:
            nodes = list(value.nodes)
            if value.stored is not None:
                nodes += self.graph.block.inputs[value.stored[0]].nodes
            for node in nodes:
                root = self.graph.find(node)
                if root in self.names.of:
                    numbers[self.names.of[root]] = None
        return tuple(numbers)

    def _look(self, value: Value) -> tuple:
        """Return what makes a value like others for the cost."""
        names = self.names
        groups = tuple(names.of.get(self.graph.find(node)) for node in value.nodes)
        stored = value.stored and (names.patterns[value.stored[0]], value.stored[1])
        prefers = self.prefers.get(value.index)
        return value.shape, str(value.dtype), groups, stored, prefers


def used_taps(op: Operation) -> float:
    """Return the share of a convolution's taps that meet an element of its input.

    The others meet padding or a hole of a dilated input. It is 1 for anything else.
    """
    if op.name != "conv_general_dilated":
        return 1.0
    values = [v for v in (*op.inputs[:2], op.outputs[0]) if v is not None]
    left, right, out = (value.shape for value in values)
    output_channels = right[op.params["dimension_numbers"].rhs_spec[0]]
    kernel = math.prod(right) / output_channels
    all_taps = 2.0 * math.prod(out) * kernel
    return convolution_flops(op.params, left, right, out) / all_taps


def as_compiled(
    kind: str,
    count: int,
    topology: Topology,
) -> str:
    """Return the collective that XLA makes of one over `count` devices.

    Its CPU backend has no reduce-scatter (jaxlib 0.10 and 0.12). On a TPU it has none
    over the whole of a square torus of `WHOLE_TORUS` chips or more either, nor an
    all-gather over the whole of a cube.
    """
    if topology.platform == "cpu":
        return "all-reduce" if kind == "reduce-scatter" else kind
    torus = topology.chip.torus
    shape = topology.shape
    square = torus and len(shape) == torus and len(set(shape)) == 1
    whole = count == topology.devices and topology.chips >= WHOLE_TORUS
    missing = ("reduce-scatter", "all-gather") if torus == 3 else ("reduce-scatter",)
    return "all-reduce" if square and whole and kind in missing else kind


def traffic(graph: Graph) -> np.ndarray:
    """Count how often a step reads or writes each value in a device's memory.

    What matmuls do with their operands is not counted. Elementwise operations and
    reductions run together (XLA's fusion): only what something else needs is written,
    and each such group reads its sources once.

    Returns:
      A float array, (values,).
    """
    readers: dict[int, list[str]] = defaultdict(list)
    for op in graph.operations():
        for value in op.inputs:
            if value is not None:
                readers[value.index].append(op.name)

    counts = np.zeros(len(graph.values))
    sources: dict[int, tuple[int, ...]] = {}
    joining = {*FUSIBLE, *REDUCTIONS}
    for op in graph.operations():
        if op.blocks or op.name in FREE or op.name in DOTS or op.name == BARRIER:
            continue
        inputs = [v for v in op.inputs if v is not None and v.shape]
        reads: dict[int, None] = {}
        for value in inputs:
            reads.update(dict.fromkeys(sources.get(value.index, (value.index,))))

        users = readers[op.outputs[0].index] if op.name in FUSIBLE else ()
        if users and all(user in joining for user in users):
            sources[op.outputs[0].index] = tuple(reads)
        elif op.name == "gather":
            counts[op.outputs[0].index] += 2 * op.times
        else:
            for index in (*reads, *(v.index for v in op.outputs)):
                counts[index] += op.times
    return counts


def optimizer_bytes(
    trace: Trace,
    names: Names,
) -> list[tuple[float, float]]:
    """Return (its bytes, the bytes of its optimizer state) for each parameter."""
    params = by_path(trace.state.params)
    state: dict[str, float] = defaultdict(float)
    for path, leaf in by_path({"optimizer": trace.state.optimizer}).items():
        parts = path.split("/")
        tails = ("/".join(parts[start:]) for start in range(1, len(parts)))
        tail = next((tail for tail in tails if tail in params), None)
        if tail is not None:
            state[tail] += nbytes(leaf)
    return [(nbytes(leaf), state[path]) for path, leaf in params.items()]


def sum_shares(block: Block) -> dict[int, float]:
    """Return the share that each matmul has in a sum of several.

    XLA reduces such a sum over the devices once, so each of n terms counts for 1/n.

    Returns:
      For the index of a term's value, one over the number of terms.
    """
    shares: dict[int, float] = {}
    users: dict[int, list[Operation]] = defaultdict(list)
    for op in block.operations:
        for value in op.inputs:
            if value is not None:
                users[value.index].append(op)
        for inner in op.blocks:
            shares.update(sum_shares(inner))

    # From the end, since a sum may itself be a term of a larger one.
    totals: dict[int, int] = {}
    terms: dict[int, list[int]] = defaultdict(list)
    for op in reversed(block.operations):
        for value in op.outputs:
            using = users[value.index]
            if len(using) != 1 or using[0].name != "add_any":
                continue
            total = using[0].outputs[0].index
            totals[value.index] = totals.get(total, total)
            if op.name == "dot_general":
                terms[totals[value.index]].append(value.index)
    for indices in terms.values():
        shares.update((index, 1 / len(indices)) for index in indices)
    return shares

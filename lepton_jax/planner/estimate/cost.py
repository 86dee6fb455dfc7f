"""Seconds of a step under an assignment: computing, memory traffic and communication,
from cited figures alone.

Assumptions, stated once: parameters are gathered and gradients reduced beside computing
(XLA's latency-hiding scheduler on TPU and GPU), of which a `HIDDEN_SHARE` shows all the
same; what moves activations waits for them and is waited for. On a CPU nothing
overlaps. XLA joins collectives of one kind over the same axes into one, within a loop's
body or outside; on a CPU not all-gathers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

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
from lepton_jax.planner.estimate.memory import Sizes
from lepton_jax.planner.program.graph import BARRIER, Region, Graph, Operation, Value
from lepton_jax.planner.program.layout import (
    Contraction,
    Layout,
    Move,
    contraction,
    meets_stored,
)
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.rules import ELEMENTWISE, REDUCTIONS
from lepton_jax.planner.program.trace import Trace
from lepton_jax.trees import by_path, nbytes

HIDDEN_SHARE = 0.1
FREE = {"iota", "empty", "create_token", "axis_index"}
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


@dataclass
class Job:
    """Operations that are alike, `count` times a step (micro-batches apart); `groups`
    decide how they are split.

    `share` is less than 1 for terms of a sum: XLA reduces the sum over devices, not
    each term. `gather` is the value of a job that only gathers a stored value. `taps`
    is the share of a convolution's taps that meet an element of its input.
    """

    op: Operation
    product: Contraction | None
    count: int
    groups: tuple[int, ...]
    block: int
    share: float
    gather: Value | None = None
    taps: float = 1.0


@dataclass
class Estimate:
    """Seconds by kind, FLOP of a device, and communication: (kind, axes) to [count,
    bytes, seconds, causes].
    """

    seconds: dict[str, float]
    flops: float
    moves: dict[tuple[str, int], list[Any]] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Cost:
    """The cost of one graph on one topology.

    Args:
      trace, names: of the recipe; `names` of the graph of a rematerialization policy.
      topology: with chips and links.
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
        self.jobs = self._jobs()
        self.sizes = sizes or Sizes(self.graph, names)
        self._traffic = self.sizes.by_row(traffic(self.graph))
        self._optimizer = optimizer_bytes(trace, names)
        self._memo: dict[tuple, tuple[float, float, tuple[Move, ...]]] = {}
        self._sizes: tuple[int, ...] = ()
        self._links: list[Link] = []

    def estimate(
        self,
        assignment: Assignment,
        causes: bool = False,
    ) -> Estimate:
        """Seconds of one step; with `causes`, its moves by kind and axes with their
        operations.
        """
        self._lay(assignment.sizes)
        layout = self.layout(assignment)
        parts = assignment.micro_batches
        compute = 0.0
        flops = 0.0
        shown: dict[tuple[int, str, int, int], float] = defaultdict(float)
        hidden: dict[tuple[int, str, int, int], float] = defaultdict(float)
        ledger: dict[tuple[str, int], list[Any]] = {}
        for number, job in enumerate(self.jobs):
            key = (
                number,
                parts,
                assignment.keep,
                *[assignment.masks[g] for g in job.groups],
            )
            found = self._memo.get(key)
            if found is None:
                found = self._memo[key] = self._job(job, layout)
            seconds, work, moves = found
            compute += seconds * job.count * parts
            flops += work * job.count * parts
            for move in moves:
                move = move._replace(
                    kind=as_compiled(
                        move.kind,
                        assignment.counts[move.axes],
                        self.topology,
                    )
                )
                if move.kind == "all-reduce" and job.share < 1:
                    move = move._replace(bytes=move.bytes * job.share)
                stored = job.gather is not None or (
                    move.where == "out" and job.op.outputs[0].stored is not None
                )
                if stored and not (
                    move.kind == "all-gather" and self.topology.platform == "cpu"
                ):
                    hidden[job.block, move.kind, move.axes, job.op.times * parts] += (
                        move.bytes * (job.count // job.op.times)
                    )
                else:
                    shown[number, move.kind, move.axes, job.count * parts] += move.bytes
                if causes:
                    _note(ledger, move, job, parts)
        through = sum(
            2 * size * key[-1]
            for moves in (shown, hidden)
            for key, size in moves.items()
        )
        time = {"matmul": compute, "memory": self._memory(assignment, through)}
        exposed = self._communication(shown, ledger)
        beside = self._communication(hidden, ledger)
        if self.topology.platform == "cpu":
            exposed += beside
        else:
            exposed += max(HIDDEN_SHARE * beside, beside - sum(time.values()))
        time["communication"] = exposed
        time["optimizer"] = self._update(layout)
        return Estimate(time, flops, ledger)

    def layout(self, assignment: Assignment) -> Layout:
        masks = list(assignment.masks)
        return Layout(
            self.graph,
            assignment.sizes,
            self.names.uses(masks),
            self.names.storage(
                masks,
                assignment.keep,
                assignment.counts,
            ),
            self.prefers,
            self.names.batched,
            assignment.micro_batches,
        )

    def _lay(self, sizes: tuple[int, ...]) -> None:
        if sizes == self._sizes:
            return
        self._sizes = sizes
        self._memo = {}
        links = list(
            lay({str(i): n for i, n in enumerate(sizes)}, self.topology).values()
        )
        self._links = [
            join([link for i, link in enumerate(links) if mask >> i & 1] or links[:1])
            for mask in range(1 << len(sizes))
        ]

    def _communication(
        self,
        moves: dict[tuple[int, str, int, int], float],
        ledger: dict[tuple[str, int], list[Any]],
    ) -> float:
        total = 0.0
        for (_, kind, axes, times), size in moves.items():
            seconds = self._links[axes].seconds(kind, size) * times
            total += seconds
            if (kind, axes) in ledger:
                ledger[kind, axes][2] += seconds
        return total

    def _job(
        self,
        job: Job,
        layout: Layout,
    ) -> tuple[float, float, tuple[Move, ...]]:
        if job.gather is not None:
            value = job.gather
            have = layout.spec(value)
            use = layout.use(value)
            axes = 0
            for h, u in zip(have, use, strict=True):
                axes |= h & ~u
            return (
                0.0,
                0.0,
                (
                    (
                        Move(
                            "all-gather",
                            axes,
                            layout.bytes(value, use),
                            "input",
                        ),
                    )
                    if axes
                    else ()
                ),
            )
        decision = layout.decide(job.op, job.product)
        moves = tuple(
            m
            for m in decision.moves
            if not m.where.startswith("input") or not self._stored(job.op, m)
        )
        if (
            job.op.name not in ("dot_general", "conv_general_dilated")
            or job.product is None
        ):
            return 0.0, 0.0, moves
        m, n, k, batch = self._extents(job, layout, decision)
        dtype = job.op.inputs[0].dtype  # type: ignore[union-attr]
        seconds = matmul_seconds(
            self.chip,
            m,
            n,
            k,
            batch,
            dtype,
        )
        # or as one dense product most of whose kernel is zero
        if job.product.groups > 1:
            seconds = min(
                seconds,
                matmul_seconds(
                    self.chip,
                    m,
                    n * batch,
                    k * batch,
                    1,
                    dtype,
                ),
            )
        return seconds, 2.0 * m * n * k * batch * job.taps, moves

    @staticmethod
    def _stored(op: Operation, move: Move) -> bool:
        value = op.inputs[int(move.where.removeprefix("input "))]
        return value is not None and value.stored is not None

    def _extents(
        self, job: Job, layout: Layout, decision: Any
    ) -> tuple[int, int, int, int]:
        """m, n, k and batch of a dot, or of a convolution as one, on a device."""
        op = job.op
        product = job.product
        assert product is not None and product.right is not None
        left = op.inputs[product.left]
        right = op.inputs[product.right]
        out = op.outputs[0]
        assert left is not None and right is not None
        specs = [
            decision.inputs.get(product.left, layout.use(left)),
            decision.inputs.get(product.right, layout.use(right)),
            decision.natural or layout.spec(out),
        ]
        m = n = k = batch = 1.0
        for index in product.indices:
            side = next(s for s in (0, 1, 2) if index[s] is not None)
            dim = index[side]
            assert dim is not None
            extent = (left, right, out)[side].shape[dim] / layout.counts[
                specs[side][dim]
            ]
            node = (left, right, out)[side].nodes[dim]
            if (
                layout.parts > 1
                and self.names.of.get(self.graph.find(node)) == self.names.batch
            ):
                extent /= layout.parts
            if product.groups > 1 and index is product.indices[0]:
                groups = product.groups * extent / left.shape[dim]
                batch *= groups
                n *= right.shape[index.right] / product.groups  # type: ignore[index]
                if op.params["batch_group_count"] > 1:
                    m *= extent / groups
                else:
                    k *= extent / groups
            elif index.out is None:
                k *= extent
            elif index.left is not None and index.right is not None:
                batch *= extent
            elif index.left is not None:
                m *= extent
            else:
                n *= extent
        if op.name == "conv_general_dilated":
            m *= math.prod(
                out.shape[d] for d in op.params["dimension_numbers"].out_spec[2:]
            )
            k *= math.prod(
                right.shape[d] for d in op.params["dimension_numbers"].rhs_spec[2:]
            )
        return (
            max(1, round(m)),
            max(1, round(n)),
            max(1, round(k)),
            max(1, round(batch)),
        )

    # ---- what is looked at once ----

    def _jobs(self) -> list[Job]:
        names = self.names
        jobs: list[Job] = []
        known: dict[tuple, int] = {}
        # XLA's CPU backend reduces each term of a sum over devices by itself
        sums = {} if self.topology.platform == "cpu" else summed(self.graph.main, {})
        gathered: dict[int, int] = {}

        def groups_of(values: list[Value]) -> tuple[int, ...]:
            found: dict[int, None] = {}
            for value in values:
                nodes = list(value.nodes)
                if value.stored is not None:
                    nodes += self.graph.main.inputs[value.stored[0]].nodes
                found.update(
                    dict.fromkeys(
                        names.of[r]
                        for r in map(self.graph.find, nodes)
                        if r in names.of
                    )
                )
            return tuple(found)

        def add(
            op: Operation,
            product: Any,
            block: int,
            values: list[Value],
            gather: Value | None,
        ) -> None:
            groups = groups_of(values)
            if not groups and op.name not in ("dot_general", "conv_general_dilated"):
                return
            look = tuple(
                (
                    v.shape,
                    str(v.dtype),
                    tuple(names.of.get(self.graph.find(n)) for n in v.nodes),
                    v.stored and (names.patterns[v.stored[0]], v.stored[1]),
                    self.prefers.get(v.index),
                )
                for v in values
            )
            # a print gives nothing
            share = sums.get(op.outputs[0].index, 1.0) if op.outputs else 1.0
            key = (
                op.name,
                op.times,
                product,
                look,
                gather is not None,
                block,
                share,
            )
            if key in known:
                jobs[known[key]].count += op.times
                return
            known[key] = len(jobs)
            jobs.append(
                Job(
                    op,
                    product,
                    op.times,
                    groups,
                    block,
                    share,
                    gather,
                    met(op),
                )
            )

        def walk(block: Region, number: int) -> None:
            for op in block.operations:
                product = contraction(op)
                values = [v for v in (*op.inputs, *op.outputs[:1]) if v is not None]
                empty = any(0 in v.shape for v in values)  # computes and moves nothing
                if (product is not None or op.whole) and not empty:
                    add(op, product, number, values, None)
                if op.name not in ("scan", "while", "cond") and any(
                    v.stored is None for v in op.outputs
                ):
                    for value in op.inputs:
                        if value is None or value.stored is None:
                            continue
                        if (
                            value.index not in gathered
                            or value.index in self.graph.lasting
                        ):
                            gathered[value.index] = 1
                            add(op, None, number, [value], value)
                for inner in op.regions:
                    walk(inner, number * 8 + 1 + block.operations.index(op) % 7)

        walk(self.graph.main, 0)
        return jobs

    def _memory(
        self,
        assignment: Assignment,
        communicated: float,
    ) -> float:
        """What elementwise groups read and write, and what collectives read and write
        besides sending it.
        """
        passed = self.sizes.total(assignment, self._traffic)
        moved = passed * assignment.micro_batches + communicated
        return moved / (self.chip.bandwidth * self.chip.memory_fraction)

    def _update(self, layout: Layout) -> float:
        """Reading and writing parameters and optimizer state, and reading gradients."""
        moved = 0.0
        for spec, (own, state) in zip(layout.storage, self._optimizer, strict=True):
            mask = 0
            for m in spec:
                mask |= m
            moved += (3 * own + 2 * state) / layout.counts[mask]
        return moved / (self.chip.bandwidth * self.chip.memory_fraction)


def met(op: Operation) -> float:
    """The share of a convolution's taps that meet an element of its input, and neither
    padding nor a hole.
    """
    if op.name != "conv_general_dilated":
        return 1.0
    left, right, out = (v.shape for v in (*op.inputs[:2], op.outputs[0]))  # type: ignore[union-attr]
    kernel = math.prod(right) / right[op.params["dimension_numbers"].rhs_spec[0]]
    return convolution_flops(op.params, left, right, out) / (
        2.0 * math.prod(out) * kernel
    )


def as_compiled(
    kind: str,
    count: int,
    topology: Topology,
) -> str:
    """The collective that XLA makes of one over `count` devices.

    Its CPU backend has no reduce-scatter. On a TPU (libtpu of jax 0.10 and 0.12, found
    by compiling) it has none over the whole of a square torus of 64 chips or more
    either, nor an all-gather over the whole of a cube.
    """
    if topology.platform == "cpu":
        return "all-reduce" if kind == "reduce-scatter" else kind
    square = (
        topology.chip.torus
        and len(set(topology.shape)) == 1
        and len(topology.shape) == topology.chip.torus
    )
    if (
        square
        and topology.chips >= 64
        and count == topology.devices
        and (
            kind == "reduce-scatter"
            or (kind == "all-gather" and topology.chip.torus == 3)
        )
    ):
        return "all-reduce"
    return kind


def traffic(graph: Graph) -> np.ndarray:
    """How often a step reads or writes each value in the device's memory, apart from
    what dots do with their operands.

    Elementwise operations and reductions run together (XLA's fusion): only what
    something else needs is written, and each such group reads its sources once.
    """
    users: dict[int, list[str]] = defaultdict(list)
    for op in graph.operations():
        for value in op.inputs:
            if value is not None:
                users[value.index].append(op.name)
    often = np.zeros(len(graph.values))
    sources: dict[int, tuple[int, ...]] = {}
    joining = {*FUSIBLE, *REDUCTIONS}
    for op in graph.operations():
        if op.regions or op.name in FREE:
            continue
        inputs = [v for v in op.inputs if v is not None and v.shape]
        if op.name in ("dot_general", "conv_general_dilated", BARRIER):
            continue
        reads = tuple(
            dict.fromkeys(i for v in inputs for i in sources.get(v.index, (v.index,)))
        )
        if (
            op.name in FUSIBLE
            and users[op.outputs[0].index]
            and all(u in joining for u in users[op.outputs[0].index])
        ):
            sources[op.outputs[0].index] = reads
            continue
        if op.name == "gather":
            often[op.outputs[0].index] += 2 * op.times
            continue
        for index in (*reads, *(v.index for v in op.outputs)):
            often[index] += op.times
    return often


def optimizer_bytes(trace: Trace, names: Names) -> list[tuple[float, float]]:
    """(bytes of it, bytes of its optimizer state) of each parameter."""
    params = by_path(trace.state.params)
    state: dict[str, float] = defaultdict(float)
    for path, leaf in by_path({"optimizer": trace.state.optimizer}).items():
        parts = path.split("/")
        for start in range(1, len(parts)):
            tail = "/".join(parts[start:])
            if tail in params:
                state[tail] += nbytes(leaf)
                break
    return [(nbytes(leaf), state[path]) for path, leaf in params.items()]


def summed(block: Region, found: dict[int, float]) -> dict[int, float]:
    """Products that are only terms of a sum: their index to one over the number of such
    terms.
    """
    users: dict[int, list[Operation]] = defaultdict(list)
    for op in block.operations:
        for value in op.inputs:
            if value is not None:
                users[value.index].append(op)
        for inner in op.regions:
            summed(inner, found)
    totals: dict[int, int] = {}
    terms: dict[int, list[int]] = defaultdict(list)
    for op in reversed(block.operations):
        for value in op.outputs:
            using = users[value.index]
            if len(using) == 1 and using[0].name == "add_any":
                totals[value.index] = totals.get(
                    using[0].outputs[0].index, using[0].outputs[0].index
                )
                if op.name == "dot_general":
                    terms[totals[value.index]].append(value.index)
    found.update(
        (index, 1 / len(summed)) for summed in terms.values() for index in summed
    )
    return found


def _note(
    ledger: dict[tuple[str, int], list[Any]],
    move: Move,
    job: Job,
    parts: int,
) -> None:
    entry = ledger.setdefault((move.kind, move.axes), [0, 0.0, 0.0, {}])
    entry[0] += job.count * parts
    entry[1] += move.bytes * job.count * parts
    cause = (
        f"{job.op.name} at {source_line(job.op.eqn, job.op.callers).rsplit('/', 1)[-1]}"
    )
    entry[3][cause] = entry[3].get(cause, 0.0) + move.bytes * job.count * parts

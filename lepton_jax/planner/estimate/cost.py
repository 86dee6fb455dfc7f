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
   or outside of loops, as XLA does, so that their latency counts once. Those that a
   loop does not change run outside of it (`motion`). `Link.seconds` gives the seconds
   of each.
4. Gathers of parameters and reductions of gradients run while the device computes
   (the latency-hiding scheduler on TPU and GPU): a share of them shows (`xla.figures`),
   or what is longer than the computing. What moves activations waits for them and is
   waited for. On a CPU nothing overlaps, and all-gathers are not joined.
5. Copies to the host's memory and back run beside the products, too (`offload`).
6. Elementwise operations read and write each value once per fused group (`traffic`).
   The update reads and writes the parameters and the optimizer's state.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.compat import source_line
from lepton_jax.hardware import (
    Link,
    Topology,
    join,
    lay,
    matmul_seconds,
)
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate import cpu
from lepton_jax.planner.estimate.attention import (
    attention_seconds,
    ring_flops,
    ring_seconds,
)
from lepton_jax.planner.estimate.equal import repeated
from lepton_jax.planner.estimate.jobs import Job, Jobs, sum_shares
from lepton_jax.planner.estimate.motion import Motion, moved_value
from lepton_jax.planner.estimate.offload import Offload
from lepton_jax.planner.estimate.orthogonal import Work as OrthogonalWork
from lepton_jax.planner.estimate.orthogonal import stack_moves
from lepton_jax.planner.estimate.orthogonal import work as orthogonal_work
from lepton_jax.planner.estimate.reads import moved_before
from lepton_jax.planner.estimate.rows import row_moves
from lepton_jax.planner.estimate.sizes import Sizes
from lepton_jax.planner.estimate.traffic import traffic
from lepton_jax.planner.estimate.workspace import laid_out
from lepton_jax.planner.program.around import PASSED_ON
from lepton_jax.planner.program.graph import (
    Operation,
    Value,
)
from lepton_jax.planner.program.kernels import KERNELS, LENGTH, attention_flops
from lepton_jax.planner.program.layout import (
    Contraction,
    Decision,
    Index,
    Layout,
    Move,
    Spec,
    meets_stored,
)
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.ruled import Choice, own_bytes, own_flops
from lepton_jax.planner.program.staged import of_one_stage
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.rewrite.staged_attention import STAGED_KERNELS
from lepton_jax.planner.xla import operations
from lepton_jax.planner.xla.figures import HIDDEN_SHARE, WAITED_SHARE
from lepton_jax.planner.xla.flags import FUSES, KEEPS_GATHERS
from lepton_jax.planner.xla.operations import DOTS
from lepton_jax.trees import by_path, nbytes

# Chips of a square torus from which on libtpu of jax 0.10 and 0.12 replaces collectives
# over the whole of it; found by compiling for v5e:4x4, v5e:8x8 and v5p:4x4x4.
WHOLE_TORUS = 64


class Collective(NamedTuple):
    """A collective of a job, as XLA compiles it.

    Attributes:
      kind: such as "all-reduce".
      axes: mask of the mesh axes.
      bytes: bytes of the buffer on a device.
      hidden: whether it runs while the device computes, and joins others of its loop.
      runs: how often a step runs it for one operation.
      beside: seconds of the operation's own products that run beside each of them.
    """

    kind: str
    axes: int
    bytes: float
    hidden: bool
    runs: int
    beside: float = 0.0


class Work(NamedTuple):
    """One run of a job on one device."""

    seconds: float
    flops: float
    collectives: tuple[Collective, ...]


# Bytes of joined collectives, by (job or loop, kind, axes, runs in a step).
Joined = dict[tuple[int, str, int, int], float]
# Communication by (kind, axes): [count, bytes, seconds, causes].
Ledger = dict[tuple[str, int], list[Any]]


@dataclass
class Estimate:
    """Seconds of a step.

    Attributes:
      seconds: by kind.
      flops: FLOPs of a device, as its backend computes them: what is rematerialized
        counts twice, and a convolution that runs densely counts all that it multiplies.
        `Trace.flops` are those of the model.
      moves: communication by (kind, axes): [count, bytes, seconds, causes].
      offloaded: bytes that a device sends to its host's memory, and fetches again.
    """

    seconds: dict[str, float]
    flops: float
    moves: Ledger = field(default_factory=dict)
    offloaded: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all kinds together."""
        return sum(self.seconds.values())


class Cost:
    """The cost of one graph on one topology.

    Args:
      trace: the trace of the recipe.
      names: named axes of the graph of a rematerialization policy.
      topology: chips and links.
      sizes: bytes of the graph's values, if they exist already.
      flags: XLA's, as in `Plan`.
    """

    def __init__(
        self,
        trace: Trace,
        names: Names,
        topology: Topology,
        sizes: Sizes | None = None,
        flags: Mapping[str, Any] | None = None,
    ):
        self.names = names
        self.topology = topology
        self.flags = flags or {}
        self.chip = topology.device
        self.graph = names.graph
        self.prefers = meets_stored(self.graph)
        # XLA's CPU backend reduces each term of a sum over devices by itself.
        on_cpu = topology.platform == "cpu"
        shares = {} if on_cpu else sum_shares(self.graph.main)
        self.motion = Motion(self.graph, topology.platform)
        merged = repeated(self.graph.main) if on_cpu else ()
        self.jobs = Jobs(names, self.prefers, shares, self.motion, merged).jobs
        self.sizes = sizes or Sizes(self.graph, names)
        self.offload = Offload(self.graph, self.sizes)
        passes = traffic(self.graph)
        if on_cpu:
            passes = cpu.widened_traffic(self.graph, passes)
        self._traffic = self.sizes.by_row(passes)
        # Seconds of a core, by row and for all kernels.
        self._slow: np.ndarray | None = None
        self._kernels = 0.0
        if on_cpu:
            self._slow = self.sizes.by_row(cpu.slow_work(self.graph))
            self._kernels = cpu.kernel_seconds(self.graph)
        self._optimizer = optimizer_bytes(trace, names)
        self._arrays = len(jax.tree.leaves(trace.state))
        self._trace = trace
        self._orthogonals: dict[int, OrthogonalWork] = {}
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
        merged = self._merged(assignment)
        parts = assignment.micro_batches
        compute = 0.0
        flops = 0.0
        shown: Joined = defaultdict(float)
        hidden: Joined = defaultdict(float)
        ringed: list[Collective] = []
        ledger: Ledger = {}
        arrays: dict[int, int] = defaultdict(int)  # of joined collectives, by axes

        for number, job in enumerate(self.jobs):
            work = self._work(number, job, assignment, layout)
            alike = job.count // job.op.times
            in_loop = job.op.times * parts
            if not (job.repeats and job.op.name in merged):
                compute += work.seconds * job.count * parts
                flops += work.flops * job.count * parts
            for move in work.collectives:
                kind = move.kind
                if move.beside:
                    ringed.append(move._replace(runs=move.runs * alike))
                elif move.hidden:
                    loop = job.loop if move.runs == in_loop else 0
                    key = (loop, kind, move.axes, move.runs)
                    hidden[key] += move.bytes * alike
                    arrays[move.axes] += move.runs * alike
                else:
                    runs = move.runs * alike
                    shown[number, kind, move.axes, runs] += move.bytes
                if causes:
                    _note(ledger, move, job)

        self._add_state_moves(layout, shown, ledger if causes else None)
        orthogonal = self._orthogonal(layout)
        flops += orthogonal.flops

        # Collectives read and write the memory, besides sending.
        sent = [*shown.items(), *hidden.items()]
        communicated = sum(2 * size * key[-1] for key, size in sent)
        communicated += sum(2 * move.bytes * move.runs for move in ringed)
        offloaded = self.offload.traffic(assignment)
        communicated += offloaded.out + offloaded.back
        memory = self._memory(assignment, communicated)
        waiting = self._communication(shown, ledger)
        waiting += sum(self._passed_on(move, ledger) for move in ringed)
        alongside = self._communication(hidden, ledger)
        alongside += sum(self._meetings(axes) * count for axes, count in arrays.items())
        waiting += self._exposed(alongside, compute + memory, self._waited())
        waiting += offloaded.seconds(self.chip.host_bandwidth, compute + memory)
        seconds = {
            "matmul": compute,
            "memory": memory,
            "communication": waiting,
            "optimizer": self._update(layout) + orthogonal.seconds,
        }
        return Estimate(seconds, flops, ledger, offloaded.out)

    def _merged(self, assignment: Assignment) -> Collection[str]:
        """Return the operations that XLA merges with equal ones before a barrier.

        It doesn't merge collectives. Where parameters or activations are split, what is
        computed again reads other results of them, so nothing is merged unless the
        batch alone is split. A batch of one sample a device is reshaped away around
        each matmul, differently before and after a barrier: only convolutions merge.
        """
        batch = self.names.batch
        masks = enumerate(assignment.masks)
        if any(mask for group, mask in masks if group != batch):
            return ()
        if batch is None:
            return DOTS
        parts = assignment.counts[assignment.masks[batch]] * assignment.micro_batches
        several = self.names.groups[batch].divisor > parts
        return DOTS if several else ("conv_general_dilated",)

    def _meetings(self, axes: int) -> float:
        """Return the seconds that an array costs in a joined collective, by latency."""
        if self.topology.platform != "cpu":
            return 0.0
        flops = self.chip.peak("float32")
        return cpu.meeting_seconds(flops, self._links[axes].size)

    def _exposed(
        self,
        hidden: float,
        busy: float,
        share: float,
    ) -> float:
        """Return the part of hidden communication that shows.

        Args:
          hidden: seconds of communication that runs while the device computes.
          busy: seconds of computing.
          share: of the communication that shows in any case.
        """
        if self.topology.platform == "cpu":
            return hidden
        return max(share * hidden, hidden - busy)

    def _waited(self) -> float:
        """Return the share of gathers and sums of parameters that is waited for."""
        if self.topology.platform != "tpu":
            return HIDDEN_SHARE
        return WAITED_SHARE if self.flags.get(FUSES) else 1.0

    def layout(self, assignment: Assignment) -> Layout:
        """Return how the assignment splits each value and operation."""
        return laid_out(self.names, assignment, self.prefers)

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
        seconds = moved / (self.chip.bandwidth * self.chip.memory_fraction)
        return seconds + self._core_seconds(assignment)

    def _core_seconds(self, assignment: Assignment) -> float:
        """Return the seconds of slow operations and of starting kernels on a CPU."""
        if self._slow is None:
            return 0.0
        once = self._kernels + self.sizes.total(assignment, self._slow)
        slower = cpu.waiting(self.chip.peak("float32"))
        return once * slower * assignment.micro_batches

    def _update(self, layout: Layout) -> float:
        """Return the seconds of the update's memory traffic.

        It reads the gradients, and reads and writes the parameters and their state.
        """
        moved = 0.0
        pairs = zip(layout.storage, self._optimizer, strict=True)
        for spec, (own, state) in pairs:
            mask = 0
            for axes in spec:
                mask |= axes
            moved += (3 * own + 2 * state) / layout.counts[mask]
        rate = self.chip.bandwidth * self.chip.memory_fraction
        if self.topology.platform != "cpu":
            return moved / rate
        slower = cpu.waiting(self.chip.peak("float32"))
        return moved / rate + self._arrays * cpu.ARRAY_SECONDS * slower

    def _add_state_moves(
        self,
        layout: Layout,
        shown: Joined,
        ledger: Ledger | None,
    ) -> None:
        """Add collectives that move parts of the state: rows, and Muon's matrices.

        Args:
          layout: how the program is split.
          shown: joined collectives, which are added to.
          ledger: likewise; None: nobody asks for causes.
        """
        moves = [
            (row.kind, row.axes, 1, row.bytes, row.path)
            for row in row_moves(self._trace, layout.storage, layout.counts)
        ]
        moves += [
            (stack.kind, stack.axes, stack.runs, stack.bytes, "Muon")
            for stack in stack_moves(self._trace, layout.storage, layout.counts)
        ]
        for number, (kind, axes, runs, size, cause) in enumerate(moves, len(self.jobs)):
            shown[number, kind, axes, runs] += size
            if ledger is not None:
                _enter(ledger, kind, axes, runs, size * runs, cause)

    def _orthogonal(self, layout: Layout) -> OrthogonalWork:
        """Return the products of Muon on one device."""
        devices = layout.counts[-1]
        if devices not in self._orthogonals:
            self._orthogonals[devices] = orthogonal_work(
                self._trace, self.chip, devices
            )
        return self._orthogonals[devices]

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
        form = (assignment.micro_batches, assignment.keep, assignment.ring)
        key = (number, *form, *chosen)
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
            collectives = self._compiled(moves, job, layout)
            return Work(0.0, 0.0, collectives)

        decision = layout.decide(job.op, job.product)
        # Gathers of stored values are jobs of their own.
        moves = tuple(
            move
            for move in decision.moves
            if not _gathers_stored(job.op, move)
            and not moved_before(layout, job.product, decision, move, job.earlier)
        )
        collectives = self._compiled(moves, job, layout)
        if job.op.name in (*KERNELS, *STAGED_KERNELS):
            return self._kernel(job.op, layout, decision, collectives)
        if decision.choice is not None:
            return self._own(job.op, decision, decision.choice, collectives)
        if job.op.name not in DOTS or job.product is None:
            return Work(0.0, 0.0, collectives)

        shape = self._matmul(job, job.product, layout, decision)
        if runs_densely(job.op, self.topology.platform):
            m, n, k, batch = shape
            shape = (m * batch, n * batch, k, 1)
        seconds = self._matmul_seconds(job, job.product, shape)
        m, n, k, batch = shape
        flops = 2.0 * m * n * k * batch * job.taps
        return Work(seconds, flops, collectives)

    def _kernel(
        self,
        op: Operation,
        layout: Layout,
        decision: Decision,
        collectives: tuple[Collective, ...],
    ) -> Work:
        """Return the work of attention on a device's samples and heads."""
        query = op.inputs[0]
        assert query is not None
        spec = decision.inputs.get(0, layout.use(query))
        share = layout.bytes(query, spec) / operations.size(query)
        devices = layout.counts[spec[LENGTH]]
        if devices == 1 or op.name in STAGED_KERNELS:
            whole = of_one_stage(op)
            flops = share * attention_flops(whole)
            seconds = attention_seconds(whole, self.chip) * share
            return Work(seconds + self.chip.op_seconds, flops, collectives)

        # the ring's devices have their own part of the length
        share *= devices
        flops = share * ring_flops(op, devices)
        seconds = share * ring_seconds(op, devices, self.chip)
        arrays = sum(move.kind == PASSED_ON for move in decision.moves)
        moved = []
        for collective, move in zip(collectives, decision.moves, strict=True):
            if move.kind == PASSED_ON:
                beside = seconds / (move.steps + 1) / arrays
                collective = collective._replace(beside=beside)
            moved.append(collective)
        return Work(seconds + self.chip.op_seconds, flops, tuple(moved))

    def _passed_on(self, move: Collective, ledger: Ledger) -> float:
        """Return the seconds of a ring's steps that its own products don't hide."""
        once = self._links[move.axes].seconds(move.kind, move.bytes)
        if (move.kind, move.axes) in ledger:
            ledger[move.kind, move.axes][2] += once * move.runs
        return move.runs * self._exposed(once, move.beside, HIDDEN_SHARE)

    def _own(
        self,
        op: Operation,
        decision: Decision,
        choice: Choice,
        collectives: tuple[Collective, ...],
    ) -> Work:
        """Return the work of an operation with a user's rule: a roofline."""
        chip = self.chip
        # XLA's CPU backend (jax 0.10 and 0.12) drops barriers, and merges two runs of a
        # forward pass on the same operands; on operands that are moved it does not
        # (`tools/plan.py recipes/lm.py --experts 8 --dropless --on cpu:8 --verify`).
        platform = self.topology.platform
        merged = platform == "cpu" and not decision.inputs
        flops = choice.share * own_flops(op.eqn, platform, merged)
        computes = flops / (chip.peak(op.outputs[0].dtype) * chip.matmul_fraction)
        moved = choice.share * own_bytes(op.eqn)
        moves = moved / (chip.bandwidth * chip.memory_fraction)
        seconds = max(computes, moves) + chip.op_seconds
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
            self.flags,
        )
        value = job.gather or moved_value(job.op, job.product, move)
        bytes_ = move.bytes * self.motion.sent_share(job.op, value, move.kind)
        if kind == "all-reduce" and job.share < 1:
            bytes_ *= job.share
        bytes_ /= move.steps
        hidden = job.gather is not None or (
            move.where.startswith(("out", "result")) and value.stored is not None
        )
        # XLA's CPU backend joins all reductions of gradients, and no all-gathers.
        if self.topology.platform == "cpu" and self.motion.is_summed(value):
            hidden = True
        if kind == "all-gather" and self.topology.platform == "cpu":
            hidden = False
        runs = self.motion.runs(
            job.op,
            value,
            move.kind,
            layout.parts,
        )
        return Collective(kind, move.axes, bytes_, hidden, runs * move.steps)

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
        if self.topology.platform == "cpu":
            return self._on_a_cpu(job.op, shape, seconds)
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

    def _on_a_cpu(
        self,
        op: Operation,
        shape: tuple[int, int, int, int],
        seconds: float,
    ) -> float:
        """Return the seconds of a product on a CPU, given those by the roofline."""
        slower = cpu.waiting(self.chip.peak("float32"))
        seconds += (slower - 1) * self.chip.op_seconds
        m, n, k, batch = shape
        flops = 2.0 * m * n * k * batch
        reached = self.chip.peak(op.outputs[0].dtype) * self.chip.matmul_fraction
        at_peak = flops / reached
        if op.name == "dot_general":
            slowdown = cpu.product_slowdown(op, (m, n, k))
            slowdown *= cpu.shared_slowdown(flops, self.chip.peak("float32"))
            return seconds + at_peak * (slowdown - 1)
        if op.name != "conv_general_dilated":
            return seconds
        if op.params["batch_group_count"] > 1 and batch > 1:
            return flops * batch / cpu.BATCH_GROUPED_FLOPS * slower
        return seconds + at_peak * (cpu.convolution_slowdown(op) - 1)

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
        inputs = decision.inputs
        sides = (
            (left, inputs.get(product.left, layout.use(left))),
            (right, inputs.get(product.right, layout.use(right))),
            (out, decision.natural or layout.spec(out)),
        )

        shape = _Shape()
        for index in product.indices:
            extent = self._extent(sides, index, layout)
            if product.groups > 1 and index is product.indices[0]:
                assert index.left is not None and index.right is not None
                shares = product.groups * extent / left.shape[index.left]
                columns = right.shape[index.right] / product.groups
                by_batch = op.params["batch_group_count"] > 1
                shape.add_groups(shares, columns, extent, by_batch)
            else:
                shape.add(index, extent)

        if op.name == "conv_general_dilated":
            numbers = op.params["dimension_numbers"]
            places = numbers.out_spec[2:]
            window = numbers.rhs_spec[2:]
            shape.m *= math.prod(out.shape[d] for d in places)
            shape.k *= math.prod(right.shape[d] for d in window)
        return shape.rounded()

    def _extent(
        self,
        sides: tuple[tuple[Value, Spec], ...],
        index: Index,
        layout: Layout,
    ) -> float:
        """Return the extent of a product's index on a device, in one micro-batch."""
        number = next(i for i, dim in enumerate(index) if dim is not None)
        value, spec = sides[number]
        dim = index[number]
        assert dim is not None
        extent = value.shape[dim] / layout.counts[spec[dim]]
        if layout.parts > 1:
            root = self.graph.find(value.nodes[dim])
            if self.names.of.get(root) in self.names.samples:
                extent /= layout.parts
        return extent


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
        extents = (
            self.m,
            self.n,
            self.k,
            self.batch,
        )
        m, n, k, batch = (max(1, round(extent)) for extent in extents)
        return m, n, k, batch


def runs_densely(
    op: Operation,
    platform: str,
) -> bool:
    """Whether XLA computes a grouped convolution as if it had one group.

    The gradient of a depthwise kernel is a convolution of as many groups of the batch
    as it has channels. The CPU backend of jaxlib 0.10 multiplies each channel with each
    other and keeps the diagonal; seen for 32 to 96 channels in one and two dims. A
    gradient with several channels a group is computed group by group.
    """
    if op.name != "conv_general_dilated" or platform != "cpu":
        return False
    groups = op.params["batch_group_count"]
    return groups > 1 and groups == op.outputs[0].shape[_out_channel(op)]


def _out_channel(op: Operation) -> int:
    return op.params["dimension_numbers"].out_spec[1]


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
    number = int(move.where.removeprefix("input "))
    value = op.inputs[number]
    return value is not None and value.stored is not None


def _note(
    ledger: Ledger,
    move: Collective,
    job: Job,
) -> None:
    """Count a collective, and the line that needs it."""
    count = move.runs * job.count // job.op.times
    place = source_line(job.op.eqn, job.op.callers)
    cause = f"{job.op.name} at {place.rsplit('/', 1)[-1]}"
    _enter(ledger, move.kind, move.axes, count, move.bytes * count, cause)


def _enter(
    ledger: Ledger,
    kind: str,
    axes: int,
    count: int,
    sent: float,
    cause: str,
) -> None:
    """Add collectives of one cause to a ledger."""
    entry = ledger.setdefault((kind, axes), [0, 0.0, 0.0, {}])
    entry[0] += count
    entry[1] += sent
    causes = entry[3]
    causes[cause] = causes.get(cause, 0.0) + sent


def as_compiled(
    kind: str,
    count: int,
    topology: Topology,
    flags: Mapping[str, Any] | None = None,
) -> str:
    """Return the collective that XLA makes of one over `count` devices.

    Its CPU backend has no reduce-scatter (jaxlib 0.10 and 0.12). On a TPU it has none
    over the whole of a square torus of `WHOLE_TORUS` chips or more either, nor an
    all-gather over the whole of a cube, unless a flag keeps it.

    Args:
      kind: such as "all-gather".
      count: devices.
      topology: where they are.
      flags: XLA's, as in `Plan`.
    """
    if topology.platform == "cpu":
        return "all-reduce" if kind == "reduce-scatter" else kind
    torus = topology.chip.torus
    shape = topology.shape
    square = torus and len(shape) == torus and len(set(shape)) == 1
    chips = topology.chips // topology.slices
    whole = count * topology.slices == topology.devices and chips >= WHOLE_TORUS
    loses_gathers = torus == 3 and not (flags or {}).get(KEEPS_GATHERS)
    missing = ("reduce-scatter", "all-gather") if loses_gathers else ("reduce-scatter",)
    return "all-reduce" if square and whole and kind in missing else kind


def optimizer_bytes(
    trace: Trace,
    names: Names,
) -> list[tuple[float, float]]:
    """Return (its bytes, the bytes of its optimizer state) for each parameter.

    Of an embedding that is updated by rows, they are those of the rows that a step
    touches.
    """
    params = by_path(trace.state.params)
    tables = trace.tables.tables
    shares = {path: table.slots / table.size for path, table in tables.items()}
    state: dict[str, float] = defaultdict(float)
    leaves = by_path({"optimizer": trace.state.optimizer})
    for path, leaf in leaves.items():
        # An array of the state ends in the path of its parameter.
        tail = path
        while "/" in tail:
            _, _, tail = tail.partition("/")
            if tail in params:
                state[tail] += nbytes(leaf)
                break
    moved = []
    for path, leaf in params.items():
        share = shares.get(path, 1.0)
        moved.append((nbytes(leaf) * share, state[path] * share))
    return moved

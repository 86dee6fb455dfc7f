"""The work of a graph as a list of jobs: operations that are alike are one.

Take the gradient of an MLP of two layers. It has five matmuls: two in the forward pass,
two that give the kernels' gradients, and one that leads from the second layer back to
the first. Those that every assignment splits in the same way, such as the matmuls of
repeated layers, are one job with a count. A stored kernel has a job that gathers it,
for the case that it is stored split.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from lepton_jax.hardware import convolution_flops
from lepton_jax.planner.estimate.motion import Motion
from lepton_jax.planner.estimate.pads import Pads
from lepton_jax.planner.estimate.reads import Earlier, Reads
from lepton_jax.planner.program.graph import Operation, Region, Value
from lepton_jax.planner.program.kernels import KERNELS
from lepton_jax.planner.program.layout import Contraction, contraction
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.rewrite.own import OWN_OPERATIONS
from lepton_jax.planner.rewrite.stage_moves import MOVES
from lepton_jax.planner.rewrite.staged_attention import STAGED_KERNELS
from lepton_jax.planner.xla.operations import DOTS, operands


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
      repeats: whether earlier operations compute the same (`equal.repeated`).
      earlier: products that read the same operands before (`reads`).
    """

    op: Operation
    product: Contraction | None
    count: int
    groups: tuple[int, ...]
    loop: int
    share: float
    gather: Value | None = None
    taps: float = 1.0
    repeats: bool = False
    earlier: Earlier = field(default_factory=dict)


class Jobs:
    """Collects the jobs of a graph.

    Args:
      names: the graph's named axes.
      prefers: for a value, the dim that gets its mesh axes first.
      shares: see `sum_shares`.
      motion: how collectives leave loops.
      repeated: first results of operations that equal earlier ones.

    Attributes:
      jobs: the jobs, in the program's order of the first operation of each.
    """

    def __init__(
        self,
        names: Names,
        prefers: dict[int, int],
        shares: dict[int, float],
        motion: Motion,
        repeated: Collection[int] = (),
    ):
        self.names = names
        self.motion = motion
        self.graph = names.graph
        self.prefers = prefers
        self.shares = shares
        self.repeated = repeated
        self.jobs: list[Job] = []
        self._known: dict[tuple, Job] = {}
        self._gathered: set[int] = set()
        self._loops = 0
        self._pads = Pads(motion.platform)
        self._reads = Reads(motion.platform)
        self._walk(self.graph.main, 0)

    def _walk(
        self,
        region: Region,
        loop: int,
    ) -> None:
        self._pads.enter(region)
        for op in region.operations:
            self._pads.follow(op)
            # What is in a loop without steps never runs.
            if not op.times:
                continue
            product = contraction(op)
            values = operands(op) + op.outputs[:1]
            # An empty array computes and moves nothing.
            empty = any(0 in v.shape for v in values)
            has_rule = op.name in (*OWN_OPERATIONS, *MOVES)
            if (product is not None or op.whole or has_rule) and not empty:
                self._add(op, product, loop, values, None)
            if not op.regions and any(v.stored is None for v in op.outputs):
                self._add_gathers(op, loop)
            if op.regions:
                self._loops += 1
                inside = self._loops
                for inner in op.regions:
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
            index = value.index
            if index in self._gathered and index not in self.graph.lasting:
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
        earlier = self._reads.before(op, product)
        before = [read.op for reads in earlier.values() for read in reads]
        involved = [v for o in before for v in (*operands(o), *o.outputs)]
        groups = self._groups([*values, *involved])
        computes = {*DOTS, *KERNELS, *STAGED_KERNELS, *OWN_OPERATIONS}
        if not groups and op.name not in computes:
            return
        looks = self._looks(op, values)
        taps = used_taps(op, self._pads.before(op))
        share = 1.0
        repeats = False
        # A print has no outputs.
        if op.outputs:
            share = self.shares.get(op.outputs[0].index, 1.0)
            repeats = op.outputs[0].index in self.repeated
        key = (
            op.name,
            op.times,
            product,
            looks,
            gather is not None,
            loop,
            share,
            taps,
            repeats,
            self._looks_of(earlier),
            op.params.get("own") if op.name in OWN_OPERATIONS else None,
        )
        if key in self._known:
            self._known[key].count += op.times
            return
        job = Job(
            op=op,
            product=product,
            count=op.times,
            groups=groups,
            loop=loop,
            share=share,
            gather=gather,
            taps=taps,
            repeats=repeats,
            earlier=earlier,
        )
        self._known[key] = job
        self.jobs.append(job)

    def _groups(self, values: list[Value]) -> tuple[int, ...]:
        """Return the named axes of some values, and of the parameters behind them."""
        numbers: dict[int, None] = {}
        for value in values:
            nodes = list(value.nodes)
            if value.stored is not None:
                nodes += self.graph.main.inputs[value.stored[0]].nodes
            for node in nodes:
                root = self.graph.find(node)
                if root in self.names.of:
                    numbers[self.names.of[root]] = None
        return tuple(numbers)

    def _looks(self, op: Operation, values: list[Value]) -> tuple:
        """Return what makes the values of an operation like those of another."""
        return tuple(
            (*self._look(value), *self.motion.look(op, value)) for value in values
        )

    def _looks_of(self, earlier: Earlier) -> tuple[Any, ...]:
        """Return what makes earlier reads like those of another operation."""
        looks = []
        for number, reads in earlier.items():
            for read in reads:
                op = read.op
                values = operands(op) + op.outputs[:1]
                own = (op.name, contraction(op), read.number)
                looks.append((number, *own, self._looks(op, values)))
        return tuple(looks)

    def _look(self, value: Value) -> tuple:
        """Return what makes a value like others for the cost."""
        names = self.names
        roots = map(self.graph.find, value.nodes)
        groups = tuple(names.of.get(root) for root in roots)
        stored: tuple | None = None
        if value.stored:
            parameter, dims = value.stored
            stored = (names.patterns[parameter], dims)
        prefers = self.prefers.get(value.index)
        return value.shape, str(value.dtype), groups, stored, prefers


def used_taps(
    op: Operation,
    pad: Operation | None = None,
) -> float:
    """Return the share of a convolution's taps that meet an element of its input.

    The others meet padding or a hole of a dilated input. It is 1 for anything else.

    Args:
      op: an operation.
      pad: what pads its input with zeros, if XLA makes that the convolution's padding.
    """
    if op.name != "conv_general_dilated":
        return 1.0
    left, right = (value.shape for value in operands(op)[:2])
    out = op.outputs[0].shape
    params = op.params
    numbers = params["dimension_numbers"]
    if pad is not None:
        left = operands(pad)[0].shape
        added = [pad.params["padding_config"][d] for d in numbers.lhs_spec[2:]]
        pairs = zip(params["padding"], added, strict=True)
        wider = [(low + a, high + b) for (low, high), (a, b, _) in pairs]
        params = {**params, "padding": tuple(wider)}
    output_channels = right[numbers.rhs_spec[0]]
    kernel = math.prod(right) / output_channels
    all_taps = 2.0 * math.prod(out) * kernel
    return convolution_flops(params, left, right, out) / all_taps


def sum_shares(region: Region) -> dict[int, float]:
    """Return the share that each matmul has in a sum of several.

    XLA reduces such a sum over the devices once, so each of n terms counts for 1/n.

    Returns:
      For the index of a term's value, one over the number of terms.
    """
    shares: dict[int, float] = {}
    users: dict[int, list[Operation]] = defaultdict(list)
    for op in region.operations:
        for value in op.inputs:
            if value is not None:
                users[value.index].append(op)
        for inner in op.regions:
            shares.update(sum_shares(inner))

    # From the end, since a sum may itself be a term of a larger one.
    totals: dict[int, int] = {}
    terms: dict[int, list[int]] = defaultdict(list)
    for op in reversed(region.operations):
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

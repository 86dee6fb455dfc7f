"""When each value of a program is in memory: XLA's schedule, imitated on what its
fusion leaves of the graph.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from lepton_jax.hardware import convolution_flops
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.xla.backends import CpuFusion, TpuFusion
from lepton_jax.planner.xla.fusion import (
    GATHERED,
    GATHERED_HALF,
    LANES,
    Fusion,
    Group,
    size,
)


class Timeline:
    """When each buffer of a program is there.

    Args:
      graph: of loss and gradients.
      platform: "cpu", "tpu" or "gpu".
      windowed, eager: see `TpuFusion`.

    Attributes:
      values: index of the value behind each buffer.
      kinds: how its bytes follow from its value's (see `fusion`).
      starts, ends: first and last moment of each buffer, inclusive.
      cuts: the moment at which a loop takes a buffer in, else its end.
      owners: for each buffer the operation that made it.
      summed: which of them no loop makes.
      moved: which buffers a collective fills or reads, and tables.
      made: which of them anything makes; one that merged with another is not.
      works: moments of products, `flops` what they compute in all and `operands` the
        values of both operands and of the result.
      weighing: of products that give a kernel's gradient, the values of both operands
        and of the result.
      extents: bytes of each whole value of the graph; `numbers`: of one number of it.
      moves: a group's moment and a buffer that it reads or writes, (n, 2).
      across: which buffers are there before a loop and after it.
      gradients: which buffers hold a gradient until the optimizer takes it.
      fixed: which of them XLA computes before a loop around the program.
      conditions: buffers that are there if a value, of that index, is "ungathered" or
        "unsplit".
      tables: buffers of a parameter and of the optimizer's state of it, in another
        layout: whose they are.
      padding: how many times its size a buffer takes with rows padded to the vector's
        width.
      itemsizes: bytes of a number of its value.
      length: moments.
    """

    def __init__(
        self,
        graph: Graph,
        platform: str,
        windowed: bool = False,
        eager: bool = False,
    ):
        self.graph = graph
        self.platform = platform
        self._variants: dict[tuple[bool, bool], Timeline] = {(windowed, eager): self}
        if platform == "tpu":
            fusion: Fusion = TpuFusion(graph, windowed, eager)
        else:
            fusion = CpuFusion(graph) if platform == "cpu" else Fusion(graph)
        self.owners = fusion.owners
        count = len(fusion.values)
        self.values = np.array(fusion.values, np.int64)
        self.kinds = np.array(fusion.kinds, np.int64)
        self.starts = np.zeros(count, np.int64)
        self.ends = np.full(count, -1)
        self.cuts = np.full(count, np.iinfo(np.int64).max)
        self._over: dict[int, int] = {}
        self._loops: list[tuple[int, int]] = []
        self._works: list[tuple[int, Operation]] = []
        self._moves: list[tuple[int, int]] = []
        order = _put_off if windowed else _as_ready if platform == "cpu" else list
        self.length = self._run(fusion.groups, 0, order) + 3
        for b, moment in self._over.items():
            if self.ends[b] == moment:
                self.ends[b] -= 1
        self.ends = np.maximum(self.starts, self.ends)
        self.cuts = np.minimum(self.cuts, self.ends)
        self.conditions = fusion.conditions
        self.tables = {b: parameter for parameter, b in fusion.tables.items()}
        self.fixed = np.isin(np.arange(count), fusion.fixed)
        self.gradients = np.zeros(count, bool)
        self.gradients[fusion.gradients] = True
        self.summed = self.gradients & np.array(
            [op is not None and op.name != "scan" for op in fusion.owners], bool
        )
        self.moved = np.isin(self.kinds, (GATHERED, GATHERED_HALF)) | np.isin(
            np.arange(count), fusion.lying
        )
        self.made = self.starts > 0
        works = [(clock, op) for clock, op in self._works if None not in op.inputs[:2]]
        self.works = np.array([clock for clock, _ in works], np.int64)
        self.flops = np.array([flops(op) for _, op in works])
        self.operands = np.array(
            [
                [v.index for v in (*op.inputs[:2], op.outputs[0]) if v]
                for _, op in works
            ],
            np.int64,
        ).reshape(-1, 3)
        self.extents = np.array([max(1, size(v)) for v in graph.values], float)
        self.numbers = np.array([itemsize(v) for v in graph.values], float)
        self.moves = np.array(self._moves, np.int64).reshape(-1, 2)
        self.across = np.zeros(count, bool)
        for begun, ended in self._loops:
            self.across |= (self.starts < begun) & (self.ends > ended)
        last = np.array(
            [
                graph.values[v].shape[-1] if graph.values[v].shape else 1
                for v in fusion.values
            ],
            np.int64,
        )
        self.padding = -(-last // LANES) * LANES / np.maximum(last, 1)
        self.weighing = np.array(fusion.weighing, np.int64).reshape(-1, 3)
        self.itemsizes = np.array(
            [itemsize(graph.values[v]) for v in fusion.values], np.int64
        )

    def variant(
        self,
        windowed: bool,
        eager: bool,
    ) -> Timeline:
        """The same program in another order."""
        if (windowed, eager) not in self._variants:
            self._variants[windowed, eager] = Timeline(
                self.graph, self.platform, windowed, eager
            )
        return self._variants[windowed, eager]

    def value(self, buffer: int) -> Value:
        return self.graph.values[self.values[buffer]]

    def _run(
        self,
        groups: list[Group],
        clock: int,
        order: Callable[[list[Group]], list[Group]],
    ) -> int:
        """Give each group its moment, from `clock` on; returns the last."""
        for group in order(groups):
            clock += 2
            if group.product is not None:
                self._works.append((clock, group.product))
            self._moves += [(clock, b) for b in {*group.reads, *group.writes}]
            for b in group.writes:
                self.starts[b] = self.ends[b] = clock
            for b in group.places:
                self._over[b] = clock
                self.ends[b] = max(self.ends[b], clock)
            if group.body is not None:
                begun = clock
                for b in (*group.reads, *group.writes, *group.places, *group.updates):
                    self.cuts[b] = min(self.cuts[b], clock)
                clock = self._run(group.body, clock, order) + 2
                self._loops.append((begun, clock))
                for b in group.writes:
                    self.ends[b] = clock
            for b in (*group.reads, *group.updates):
                self.ends[b] = max(self.ends[b], clock)
        return clock


def flops(op: Operation) -> float:
    """Of a whole product."""
    (left, right), out = (
        (v.shape for v in op.inputs[:2] if v is not None),
        op.outputs[0].shape,
    )
    if op.name == "conv_general_dilated":
        return convolution_flops(op.params, left, right, out)
    return (
        2.0
        * math.prod(out)
        * math.prod(left[d] for d in op.params["dimension_numbers"][0][0])
    )


def _put_off(groups: list[Group]) -> list[Group]:
    """libtpu's scheduler keeps the chain from layer to layer together. Gradients that
    are summed while they are computed come behind the last product with a kernel that
    any of them needs, and products that none of them needs, as those that lead to an
    embedding's gradient, behind them.
    """
    begun = next((i for i, group in enumerate(groups) if group.late), len(groups))
    end = begun
    wanted: set[int] = set()
    needed: set[Group] = set()
    for i in reversed(range(begun, len(groups))):
        group = groups[i]
        if group.late or not wanted.isdisjoint((*group.writes, *group.updates)):
            wanted.update(
                (
                    *group.reads,
                    *group.places,
                    *group.updates,
                )
            )
            needed.add(group)
            if (
                not group.late
                and group.product is not None
                and any(v is not None and v.stored for v in group.product.inputs)
            ):
                end = max(end, i + 1)
    parts: tuple[list[Group], ...] = groups[:begun], [], []
    made: dict[int, int] = {}  # buffers to their part
    for group in groups[begun:end]:
        after = max(
            (made.get(b, 0) for b in (*group.reads, *group.places, *group.updates)),
            default=0,
        )
        part = (
            1
            if group.late
            else 0
            if group in needed
            else 2
            if group.product is not None
            else after
        )
        parts[part].append(group)
        made.update((b, part) for b in group.writes)
    return [
        *parts[0],
        *parts[1],
        *parts[2],
        *groups[end:],
    ]


def _as_ready(groups: list[Group]) -> list[Group]:
    """Groups in the order in which what they read gets ready: XLA's CPU backend
    schedules for concurrency.
    """
    makers: dict[int, int] = {}
    users: list[list[int]] = [[] for _ in groups]
    missing = []
    for i, group in enumerate(groups):
        needs = {
            makers[b]
            for b in (*group.reads, *group.places, *group.updates)
            if b in makers
        }
        makers.update((b, i) for b in (*group.writes, *group.updates))
        missing.append(len(needs))
        for j in needs:
            users[j].append(i)
    users = [sorted(following, key=lambda j: groups[j].late) for following in users]
    order = []
    ready = deque(i for i, n in enumerate(missing) if not n)
    while ready:
        i = ready.popleft()
        order.append(groups[i])
        for j in users[i]:
            missing[j] -= 1
            if not missing[j]:
                ready.append(j)
    assert len(order) == len(groups), "a group that waits for itself"
    return order

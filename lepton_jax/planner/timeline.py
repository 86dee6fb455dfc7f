"""When each value of a program is in memory: XLA's schedule, imitated on what its fusion leaves of the graph."""

from __future__ import annotations

from collections import deque

import numpy as np

from lepton_jax.planner.fusion import GATHERED, GATHERED_HALF, LANES, Fusion, Group
from lepton_jax.planner.fusion_backends import CpuFusion, TpuFusion
from lepton_jax.planner.graph import Graph, Value
from lepton_jax.planner.layout import itemsize


class Timeline:
    """When each buffer of a program is there.

    Args:
      graph: of loss and gradients.
      platform: "cpu", "tpu" or "gpu".

    Attributes:
      values: index of the value behind each buffer.
      kinds: how its bytes follow from its value's (see `fusion`).
      starts, ends: first and last moment of each buffer, inclusive.
      cuts: the moment at which a loop takes a buffer in, else its end.
      owners: for each buffer the operation that made it.
      summed: which of them no loop makes.
      moved: which buffers a collective fills or reads, and tables.
      made: which of them anything makes; one that merged with another is not.
      products: how many products are computed while a buffer is only kept.
      across: which buffers are there before a loop and after it.
      gradients: which buffers hold a gradient until the optimizer takes it.
      fixed: which of them XLA computes before a loop around the program.
      conditions: buffers that are there if a value, of that index, is "gathered", "ungathered" or "unsplit".
      tables: buffers of a parameter and of the optimizer's state of it, in another layout: whose they are.
      padding: how many times its size a buffer takes with rows padded to the vector's width.
      itemsizes: bytes of a number of its value.
      length: moments.
    """

    def __init__(self, graph: Graph, platform: str):
        self.graph, self.platform = graph, platform
        fusion = {"cpu": CpuFusion, "tpu": TpuFusion}.get(platform, Fusion)(graph)
        self.owners = fusion.owners
        count = len(fusion.values)
        self.values, self.kinds = np.array(fusion.values, np.int64), np.array(fusion.kinds, np.int64)
        self.starts, self.ends = np.zeros(count, np.int64), np.full(count, -1)
        self.cuts = np.full(count, np.iinfo(np.int64).max)
        self._over: dict[int, int] = {}
        self._loops: list[tuple[int, int]] = []
        self._products: list[int] = []
        self.length = self._run(fusion.groups, 0, platform == "cpu") + 3
        for b, moment in self._over.items():
            if self.ends[b] == moment:
                self.ends[b] -= 1
        self.ends = np.maximum(self.starts, self.ends)
        self.cuts = np.minimum(self.cuts, self.ends)
        self.conditions, self.tables = fusion.conditions, {b: parameter for parameter, b in fusion.tables.items()}
        self.fixed = np.isin(np.arange(count), fusion.fixed)
        self.gradients = np.zeros(count, bool)
        self.gradients[fusion.gradients] = True
        self.summed = self.gradients & np.array([op is not None and op.name != "scan" for op in fusion.owners], bool)
        self.moved = np.isin(self.kinds, (GATHERED, GATHERED_HALF)) | np.isin(np.arange(count), fusion.lying)
        self.made = self.starts > 0
        products = np.array(self._products, np.int64)
        self.products = np.searchsorted(products, self.ends, "left") - np.searchsorted(products, self.starts, "right")
        self.across = np.zeros(count, bool)
        for begun, ended in self._loops:
            self.across |= (self.starts < begun) & (self.ends > ended)
        last = np.array([graph.values[v].shape[-1] if graph.values[v].shape else 1 for v in fusion.values], np.int64)
        self.padding = -(-last // LANES) * LANES / np.maximum(last, 1)
        self.itemsizes = np.array([itemsize(graph.values[v]) for v in fusion.values], np.int64)

    def value(self, buffer: int) -> Value:
        return self.graph.values[self.values[buffer]]

    def _run(self, groups: list[Group], clock: int, eager: bool) -> int:
        """Give each group its moment, from `clock` on; returns the last."""
        for group in _as_ready(groups) if eager else groups:
            clock += 2
            if group.product:
                self._products.append(clock)
            for b in group.writes:
                self.starts[b] = self.ends[b] = clock
            for b in group.places:
                self._over[b] = clock
                self.ends[b] = max(self.ends[b], clock)
            if group.body is not None:
                begun = clock
                for b in (*group.reads, *group.writes, *group.places, *group.updates):
                    self.cuts[b] = min(self.cuts[b], clock)
                clock = self._run(group.body, clock, eager) + 2
                self._loops.append((begun, clock))
                for b in group.writes:
                    self.ends[b] = clock
            for b in (*group.reads, *group.updates):
                self.ends[b] = max(self.ends[b], clock)
        return clock


def _as_ready(groups: list[Group]) -> list[Group]:
    """Groups in the order in which what they read gets ready: XLA's CPU backend schedules for concurrency."""
    makers: dict[int, int] = {}
    users: list[list[int]] = [[] for _ in groups]
    missing = []
    for i, group in enumerate(groups):
        needs = {makers[b] for b in (*group.reads, *group.places, *group.updates) if b in makers}
        makers.update((b, i) for b in (*group.writes, *group.updates))
        missing.append(len(needs))
        for j in needs:
            users[j].append(i)
    users = [sorted(following, key=lambda j: groups[j].late) for following in users]
    order, ready = [], deque(i for i, n in enumerate(missing) if not n)
    while ready:
        i = ready.popleft()
        order.append(groups[i])
        for j in users[i]:
            missing[j] -= 1
            if not missing[j]:
                ready.append(j)
    assert len(order) == len(groups), "a group that waits for itself"
    return order

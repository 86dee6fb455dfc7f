"""XLA's schedule, imitated: the moments at which each buffer is in memory.

The groups that `fusion` leaves of a graph get a moment each, two apart, so that there
is room in between. A buffer exists from the moment of the group that writes it to that
of the last group that reads it. The program of `fusion`'s example, `(tanh(x @ w) * 2 +
1).sum()`, has four groups and three buffers:

    >>> import jax, jax.numpy as jnp
    >>> from lepton_jax.planner.program.graph import Graph
    >>> def loss(w, x):
    ...     h = x @ w
    ...     return (jnp.tanh(h) * 2.0 + 1.0).sum()
    >>> w, x = jnp.ones((4, 8)), jnp.ones((16, 4))
    >>> graph = Graph(jax.make_jaxpr(loss)(w, x), parameters=1)
    >>> timeline = Timeline(graph, "gpu")
    >>> timeline.starts.tolist(), timeline.ends.tolist()
    ([2, 4, 6], [4, 6, 8])

The parameter is gathered at moment 2 and read by the product at 4; the product lasts
until the sum at 6; the sum lasts until the caller takes it at 8. At 4 both the gathered
parameter (if it is gathered at all) and the product exist, at 6 the product and the
sum. `heap` finds the peak of such spans.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from lepton_jax.hardware import convolution_flops
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.xla.buffers import BufferKind, Group
from lepton_jax.planner.xla.figures import LANES
from lepton_jax.planner.xla.fusion import Fusion
from lepton_jax.planner.xla.fusion_cpu import CpuFusion
from lepton_jax.planner.xla.fusion_tpu import TpuFusion
from lepton_jax.planner.xla.operations import operands, size

Order = Callable[[list[Group]], list[Group]]


class Timeline:
    """The moments at which each buffer of a program exists.

    Args:
      graph: the graph of loss and gradients.
      platform: "cpu", "tpu" or "gpu".
      windowed, eager, alone: see `TpuFusion`.

    Attributes of the buffers, each an array over the buffers:
      values: index of the value behind it.
      computed, gathered: see `BufferKind`.
      scales: how many times the value's bytes it takes.
      owners: the operation that made it (a list).
      starts, ends: its first and its last moment, inclusive.
      made: whether anything makes it; a buffer that merged with another is not made.
      summed: whether it is a gradient that no loop makes.
      in_hbm: whether it lies in the HBM in any case: what collectives fill, and tables.
      around_loop: whether it exists before a loop and after it.
      gradients: whether it holds a gradient until the optimizer takes it.
      hoisted: whether XLA computes it before a loop around the program.

    Attributes:
      conditions: see `Fusion`.
      tables: parameter of each buffer that copies its state to another layout.
      product_moments: moments of matmuls and convolutions, (products,).
      product_flops: FLOPs of each, unsharded.
      product_values: values of both operands and of the result, (products, 3).
      kernel_products: the same of products on TPU that give a kernel's gradient.
      value_bytes: bytes of each value of the graph, unsharded.
      number_bytes: bytes of one number of each value of the graph.
      accesses: (moment of a group, buffer that it reads or writes), (accesses, 2).
      length: moments in all.
    """

    def __init__(
        self,
        graph: Graph,
        platform: str,
        windowed: bool = False,
        eager: bool = False,
        alone: bool = False,
    ):
        self.graph = graph
        self.platform = platform
        key = (windowed, eager, alone)
        self._variants: dict[tuple[bool, ...], Timeline] = {key: self}

        order: Order = list
        fusion: Fusion
        if platform == "tpu":
            fusion = TpuFusion(graph, windowed, eager, alone)
            order = _put_off if windowed else list
        elif platform == "cpu":
            fusion = CpuFusion(graph)
            order = _as_ready
        else:
            fusion = Fusion(graph)

        clock = _Clock(len(fusion.values), order)
        self.length = clock.run(fusion.groups, 0) + 3
        self._take_spans(clock)
        self._take_buffers(fusion)
        self._take_products(clock, fusion)
        self.conditions = fusion.conditions
        self.tables = {b: parameter for parameter, b in fusion.tables.items()}
        value_bytes = [max(1, size(value)) for value in graph.values]
        number_bytes = [itemsize(value) for value in graph.values]
        self.value_bytes = np.array(value_bytes, float)
        self.number_bytes = np.array(number_bytes, float)

    def variant(
        self,
        windowed: bool,
        eager: bool,
        alone: bool = False,
    ) -> Timeline:
        """Return the timeline of the same program in another order."""
        key = (windowed, eager, alone)
        if key not in self._variants:
            self._variants[key] = Timeline(
                self.graph,
                self.platform,
                *key,
            )
        return self._variants[key]

    def value(self, buffer: int) -> Value:
        """Return the value behind a buffer."""
        return self.graph.values[self.values[buffer]]

    # ---- internals ----

    def _take_spans(self, clock: _Clock) -> None:
        self.starts = clock.starts
        self.ends = np.maximum(clock.starts, clock.final_ends())
        self.made = clock.starts > 0
        self.accesses = np.array(clock.accesses, np.int64).reshape(-1, 2)
        self.around_loop = np.zeros(len(self.starts), bool)
        for begin, end in clock.loops:
            self.around_loop |= (self.starts < begin) & (self.ends > end)

    def _take_buffers(self, fusion: Fusion) -> None:
        count = len(fusion.values)
        values = [self.graph.values[index] for index in fusion.values]
        kinds = fusion.kinds
        scales = [_scale(*pair) for pair in zip(kinds, values, strict=True)]
        self.owners = fusion.owners
        self.values = np.array(fusion.values, np.int64)
        self.computed = np.array([kind.computed for kind in kinds], bool)
        self.gathered = np.array([kind.gathered for kind in kinds], bool)
        self.scales = np.array(scales, float)
        self.gradients = _mask(fusion.gradients, count)
        self.hoisted = _mask(fusion.hoisted, count)
        self.in_hbm = self.gathered | _mask(fusion.in_hbm, count)
        straight = [op is not None and op.name != "scan" for op in fusion.owners]
        self.summed = self.gradients & np.array(straight, bool)

    def _take_products(
        self,
        clock: _Clock,
        fusion: Fusion,
    ) -> None:
        products = [
            (moment, op)
            for moment, op in clock.products
            if op.inputs[0] is not None and op.inputs[1] is not None
        ]
        moments = [moment for moment, _ in products]
        values = [_operands_and_result(op) for _, op in products]
        self.product_moments = np.array(moments, np.int64)
        self.product_flops = np.array([flops(op) for _, op in products])
        self.product_values = np.array(values, np.int64).reshape(-1, 3)
        kernels = np.array(fusion.kernel_products, np.int64)
        self.kernel_products = kernels.reshape(-1, 3)


def flops(op: Operation) -> float:
    """FLOPs of one unsharded matmul or convolution."""
    left, right = (value.shape for value in op.inputs[:2] if value is not None)
    out = op.outputs[0].shape
    if op.name == "conv_general_dilated":
        return convolution_flops(op.params, left, right, out)
    (contracted, _), _ = op.params["dimension_numbers"]
    return 2.0 * math.prod(out) * math.prod(left[d] for d in contracted)


def _operands_and_result(product: Operation) -> list[int]:
    """Return the indices of a product's two operands and of its result."""
    values = operands(product)[:2] + product.outputs[:1]
    return [value.index for value in values]


def _scale(kind: BufferKind, value: Value) -> float:
    """Return how many times its value's bytes a buffer takes."""
    scale = kind.scale
    if kind.padded:
        width = value.shape[-1] if value.shape else 1
        padded = -(-width // LANES) * LANES
        scale *= padded / max(width, 1)
    if kind.number_bytes is not None:
        scale *= kind.number_bytes / itemsize(value)
    return scale


def _mask(
    chosen: Sequence[int],
    count: int,
) -> np.ndarray:
    mask = np.zeros(count, bool)
    mask[list(chosen)] = True
    return mask


class _Clock:
    """Gives each group of a program its moment.

    Attributes:
      starts, ends: of each buffer, see `Timeline`.
      overwritten: the moment at which another buffer may take a buffer's place.
      loops: first and last moment of each loop.
      products: moment and operation of each matmul and convolution.
      accesses: moment of a group, and a buffer that it reads or writes.
    """

    def __init__(self, buffers: int, order: Order):
        self.order = order
        self.starts = np.zeros(buffers, np.int64)
        self.ends = np.full(buffers, -1)
        self.overwritten: dict[int, int] = {}
        self.loops: list[tuple[int, int]] = []
        self.products: list[tuple[int, Operation]] = []
        self.accesses: list[tuple[int, int]] = []

    def run(
        self,
        groups: list[Group],
        clock: int,
    ) -> int:
        """Give groups their moments, from `clock` on; return the last moment."""
        for group in self.order(groups):
            clock += 2
            self._start(group, clock)
            if group.body is not None:
                clock = self._run_loop(group, clock)
            for b in (*group.reads, *group.updates):
                self.ends[b] = max(self.ends[b], clock)
        return clock

    def final_ends(self) -> np.ndarray:
        """Return the ends, where a result takes the place of what its group read."""
        ends = self.ends.copy()
        for b, moment in self.overwritten.items():
            if ends[b] == moment:
                ends[b] -= 1
        return ends

    def _start(
        self,
        group: Group,
        clock: int,
    ) -> None:
        if group.product is not None:
            self.products.append((clock, group.product))
        self.accesses += [(clock, b) for b in {*group.reads, *group.writes}]
        for b in group.writes:
            self.starts[b] = clock
            self.ends[b] = clock
        for b in group.reuses:
            self.overwritten[b] = clock
            self.ends[b] = max(self.ends[b], clock)

    def _run_loop(
        self,
        group: Group,
        begin: int,
    ) -> int:
        """Run a loop's body once; its results exist from the loop's start on."""
        assert group.body is not None
        end = self.run(group.body, begin) + 2
        self.loops.append((begin, end))
        for b in group.writes:
            self.ends[b] = end
        return end


# ---- the order of groups ----


def _put_off(groups: list[Group]) -> list[Group]:
    """Order groups as libtpu does where it sums gradients while it computes them.

    libtpu's scheduler keeps the chain of products from layer to layer together. Take
    the backward pass of two layers and an embedding, in the program's order:

        d2  g2*  d1  g1*  e

    d2 and d1 are the products of the chain, g2 and g1 (late, *) the kernels' gradients,
    and e leads to the embedding's gradient. g1 needs d1, and d1 needs d2. The last
    product of the chain that a late group needs is d1, so g2 goes behind it:

        d2  d1  g2*  g1*  e

    A product before d1 that no late group needs goes behind the late ones, and what
    needs nothing but its results follows it.
    """
    begin = next((i for i, group in enumerate(groups) if group.late), len(groups))
    needed, end = _chain(groups, begin)
    parts: tuple[list[Group], ...] = ([], [], [])
    part_of: dict[int, int] = {}
    for group in groups[begin:end]:
        if group.late:
            part = 1
        elif group in needed:
            part = 0
        elif group.product is not None:
            part = 2
        else:
            part = max(
                (part_of.get(b, 0) for b in group.needs),
                default=0,
            )
        parts[part].append(group)
        part_of.update((b, part) for b in group.writes)

    chain, late, others = parts
    return [
        *groups[:begin],
        *chain,
        *late,
        *others,
        *groups[end:],
    ]


def _chain(
    groups: list[Group],
    begin: int,
) -> tuple[set[Group], int]:
    """Return the groups that late ones need, and the end of the chain among them.

    The end is the place after the last product with a kernel that a late group needs.
    """
    end = begin
    wanted: set[int] = set()
    needed: set[Group] = set()
    for i in reversed(range(begin, len(groups))):
        group = groups[i]
        if not group.late and wanted.isdisjoint((*group.writes, *group.updates)):
            continue
        wanted.update(group.needs)
        needed.add(group)
        if not group.late and _has_kernel(group.product):
            end = max(end, i + 1)
    return needed, end


def _has_kernel(product: Operation | None) -> bool:
    if product is None:
        return False
    return any(value is not None and value.stored for value in product.inputs)


def _as_ready(groups: list[Group]) -> list[Group]:
    """Order groups by when all that they read is ready.

    XLA's CPU backend schedules for concurrency: what can start, starts. In this program
    the third group needs nothing, so it runs before the second:

        >>> first, second, third = Group([], [0]), Group([0], [1]), Group([], [2])
        >>> order = _as_ready([first, second, third])
        >>> [group.writes for group in order]
        [(0,), (2,), (1,)]
    """
    makers: dict[int, int] = {}
    users: list[list[int]] = [[] for _ in groups]
    missing: list[int] = []
    for i, group in enumerate(groups):
        before = {makers[b] for b in group.needs if b in makers}
        makers.update((b, i) for b in (*group.writes, *group.updates))
        missing.append(len(before))
        for j in before:
            users[j].append(i)
    for following in users:
        following.sort(key=lambda j: groups[j].late)

    order = []
    ready = deque(i for i, count in enumerate(missing) if not count)
    while ready:
        i = ready.popleft()
        order.append(groups[i])
        for j in users[i]:
            missing[j] -= 1
            if not missing[j]:
                ready.append(j)
    assert len(order) == len(groups), "a group that waits for itself"
    return order

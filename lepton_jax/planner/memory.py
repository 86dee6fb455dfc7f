"""Peak memory of a train step on one device, predicted from the graph of its gradient before anything is compiled.

Each value gets a buffer and an interval on one timeline of the program; what XLA fuses into its consumers gets none, and
keeps alive what it is computed from instead. Bytes come in last, so that many layouts share a timeline.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from lepton_jax.compat import scan_counts, source_line
from lepton_jax.hardware import Topology
from lepton_jax.planner import assemble
from lepton_jax.planner.assemble import Assignment
from lepton_jax.planner.graph import BARRIER, Block, Graph, Operation, Value
from lepton_jax.planner.layout import itemsize, meets_stored
from lepton_jax.planner.named import Names
from lepton_jax.planner.rules import ELEMENTWISE
from lepton_jax.planner.trace import Trace
from lepton_jax.state import by_path, nbytes

ALIASES = {"reshape", "squeeze", "expand_dims", BARRIER, "name", "copy", "copy_p", "stop_gradient", "sharding_constraint",
           "bitcast_convert_type", "random_wrap", "random_unwrap"}
FREE = {"iota", "empty", "create_token", "axis_index"}
FUSIBLE = {*ELEMENTWISE, "broadcast_in_dim", "concatenate", "dynamic_slice", "pad", "rev", "slice", "split", "transpose"} - ALIASES


class Timeline:
    """When each value of a program is in memory.

    Args:
      graph: of loss and gradients.
      platform: "cpu", "tpu" or "gpu".

    Attributes:
      values: index of the value behind each buffer.
      starts, ends: first and last moment of each buffer, inclusive.
      gathered: which buffers hold a stored value as it is used, not as it is kept.
      owners: for each buffer the operation that made it; None for inputs.
    """

    def __init__(self, graph: Graph, platform: str):
        self.graph, self.platform = graph, platform
        self._clock = 0
        self._buffers: list[list[int]] = []  # value, start, end, gathered
        self._shared: dict[int, int] = {}
        self.owners: list[Operation | None] = []
        self._near: dict[int, tuple[int, ...]] = {}  # what an operation that can't fuse reads of a value
        self._far: dict[int, tuple[int, ...]] = {}  # what a fused operation reads of it
        self._users: dict[int, list[Operation | None]] = {}
        self._count(graph.block)
        block = graph.block
        for value in (*block.inputs, *block.constants):
            self._near[value.index] = self._far[value.index] = ()
        self._block(block)
        self._use(self._read(v) for v in block.results if isinstance(v, Value))
        for b, moment in self._shared.items():
            if self._buffers[b][2] == moment:
                self._buffers[b][2] -= 1
        table = np.array(self._buffers, np.int64).reshape(-1, 4)
        self.values, self.starts, self.ends, self.gathered = table.T[0], table.T[1], table.T[2], table.T[3].astype(bool)
        self.length = self._clock + 2
        results = {v.index for v in block.results if isinstance(v, Value)}
        self.is_gradient = np.array([self.graph.values[v].stored is not None and v in results for v in self.values], bool)

    def peak(self, kept: np.ndarray, used: np.ndarray) -> tuple[float, int, np.ndarray]:
        """The greatest sum of bytes alive at once.

        Args:
          kept: bytes on a device of each value of the graph, as it lies; float (values,).
          used: the same of stored values as they are used.

        Returns:
          The peak in bytes, its moment, and the bytes of each buffer.
        """
        sizes = np.where(self.gathered, used[self.values], kept[self.values])
        change = np.bincount(self.starts, sizes, self.length) - np.bincount(self.ends + 1, sizes, self.length)
        alive = np.cumsum(change)
        moment = int(alive.argmax()) if len(alive) else 0
        return float(alive[moment]) if len(alive) else 0.0, moment, sizes

    # ---- building -------------------------------------------------------------------------------------------------

    def _count(self, block: Block) -> None:
        for op in block.operations:
            for value in op.inputs:
                if value is not None:
                    self._users.setdefault(value.index, []).append(op)
            for inner in op.blocks:
                self._count(inner)
        for value in block.results:
            if isinstance(value, Value):
                self._users.setdefault(value.index, []).append(None)

    def _new(self, value: Value, op: Operation | None, start: int, gathered: bool = False) -> int:
        self._buffers.append([value.index, start, start, int(gathered)])
        self.owners.append(op)
        return len(self._buffers) - 1

    def _own(self, value: Value, op: Operation | None, start: int) -> None:
        self._near[value.index] = self._far[value.index] = (self._new(value, op, start),)

    def _read(self, value: Value) -> tuple[int, ...]:
        return self._near.get(value.index, ())

    def _use(self, sources: Iterable[tuple[int, ...]]) -> None:
        for group in sources:
            for b in group:
                self._buffers[b][2] = max(self._buffers[b][2], self._clock)

    def _block(self, block: Block) -> None:
        for op in block.operations:
            self._clock += 2
            if op.name == "scan":
                self._scan(op)
            elif op.blocks:
                self._branches(op)
            else:
                self._operation(op)

    def _operation(self, op: Operation) -> None:
        inputs = [v for v in op.inputs if v is not None]
        if op.name in ALIASES and len(inputs) == len(op.outputs):
            for source, target in zip(inputs, op.outputs, strict=True):
                self._near[target.index], self._far[target.index] = self._near[source.index], self._far[source.index]
            return
        if op.name in FREE or not inputs:
            for target in op.outputs:
                self._near[target.index] = self._far[target.index] = ()
            return
        if op.name in FUSIBLE and len(op.outputs) == 1:
            self._fusible(op, inputs)
            return
        for value in inputs:
            self._gather(value, op)
        self._use(self._read(v) for v in inputs)
        for target in op.outputs:
            self._own(target, op, self._clock)
            if target.stored is not None:
                self._new(target, op, self._clock, gathered=True)

    def _gather(self, value: Value, op: Operation) -> None:
        """A stored value as an operation needs it; nothing where it is kept that way (the caller has the bytes)."""
        if value.stored is not None:
            self._new(value, op, self._clock, gathered=True)

    def _fusible(self, op: Operation, inputs: list[Value]) -> None:
        target = op.outputs[0]
        fused = all(user is not None and user.name in FUSIBLE | ALIASES for user in self._users.get(target.index, ()))
        sources = tuple(dict.fromkeys(b for v in inputs for b in self._far[v.index]))
        if fused:
            self._near[target.index] = self._far[target.index] = sources
            return
        self._use([sources])
        self._own(target, op, self._clock)
        for b in sources:
            if self.graph.values[self._buffers[b][0]].shape == target.shape:
                self._shared[b] = self._clock
                break
        if len(_large(inputs, target)) <= 1:
            self._far[target.index] = sources

    def _scan(self, op: Operation) -> None:
        consts, carried = scan_counts(op.eqn)
        body, start = op.blocks[0], self._clock
        outside = []
        for i, (outer, inner) in enumerate(zip(op.inputs, body.inputs, strict=True)):
            sources = () if outer is None else self._read(outer)
            outside.append(sources)
            self._near[inner.index] = self._far[inner.index] = sources
            if i >= consts and i < consts + carried:
                self._own(op.outputs[i - consts], op, start)
                self._near[inner.index] = self._far[inner.index] = self._near[op.outputs[i - consts].index]
                self._use([sources])
        for outer in op.outputs[carried:]:
            self._own(outer, op, start)
        for value in body.constants:
            self._near[value.index] = self._far[value.index] = ()
        self._block(body)
        self._clock += 2
        self._use(self._read(v) for v in body.results if isinstance(v, Value))
        self._use(s for i, s in enumerate(outside) if i < consts or i >= consts + carried)
        self._use(self._read(v) for v in op.outputs)

    def _branches(self, op: Operation) -> None:
        start = self._clock
        outside = [() if v is None else self._read(v) for v in op.inputs]
        for inner in op.blocks:
            for value in (*inner.inputs, *inner.constants):
                self._near[value.index] = self._far[value.index] = ()
            self._block(inner)
        self._clock += 2
        self._use(outside)
        for value in op.outputs:
            self._own(value, op, start)


def _large(inputs: list[Value], target: Value) -> list[Value]:
    rank = sum(n > 1 for n in target.shape)
    return [v for v in inputs if sum(n > 1 for n in v.shape) >= rank]


class Sizes:
    """Bytes of a graph's values under an assignment, by NumPy: values (rows) x dims (columns).

    Args:
      graph: of loss and gradients.
      names: its named axes.
    """

    def __init__(self, graph: Graph, names: Names):
        self.graph, self.names = graph, names
        prefers = meets_stored(graph)
        rank = max((len(v.shape) for v in graph.values), default=0)
        self.extents = np.ones((len(graph.values), rank), np.int64)
        self.groups = np.full((len(graph.values), rank), -1)
        self.stored = np.full(len(graph.values), -1)
        self.stored_dims = np.full((len(graph.values), rank), rank)
        self.itemsizes = np.array([itemsize(v) for v in graph.values], np.int64)
        for value in graph.values:
            first = prefers.get(value.index)
            order = sorted(range(len(value.shape)), key=lambda d: d != first)
            for column, d in enumerate(order):
                self.extents[value.index, column] = value.shape[d]
                self.groups[value.index, column] = names.of.get(graph.find(value.nodes[d]), -1)
            if value.stored is not None:
                self.stored[value.index] = value.stored[0]
                for column, d in enumerate(order):
                    self.stored_dims[value.index, column] = value.stored[1][d]

    def bytes(self, assignment: Assignment) -> tuple[np.ndarray, np.ndarray]:
        """(as they lie, as they are used): bytes on one device of each value, float64 (values,)."""
        counts = np.array(assignment.counts)
        masks = np.array([*assignment.masks, 0])[self.groups]
        use = np.zeros_like(masks)
        taken = np.zeros(len(masks), np.int64)
        for d in range(masks.shape[1]):
            mask = masks[:, d] & ~taken
            mask[self.extents[:, d] % counts[mask] != 0] = 0
            use[:, d] = mask
            taken |= mask
        storage = self.names.storage(list(assignment.masks), assignment.keep, list(counts))
        table = np.zeros((len(storage) + 1, masks.shape[1] + 1), np.int64)
        for i, spec in enumerate(storage):
            table[i, :len(spec)] = spec
        kept = np.where(self.stored[:, None] >= 0, table[self.stored[:, None], self.stored_dims], use)
        parts = np.ones(len(masks))
        if assignment.micro_batches > 1 and self.names.batch is not None:
            parts[(self.groups == self.names.batch).any(1)] = assignment.micro_batches
        return self._sum(kept, counts) / parts, self._sum(use, counts) / parts

    def _sum(self, masks: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return (self.extents / counts[masks]).prod(1) * self.itemsizes


def predict(trace: Trace, graph: Graph, names: Names, assignment: Assignment, topology: Topology, *, steps_per_call: int = 1,
            data: str = "streamed", samples: int | None = None, timeline: Timeline | None = None,
            sizes: Sizes | None = None) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Bytes of one device by kind, whose sum is the peak, and the largest values alive at that moment.

    Args:
      graph: `trace.gradient(assignment.remat)`, and `names` its names.
      steps_per_call, data, samples: as in the plan; samples of resident data.
      timeline, sizes: of the graph, if there are any to be used again.
    """
    timeline = timeline or Timeline(graph, topology.platform)
    sizes = sizes or Sizes(graph, names)
    found = _arguments(trace, names, assignment, topology, steps_per_call, data, samples or trace.samples)
    kept, used = sizes.bytes(assignment)
    peak, moment, each = timeline.peak(kept, used)
    alive = (timeline.starts <= moment) & (moment <= timeline.ends)
    gradient = float(each[alive & timeline.is_gradient].sum())
    late = float(each[timeline.is_gradient].sum())
    found |= {"gradients": int(gradient), "activations": 0, "temporaries": int(max(peak, late) - gradient)}
    order = np.argsort(-np.where(alive, each, 0))[:12]
    return found, [(int(each[b]), _describe(timeline, int(b))) for b in order if alive[b]]


def _arguments(trace: Trace, names: Names, assignment: Assignment, topology: Topology, steps: int, data: str,
               samples: int | None) -> dict[str, int]:
    axes = assemble.axis_names(assignment, names)
    found = dict.fromkeys(("params", "optimizer", "variables", "batch", "data"), 0)
    sizes = dict(zip(axes, assignment.sizes, strict=True))
    for array in assemble.arrays(trace, names, assignment, axes):
        kind = array.kind if array.kind in ("params", "optimizer") else "variables"
        split = math.prod(sizes[a] for e in array.spec for a in ((e,) if isinstance(e, str) else e or ()))
        found[kind] += array.bytes // split
    batch = 0 if names.batch is None else assignment.counts[assignment.masks[names.batch]]
    count = trace.recipe.batch_size
    for leaf in by_path((trace.inputs, trace.targets)).values():
        if data == "resident":
            found["data"] += nbytes(leaf) // count * (samples or 0)
        else:
            found["batch"] += nbytes(leaf) * steps // max(1, batch)
    found["batch"] += 4 * count * steps // max(1, batch) if data == "resident" else 0
    return found


def _describe(timeline: Timeline, buffer: int) -> str:
    value, op = timeline.graph.values[timeline.values[buffer]], timeline.owners[buffer]
    shape = f"{value.dtype}{list(value.shape)}"
    where: Any = "" if op is None else f"{op.name} at {source_line(op.eqn)}"
    return f"{shape} {where}"

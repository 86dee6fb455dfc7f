"""Peak memory of a train step on one device, predicted from the graph of its gradient before anything is compiled.

The state and the batch are exact. For the rest each buffer of a `Timeline` gets its bytes under an assignment, and what is
alive at once is summed as XLA sums it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.compat import source_line
from lepton_jax.hardware import Topology
from lepton_jax.planner import assemble
from lepton_jax.planner.assemble import Assignment
from lepton_jax.planner.graph import Graph
from lepton_jax.planner.layout import itemsize, meets_stored
from lepton_jax.planner.named import Names
from lepton_jax.planner.timeline import Timeline
from lepton_jax.planner.trace import Trace
from lepton_jax.state import by_path, nbytes

__all__ = ["Peak", "Sizes", "Timeline", "peak", "predict"]

# MiB of memory on the chip beside its HBM that XLA uses for short-lived buffers: `jax.experimental.pallas.tpu`'s chip table
VECTOR_MEMORY = {"v5e": 128, "v6e": 128, "v5p": 64, "tpu7x": 64, "v4": 16}
USABLE = 0.8  # of it; the rest is the kernels' own
LARGEST = 0.65  # of what is usable, that one buffer may take


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


class Peak(NamedTuple):
    """What a program holds at the most.

    Attributes:
      bytes: of its temporaries, as XLA reports them.
      moment: when.
      each: bytes of each buffer.
      alive: buffers alive then.
    """

    bytes: float
    moment: int
    each: np.ndarray
    alive: np.ndarray


def peak(timeline: Timeline, kept: np.ndarray, used: np.ndarray, vector: float = 0.0, around: float = 0.0) -> Peak:
    """The most that is alive at once.

    Args:
      timeline: of the graph.
      kept, used: bytes on one device of each value of the graph (see `Sizes.bytes`).
      vector: bytes of memory beside the HBM.
      around: bytes that are there all the while, in a loop around the program.
    """
    each = _sizes(timeline, kept, used)
    held = _alive(timeline, timeline.ends, each, vector)
    moment = int(held.argmax())
    alive = (timeline.starts <= moment) & (moment <= timeline.ends)
    total = float(held[moment]) + around
    if timeline.platform == "tpu":
        # libtpu reports a heap and on top what it takes for fragmentation: the heap less what its own count finds alive,
        # which loses sight of a buffer as soon as a loop takes it in
        counted = float(_alive(timeline, timeline.cuts, each, vector).max())
        total += total - min(total, max(counted, around))
    return Peak(total, moment, each, alive)


def _alive(timeline: Timeline, ends: np.ndarray, each: np.ndarray, vector: float) -> np.ndarray:
    """Bytes in the HBM at each moment."""
    def summed(sizes: np.ndarray) -> np.ndarray:
        return np.cumsum(np.bincount(timeline.starts, sizes, timeline.length) - np.bincount(ends + 1, sizes, timeline.length))

    live = summed(each)
    return live - np.minimum(vector, summed(np.where(each < LARGEST * vector, each, 0.0))) if vector else live


def _sizes(timeline: Timeline, kept: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Bytes of each buffer."""
    values, kinds = timeline.values, timeline.kinds
    lying, using = kept[values], used[values]
    gathered = np.where(using > 1.001 * lying, using, 0.0)
    rows = using * timeline.padding if timeline.platform == "tpu" else gathered
    words = lying / timeline.itemsizes * 4
    return np.choose(kinds, [lying, using, gathered, lying / 2, rows, 2 * using, 2 * gathered, words])


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
    vector = VECTOR_MEMORY.get(topology.chip.name, 0) * 2**20 * USABLE if topology.platform == "tpu" else 0.0
    around = 0.0
    if assignment.micro_batches > 1:  # sums of the gradients, and the batch cut to pieces
        around = found["params"] + found["batch"]
    top = peak(timeline, kept, used, vector, around)
    gradient = float(top.each[top.alive & timeline.gradients].sum())
    late = float(top.each[timeline.gradients].sum())
    found |= {"gradients": int(gradient), "activations": 0, "temporaries": int(max(top.bytes, late) - gradient)}
    order = np.argsort(-np.where(top.alive, top.each, 0))[:12]
    return found, [(int(top.each[b]), _describe(timeline, int(b))) for b in order if top.alive[b]]


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

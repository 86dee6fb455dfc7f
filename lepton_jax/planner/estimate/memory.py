"""Peak memory of a train step on one device, predicted from the graph of its gradient
before anything is compiled.

The state and the batch are exact. For the rest each buffer of a `Timeline` gets its
bytes under an assignment, and what is alive at once is summed as XLA sums it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.compat import source_line
from lepton_jax.hardware import Chip, Topology
from lepton_jax.planner import assignment as assemble
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.feeding import slow_loops
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.layout import itemsize, meets_stored
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.xla import heap
from lepton_jax.planner.xla.fusion import size
from lepton_jax.planner.xla.schedule import Timeline
from lepton_jax.trees import by_path, nbytes

__all__ = ["Peak", "Sizes", "Timeline", "describe", "peak", "predict"]

# MiB of the memory beside the HBM (`jax.experimental.pallas.tpu`'s chip table) that
# libtpu gives to buffers: the rest, 16 MiB and in a v6e 32 MiB, is the kernels' own
VECTOR_MEMORY = {
    "v5e": 112,
    "v6e": 96,
    "v5p": 48,
    "tpu7x": 48,
}
# Buffers that wait less than this many times as long as moving them takes have the
# memory beside the HBM before others: about where XLA's memory space assignment stops.
# This and `heap.TINY` are no figures of libtpu's: they fitted some 70 programs that it
# compiled the best of those tried.
PATIENCE = 10.0
# per byte of a number: a product over more of them on each device has its result summed
# over the devices piece by piece
ROWS = 256
# a buffer is an activation if it is there for more than a tenth of the program
LASTING = 10
SHOWN = 12


class Sizes:
    """Bytes of a graph's values under an assignment.

    Values that are alike under every assignment (same shape, dtype and named axes, as
    those of repeated layers) are one row of the arrays here.

    Args:
      graph: of loss and gradients.
      names: its named axes.

    Attributes:
      row: of each value, by its index.
      extents, groups: of each dim of a row, (rows, dims), int; groups are numbers of
        `names.groups`, -1 for none.
    """

    def __init__(self, graph: Graph, names: Names):
        self.graph = graph
        self.names = names
        self._state: _State | None = None
        prefers = meets_stored(graph)
        rank = max(
            (len(v.shape) for v in graph.values),
            default=0,
        )
        convolves = any(op.name == "conv_general_dilated" for op in graph.operations())
        known: dict[tuple, int] = {}
        self.row = np.zeros(len(graph.values), np.int64)
        for value in graph.values:
            first = prefers.get(value.index)
            order = sorted(
                range(len(value.shape)),
                key=lambda d: d != first,
            )
            blank = rank - len(order)
            extents = [value.shape[d] for d in order] + [1] * blank
            roots = [graph.find(value.nodes[d]) for d in order]
            groups = [names.of.get(root, -1) for root in roots] + [-1] * blank
            stored, own = value.stored or (-1, ())
            dims = [own[d] for d in order] + [rank] * blank if own else [rank] * rank
            image = convolves and len(value.shape) > 3
            look = (
                *extents,
                *groups,
                *dims,
                stored,
                image,
                itemsize(value),
            )
            self.row[value.index] = known.setdefault(look, len(known))
        table = np.array(list(known), np.int64).reshape(len(known), 3 * rank + 3)
        self.extents = table[:, :rank]
        self.groups = table[:, rank : 2 * rank]
        self._stored_dims = table[:, 2 * rank : 3 * rank]
        self._stored = table[:, -3]
        self._images = table[:, -2].astype(bool)
        self._itemsizes = table[:, -1]

    def bytes(
        self, assignment: Assignment, tiled: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """(as they lie, as they are used): bytes on one device of each value, float64
        (values,).

        Args:
          assignment: how they lie.
          tiled: with the padding of arrays that lie in tiles, as in a TPU.
        """
        use = self._use(assignment)
        kept = self._kept(assignment, use)
        lying, using = (self._bytes(assignment, masks, tiled) for masks in (kept, use))
        return lying[self.row], using[self.row]

    def by_row(self, weights: np.ndarray) -> np.ndarray:
        """Sum a weight for each value to one for each row."""
        return np.bincount(
            self.row,
            weights,
            len(self.extents),
        )

    def total(
        self,
        assignment: Assignment,
        weights: np.ndarray,
    ) -> float:
        """Bytes on one device as values lie, times the weights of their rows,
        summed.
        """
        kept = self._kept(assignment, self._use(assignment))
        return float(self._bytes(assignment, kept, False) @ weights)

    def _use(self, assignment: Assignment) -> np.ndarray:
        """Mask of each dim of each row while it is computed with."""
        counts = np.array(assignment.counts)
        masks = np.array([*assignment.masks, 0])[self.groups]
        use = np.zeros_like(masks)
        taken = np.zeros(len(masks), np.int64)
        for d in range(masks.shape[1]):
            mask = masks[:, d] & ~taken
            mask[self.extents[:, d] % counts[mask] != 0] = 0
            use[:, d] = mask
            taken |= mask
        return use

    def _kept(
        self,
        assignment: Assignment,
        use: np.ndarray,
    ) -> np.ndarray:
        """The same as it lies: what is stored, as the state keeps it."""
        table = self.storage(assignment)
        stored = table[self._stored[:, None], self._stored_dims]
        return np.where(
            self._stored[:, None] >= 0,
            stored,
            use,
        )

    def _bytes(
        self, assignment: Assignment, masks: np.ndarray, tiled: bool
    ) -> np.ndarray:
        local = self.extents / np.array(assignment.counts)[masks]
        parts = np.ones(len(masks))
        if assignment.micro_batches > 1 and self.names.batch is not None:
            samples = (self.groups == self.names.batch).any(1)
            parts[samples] = assignment.micro_batches
        pads = tiling(local, self._images) if tiled else 1.0
        return local.prod(1) * pads * self._itemsizes / parts

    def storage(self, assignment: Assignment) -> np.ndarray:
        """Mask of each dim of each parameter, as the state keeps it: (parameters + 1,
        dims + 1), filled up with 0.
        """
        specs = self.names.storage(
            list(assignment.masks), assignment.keep, assignment.counts
        )
        table = np.zeros((len(specs) + 1, self.extents.shape[1] + 1), np.int64)
        for i, spec in enumerate(specs):
            table[i, : len(spec)] = spec
        return table

    def state(
        self, trace: Trace, assignment: Assignment, tiled: bool
    ) -> dict[str, int]:
        """Bytes of the state on one device: "params", "optimizer" and "variables",
        which is all else.
        """
        held = self._held(trace)
        local = (
            held.extents
            / np.array(assignment.counts)[
                self.storage(assignment)[held.parameters, held.dims]
            ]
        )
        size = held.extents.prod(1)
        each = (
            held.bytes
            * local.prod(1)
            / np.maximum(size, 1)
            * (tiling(local, np.zeros(len(local), bool)) if tiled else 1)
        )
        return {
            kind: int(each[held.kinds == i].sum())
            for i, kind in enumerate(("params", "optimizer", "variables"))
        }

    def moments(self, trace: Trace) -> np.ndarray:
        """For each parameter, how many arrays of its shape the optimizer keeps."""
        return self._held(trace).moments

    def _held(self, trace: Trace) -> _State:
        if self._state is None:
            self._state = _State(
                trace,
                self.names,
                self.extents.shape[1],
            )
        return self._state


class _State:
    """The leaves of a state: how they follow the parameters (`parameters` and `dims`
    index `Sizes.storage`).
    """

    def __init__(
        self,
        trace: Trace,
        names: Names,
        rank: int,
    ):
        paths = [p for p in names.paths if p.startswith("params")]
        leaves = by_path(trace.state)
        rank = max(rank, *(len(leaf.shape) for leaf in leaves.values()))
        marks: Any = {
            p.removeprefix("params/"): (
                tuple((i, d) for d in range(len(leaves[p].shape))),
                tuple(leaves[p].shape),
            )
            for i, p in enumerate(paths)
        }
        self.extents = np.ones((len(leaves), rank))
        self.parameters = np.full((len(leaves), rank), len(paths))
        self.dims = np.zeros((len(leaves), rank), np.int64)
        self.bytes = np.array([nbytes(leaf) for leaf in leaves.values()], float)
        self.kinds = np.array(
            [{"params": 0, "optimizer": 1}.get(p.partition("/")[0], 2) for p in leaves]
        )
        self.moments = np.zeros(len(paths), np.int64)
        for row, (path, leaf) in enumerate(leaves.items()):
            shape = tuple(leaf.shape)
            self.extents[row, : len(shape)] = shape
            kind, _, tail = path.partition("/")
            lies: Any = (
                marks[tail][0]
                if kind == "params"
                else (
                    assemble._follow(path, shape, marks)[0]
                    if kind in ("optimizer", "controller")
                    else ()
                )
            )
            for d, mark in enumerate(lies):
                if mark:
                    self.parameters[row, d], self.dims[row, d] = mark
            if (
                kind == "optimizer"
                and shape
                and lies[0]
                and shape == tuple(leaves[paths[lies[0][0]]].shape)
            ):
                self.moments[lies[0][0]] += 1


def tiling(shapes: np.ndarray, images: np.ndarray) -> np.ndarray:
    """How many times its bytes an array takes in tiles of (8, 128), with its dims in
    the order that wastes the least.

    Args:
      shapes: float (arrays, dims), filled up with ones.
      images: bool (arrays,), arrays of which tiles lie along the first and the last
        dim: batch and channels.
    """
    shapes = np.maximum(shapes, 1)  # an array without elements takes nothing anyway
    lanes = np.ceil(shapes / 128) * 128 / shapes
    rows = (
        np.where(
            shapes <= 4,
            2 ** np.ceil(np.log2(np.maximum(shapes, 1))),
            np.ceil(shapes / 8) * 8,
        )
        / shapes
    )
    barred = images[:, None] & (np.arange(shapes.shape[1]) % 3 != 0)
    lanes[(shapes <= 1) | barred] = np.inf
    rows[(shapes <= 1) | barred] = np.inf
    best = np.full(len(shapes), np.inf)
    for d in range(shapes.shape[1]):
        others = np.delete(rows, d, 1).min(1, initial=np.inf)
        best = np.minimum(
            best,
            lanes[:, d]
            * np.where(
                np.isfinite(others),
                others,
                1.0,
            ),
        )
    return np.where(
        np.isfinite(best),
        best,
        1.0,
    )


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


def peak(
    timeline: Timeline,
    kept: np.ndarray,
    used: np.ndarray,
    vector: float = 0.0,
    around: float = 0.0,
    moments: np.ndarray | None = None,
    stepping: bool = False,
    chip: Chip | None = None,
) -> Peak:
    """The most that is alive at once.

    Args:
      timeline: of the graph.
      kept, used: bytes on one device of each value of the graph (see `Sizes.bytes`).
      vector: bytes of memory beside the HBM.
      around: bytes that are there all the while, in a loop around the program.
      moments: for each parameter, how many arrays of its shape the optimizer keeps.
      stepping: whether the program is the body of a loop over steps.
      chip: a TPU, which keeps some buffers in the `vector` bytes.
    """
    each = _sizes(timeline, kept, used, moments)
    starts = timeline.starts
    ends = timeline.ends
    cuts = timeline.cuts
    if stepping and timeline.tables:  # that loop carries them
        tables = np.isin(np.arange(len(each)), list(timeline.tables))
        starts, ends, cuts = (
            np.where(tables, moment, x)
            for moment, x in ((0, starts), (timeline.length, ends), (0, cuts))
        )
    tpu = timeline.platform == "tpu"
    if around:  # a loop over micro-batches
        starts = np.where(timeline.fixed, 0, starts)
        ends, cuts = (
            np.where(timeline.fixed, timeline.length, x) for x in (ends, cuts)
        )
    if around and tpu:  # added to the sums where they are computed
        each = np.where(timeline.summed, 0.0, each)
    lying = each
    if chip is not None:
        able = np.where(
            timeline.moved | timeline.across,
            0.0,
            each,
        )
        rank = np.maximum(_waits(timeline, used, each, chip), PATIENCE)
        # what waits long gives way to operands that are fetched from the HBM for a
        # product
        moments, fetched = timeline.moves[
            np.isin(timeline.moves[:, 0], timeline.works)
        ].T
        late = (moments > starts[fetched]) & (rank[fetched] > PATIENCE)
        moments = moments[late]
        fetched = fetched[late]
        chosen = heap.beside(
            np.append(starts, moments),
            np.append(ends, moments),
            np.append(able, each[fetched]),
            vector,
            np.append(rank, np.full(len(moments), 1.001 * PATIENCE)),
        )
        lying = np.where(
            chosen[: len(each)],
            0.0,
            each,
        )
    held = heap.alive(
        starts,
        ends,
        lying,
        timeline.length,
    )
    moment = int(np.argmax(held))
    total = heap.packed(timeline.platform, starts, ends, lying) + around
    if tpu:
        # libtpu reports a heap and on top what it takes for fragmentation: the heap
        # less what its own count finds alive, which loses sight of a buffer as soon as
        # a loop takes it in
        counted = float(heap.alive(starts, cuts, lying).max())
        total += total - min(total, max(counted, around))
    # gradients that devices sum lie in the HBM, whatever is beside it
    total = max(total, float(each[timeline.gradients].sum()) + around)
    return Peak(
        total,
        moment,
        each,
        (starts <= moment) & (moment <= ends),
    )


def _waits(
    timeline: Timeline,
    used: np.ndarray,
    each: np.ndarray,
    chip: Chip,
) -> np.ndarray:
    """How long each buffer is only kept, as others are computed, in times of moving it
    to or from the HBM.
    """
    parts = (used[timeline.operands] / timeline.extents[timeline.operands]).min(
        1, initial=1.0
    )
    busy = np.bincount(
        timeline.works,
        timeline.flops * parts / chip.bf16_flops,
        timeline.length + 2,
    )
    moved = np.bincount(
        timeline.moves[:, 0],
        each[timeline.moves[:, 1]] / chip.bandwidth,
        timeline.length + 2,
    )
    passed = np.cumsum(np.maximum(busy, moved))
    kept = (
        passed[np.maximum(timeline.ends - 1, timeline.starts)] - passed[timeline.starts]
    )
    return kept / np.maximum(each / chip.bandwidth, 1e-12)


def _sizes(
    timeline: Timeline,
    kept: np.ndarray,
    used: np.ndarray,
    moments: np.ndarray | None,
) -> np.ndarray:
    """Bytes of each buffer, 0 of one that is not there."""
    values = timeline.values
    kinds = timeline.kinds
    lying = kept[values]
    using = used[values]
    gathered = np.where(
        using > 1.001 * lying,
        using,
        0.0,
    )
    rows = using * timeline.padding if timeline.platform == "tpu" else gathered
    words = lying / timeline.itemsizes * 4
    each = np.choose(
        kinds,
        [
            lying,
            using,
            gathered,
            lying / 2,
            rows,
            2 * using,
            2 * gathered,
            words,
            lying * timeline.padding,
            gathered / 2,
            np.zeros(len(lying)),
        ],
    )
    each[~timeline.made] = 0.0
    for b, (value, condition) in timeline.conditions.items():
        whole = used[value] > 1.001 * kept[value]
        each[b] *= (
            not whole
            if condition == "ungathered"
            else used[value] >= size(timeline.graph.values[value])
        )
    for b, parameter in timeline.tables.items():
        each[b] *= 1 if moments is None else 1 + moments[parameter]
    return each


def predict(
    trace: Trace,
    graph: Graph,
    names: Names,
    assignment: Assignment,
    topology: Topology,
    *,
    steps_per_call: int = 1,
    data: str = "streamed",
    samples: int | None = None,
    timeline: Timeline | None = None,
    sizes: Sizes | None = None,
) -> tuple[dict[str, int], list[tuple[int, str]]]:
    """Bytes of one device by kind, whose sum is the peak, and the largest values alive
    at that moment.

    Args:
      trace, assignment, topology: what runs, how it lies, and where.
      graph: `trace.gradient(assignment.remat)`, and `names` its names.
      steps_per_call, data, samples: as in the plan; samples of resident data.
      timeline, sizes: of the graph, if there are any to be used again.
    """
    tpu = topology.platform == "tpu"
    timeline = timeline or Timeline(graph, topology.platform)
    sizes = sizes or Sizes(graph, names)
    found = sizes.state(trace, assignment, tpu) | _fed(
        trace, names, assignment, steps_per_call, data, samples or trace.samples
    )
    several = assignment.micro_batches > 1
    # straight code, all of which XLA's CPU backend starts at once
    if several and slow_loops(trace, topology):
        assignment = replace(assignment, micro_batches=1)
    kept, used = sizes.bytes(assignment, tpu)
    if tpu:
        # v5e's scheduler puts work off that others' don't
        timeline = timeline.variant(
            windowed(timeline, names, assignment, used), topology.chip.name != "v5e"
        )
    vector = VECTOR_MEMORY.get(topology.chip.name, 0) * 2**20 if tpu else 0.0
    # sums of the gradients, and the batch cut to pieces
    around = float(found["params"] + found["batch"]) if several else 0.0
    top = peak(
        timeline,
        kept,
        used,
        vector,
        around,
        sizes.moments(trace),
        steps_per_call > 1,
        topology.chip if tpu else None,
    )
    gradients = min(
        top.bytes, float(top.each[top.alive & timeline.gradients].sum()) + around
    )
    lasting = (
        top.alive
        & ~timeline.gradients
        & (timeline.ends - timeline.starts > timeline.length // LASTING)
    )
    activations = min(top.bytes - gradients, float(top.each[lasting].sum()))
    found |= {
        "gradients": int(gradients),
        "activations": int(activations),
        "temporaries": int(top.bytes - gradients - activations),
    }
    order = np.argsort(-np.where(top.alive, top.each, 0))[:SHOWN]
    return found, [
        (int(top.each[b]), describe(timeline, int(b))) for b in order if top.alive[b]
    ]


def windowed(
    timeline: Timeline,
    names: Names,
    assignment: Assignment,
    used: np.ndarray,
) -> bool:
    """Whether libtpu sums the gradients of kernels over the devices while it computes
    them, piece by piece in a loop.

    It did (libtpu of jax 0.10, on v5e, v5p and v6e) where each of 8 to 32 devices keeps
    a part and all of them hold samples, for products over more rows on each device than
    `ROWS` for each byte of a number.
    """
    devices = assignment.counts[assignment.keep]
    samples = (
        1 if names.batch is None else assignment.counts[assignment.masks[names.batch]]
    )
    if not 8 <= devices <= 32 or devices != samples or not len(timeline.weighing):
        return False
    left, right, product = (
        used[timeline.weighing] / timeline.numbers[timeline.weighing]
    ).T
    largest = np.argmax(product)
    rows = np.sqrt(left * right / product)[largest]
    return bool(rows > ROWS * timeline.numbers[timeline.weighing[largest, 2]])


def _fed(
    trace: Trace,
    names: Names,
    assignment: Assignment,
    steps: int,
    data: str,
    samples: int | None,
) -> dict[str, int]:
    """Bytes of the batch, and of data that each device holds all of."""
    split = (
        1 if names.batch is None else assignment.counts[assignment.masks[names.batch]]
    )
    count = trace.recipe.batch_size
    size = sum(nbytes(leaf) for leaf in by_path((trace.inputs, trace.targets)).values())
    if data == "resident":
        return {
            "batch": 4 * count * steps // split,
            "data": size // count * (samples or 0),
        }
    return {"batch": size * steps // split, "data": 0}


def describe(timeline: Timeline, buffer: int) -> str:
    """ "float32[8, 4] exp at file.py:12 (function)" of a buffer."""
    value = timeline.value(buffer)
    op = timeline.owners[buffer]
    return f"{value.dtype}{list(value.shape)}" + (
        "" if op is None else f" {op.name} at {source_line(op.eqn)}"
    )

"""Bytes of a graph's values and of the state on one device, under an assignment."""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np

from lepton_jax.compat import scan_counts
from lepton_jax.planner import assignment as assemble
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.program.graph import Graph, Operation, Value
from lepton_jax.planner.program.kernels import KERNELS
from lepton_jax.planner.program.layout import itemsize, meets_stored
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.ruled import workspace
from lepton_jax.planner.program.rules import ELEMENTWISE
from lepton_jax.planner.program.staged import IN_PART
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.xla.figures import LANES, SUBLANES
from lepton_jax.trees import by_path, nbytes

KINDS = ("params", "optimizer", "variables")
# Operations whose result has the rows of its operands.
ROW_BY_ROW = {*ELEMENTWISE, "concatenate", "split"}
# Those that mark what is kept for the backward pass.
AS_IT_IS = ("reduce_precision", "name")


class Place(IntEnum):
    """Where a dim stands, which decides whether a tile may lie along it."""

    # One of the last two, dims of one left out.
    LATE = 0
    EARLY = 1
    # No tile lies along it.
    NEVER = 2


class Sizes:
    """Bytes of a graph's values under an assignment.

    Values that are alike under every assignment (same shape, dtype and named axes, like
    those of repeated layers) are one row of the arrays here.

    Args:
      graph: the graph of loss and gradients.
      names: its named axes.

    Attributes:
      working: operations that need arrays of their own while they run.
      prefers: see `meets_stored`.
      row: the row of each value, by its index.
      extents: each dim of a row, (rows, dims), int, filled up with 1.
      groups: for each of these dims its number in `names.groups`, -1 for none.
    """

    def __init__(self, graph: Graph, names: Names):
        self.graph = graph
        self.names = names
        self.working = [op for op in graph.operations() if workspace(op)]
        self._state: _State | None = None
        self.prefers = meets_stored(graph)
        rank = max(
            (len(value.shape) for value in graph.values),
            default=0,
        )
        not_minor = _never_minor(graph)

        known: dict[tuple, int] = {}
        self.row = np.zeros(len(graph.values), np.int64)
        for value in graph.values:
            look = self._look(
                value,
                self.prefers.get(value.index),
                rank,
                not_minor.get(value.index, frozenset()),
            )
            self.row[value.index] = known.setdefault(look, len(known))

        table = np.array(list(known), np.int64)
        table = table.reshape(len(known), 4 * rank + 2)
        self.extents = table[:, :rank]
        self.groups = table[:, rank : 2 * rank]
        self._stored_dims = table[:, 2 * rank : 3 * rank]
        self._places = table[:, 3 * rank : 4 * rank]
        self._stored = table[:, -2]
        self._itemsizes = table[:, -1]

    def _look(
        self,
        value: Value,
        first: int | None,
        rank: int,
        not_minor: frozenset[int],
    ) -> tuple:
        """Return what decides the bytes of a value: a row of the table.

        Args:
          value: the value.
          first: the dim that gets its mesh axes before others.
          rank: dims that a row has room for.
          not_minor: dims along which no tile lies.
        """
        order = sorted(
            range(len(value.shape)),
            key=lambda dim: dim != first,
        )
        blank = rank - len(order)
        extents = [value.shape[d] for d in order] + [1] * blank
        roots = [self.graph.find(value.nodes[d]) for d in order]
        groups = [self.names.of.get(root, -1) for root in roots]
        groups += [-1] * blank

        parameter, own_dims = value.stored or (-1, ())
        dims = [rank] * rank
        if own_dims:
            dims = [own_dims[d] for d in order] + [rank] * blank
            dims = [rank if dim == IN_PART else dim for dim in dims]
        wide = [extent > 1 for extent in value.shape]
        places = []
        for dim in order:
            early = not not_minor and sum(wide[dim + 1 :]) > 1
            place = Place.EARLY if early else Place.LATE
            places.append(Place.NEVER if dim in not_minor else place)
        places += [Place.LATE] * blank
        return (
            *extents,
            *groups,
            *dims,
            *places,
            parameter,
            0 if value.on_host else itemsize(value),
        )

    def bytes(
        self, assignment: Assignment, tiled: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of each value on one device, as stored and as computed with.

        Args:
          assignment: how the values are split.
          tiled: whether to count the padding of arrays that lie in tiles, as on a TPU.

        Returns:
          Two float64 arrays, (values,).
        """
        computed_masks = self._computed_masks(assignment)
        stored_masks = self._stored_masks(assignment, computed_masks)
        stored = self._bytes(assignment, stored_masks, tiled)
        computed = self._bytes(assignment, computed_masks, tiled)
        return stored[self.row], computed[self.row]

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
        """Return the bytes of all values as stored, weighted by row."""
        computed_masks = self._computed_masks(assignment)
        masks = self._stored_masks(assignment, computed_masks)
        return float(self._bytes(assignment, masks, False) @ weights)

    def _computed_masks(self, assignment: Assignment) -> np.ndarray:
        """Return the mesh axes (a mask) of each dim of each row in computing."""
        counts = np.array(assignment.counts)
        wanted = np.array([*assignment.masks, 0])[self.groups]
        masks = np.zeros_like(wanted)
        taken = np.zeros(len(wanted), np.int64)
        for d in range(wanted.shape[1]):
            mask = wanted[:, d] & ~taken
            mask[self.extents[:, d] % counts[mask] != 0] = 0
            masks[:, d] = mask
            taken |= mask
        return masks

    def _stored_masks(
        self, assignment: Assignment, computed_masks: np.ndarray
    ) -> np.ndarray:
        """Return the same as stored: for a parameter, as the state keeps it."""
        table = self.storage(assignment)
        stored = table[self._stored[:, None], self._stored_dims]
        return np.where(
            self._stored[:, None] >= 0,
            stored,
            computed_masks,
        )

    def _bytes(
        self,
        assignment: Assignment,
        masks: np.ndarray,
        tiled: bool,
    ) -> np.ndarray:
        local = self.extents / np.array(assignment.counts)[masks]
        parts = np.ones(len(masks))
        if assignment.micro_batches > 1 and self.names.batch is not None:
            samples = np.isin(self.groups, list(self.names.samples)).any(1)
            parts[samples] = assignment.micro_batches
        pads = tiling(local, self._places) if tiled else 1.0
        return local.prod(1) * pads * self._itemsizes / parts

    # ---- the state ----

    def storage(self, assignment: Assignment) -> np.ndarray:
        """Return the mesh axes (a mask) of each dim of each parameter in the state.

        Returns:
          An int array (parameters + 1, dims + 1), filled up with 0.
        """
        specs = self.names.storage(
            list(assignment.masks), assignment.keep, assignment.counts
        )
        rank = self.extents.shape[1]
        table = np.zeros((len(specs) + 1, rank + 1), np.int64)
        for i, spec in enumerate(specs):
            table[i, : len(spec)] = spec
        return table

    def state(
        self, trace: Trace, assignment: Assignment, tiled: bool
    ) -> dict[str, int]:
        """Return the bytes of the state on one device.

        Returns:
          Bytes of "params", "optimizer" and "variables", which is all else.
        """
        leaves = self._leaves(trace)
        counts = np.array(assignment.counts)
        masks = self.storage(assignment)[leaves.parameters, leaves.dims]
        local = leaves.extents / counts[masks]
        elements = np.maximum(leaves.extents.prod(1), 1)
        pads: Any = 1
        if tiled:
            pads = tiling(local, np.zeros(local.shape))
        bytes_ = leaves.bytes * local.prod(1) / elements * pads
        totals = {}
        for number, kind in enumerate(KINDS):
            totals[kind] = int(bytes_[leaves.kinds == number].sum())
        return totals

    def moments(self, trace: Trace) -> np.ndarray:
        """For each parameter, how many arrays of its shape the optimizer keeps."""
        return self._leaves(trace).moments

    def _leaves(self, trace: Trace) -> _State:
        if self._state is None:
            self._state = _State(
                trace,
                self.names,
                self.extents.shape[1],
            )
        return self._state


class _State:
    """The leaves of a state, and the parameter's dim that each of their dims follows.

    Attributes:
      extents: each dim of each leaf, (leaves, dims), filled up with 1.
      parameters, dims: for each of these the row and the column of `Sizes.storage`.
      bytes: bytes of each leaf, unsharded.
      kinds: index in `KINDS` of each leaf.
      moments: arrays of its shape that the optimizer keeps of each parameter.
    """

    def __init__(
        self,
        trace: Trace,
        names: Names,
        rank: int,
    ):
        self.paths = [path for path in names.paths if path.startswith("params")]
        self.leaves = by_path(trace.state)
        leaves = self.leaves
        rank = max(rank, *(len(leaf.shape) for leaf in leaves.values()))
        table = (len(leaves), rank)
        sizes = [nbytes(leaf) for leaf in leaves.values()]
        self.extents = np.ones(table)
        self.parameters = np.full(table, len(self.paths))
        self.dims = np.zeros(table, np.int64)
        self.bytes = np.array(sizes, float)
        self.moments = np.zeros(len(self.paths), np.int64)

        number = {"params": 0, "optimizer": 1}
        roots = [path.partition("/")[0] for path in leaves]
        self.kinds = np.array([number.get(root, 2) for root in roots])

        marks = self._marks()
        for row, path in enumerate(leaves):
            self._fill(row, path, marks)

    def _marks(self) -> dict[str, Any]:
        """Return (number, dim) pairs in place of the spec of each parameter's dims.

        A leaf of the optimizer gets the pairs of the parameter that it follows.
        """
        marks = {}
        for number, path in enumerate(self.paths):
            shape = tuple(self.leaves[path].shape)
            pairs = tuple((number, dim) for dim in range(len(shape)))
            marks[path.removeprefix("params/")] = (pairs, shape)
        return marks

    def _fill(
        self,
        row: int,
        path: str,
        marks: dict[str, Any],
    ) -> None:
        shape = tuple(self.leaves[path].shape)
        self.extents[row, : len(shape)] = shape
        kind, _, tail = path.partition("/")
        followed: Any = ()
        if kind == "params":
            followed = marks[tail][0]
        elif kind in ("optimizer", "controller"):
            followed = assemble._follow(path, shape, marks)[0]

        for d, mark in enumerate(followed):
            if mark:
                self.parameters[row, d] = mark[0]
                self.dims[row, d] = mark[1]
        if kind == "optimizer" and shape and followed[0]:
            parameter = followed[0][0]
            if shape == tuple(self.leaves[self.paths[parameter]].shape):
                self.moments[parameter] += 1


def _never_minor(graph: Graph) -> dict[int, frozenset[int]]:
    """Return the dims of values along which libtpu lays no tile, by a value's index.

    In a graph with convolutions, values of four dims are images, whose tiles lie along
    batch and channels. The dims that both operands of a product share (batch dims) are
    major in the operands and in the result: `bnd,bmd->bnm` with b=8192, n=13, d=16
    writes f32[8192,13,16]{2,1,0:T(8,128)} (libtpu of jax 0.10, v5e).
    """
    barred: dict[int, frozenset[int]] = {}
    operations = list(graph.operations())
    if any(op.name == "conv_general_dilated" for op in operations):
        for value in graph.values:
            rank = len(value.shape)
            if rank > 3:
                inner = [d for d in range(rank) if d % 3]
                barred[value.index] = frozenset(inner)

    for op in operations:
        if op.name != "dot_general":
            continue
        _, (left, right) = op.params["dimension_numbers"]
        shared = (left, right, range(len(left)))
        values = (*op.inputs[:2], op.outputs[0])
        for operand, dims in zip(values, shared, strict=True):
            if operand is not None and dims:
                barred[operand.index] = frozenset(dims)
    return barred | _around_kernels(operations)


def _around_kernels(operations: list[Operation]) -> dict[int, frozenset[int]]:
    """Return the same for the arrays that a kernel of attention reads and writes.

    It has them in rows of one head, so heads of 64 fill half of a tile: queries and
    keys of f32[9,59,2048,8,64] take 2.2 GB for 1.1. So have what they are computed from
    number by number. What a product makes lies as the product has it, such as values
    without a position (libtpu 0.0.42, v5p and v5e, `planner-memory --half tuning --long
    --early` and `--dropless`).
    """
    found: dict[int, Value] = {}
    for op in reversed(operations):
        if op.name in KERNELS:
            found.update((value.index, value) for value in _arrays(op))
        elif op.name in ROW_BY_ROW and any(v.index in found for v in op.outputs):
            rank = len(op.outputs[0].shape)
            same = (value for value in _arrays(op) if len(value.shape) == rank)
            found.update((value.index, value) for value in same)
    for op in operations:
        if op.name == "reshape":
            found.pop(op.outputs[0].index, None)
    for source, target in _as_they_are(operations):
        if source.index in found:
            found[target.index] = target
    return {
        index: frozenset(range(len(value.shape) - 1)) for index, value in found.items()
    }


def _as_they_are(operations: list[Operation]) -> Iterator[tuple[Value, Value]]:
    """Yield pairs of what lies as the other does, marks first and then loops."""
    for op in operations:
        if op.name in AS_IT_IS and op.inputs[0] is not None:
            yield op.inputs[0], op.outputs[0]
    for op in operations:
        if op.name == "scan":
            yield from _handed_on(op)


def _arrays(op: Operation) -> list[Value]:
    """List the values that an operation reads and writes."""
    return [value for value in (*op.inputs, *op.outputs) if value is not None]


def _handed_on(op: Operation) -> Iterator[tuple[Value, Value]]:
    """Yield pairs of what lies as the other does: parts of arrays around a loop."""
    consts, carried = scan_counts(op.eqn)
    body = op.regions[0]
    read = zip(op.inputs, body.inputs, strict=True)
    written = zip(body.results[carried:], op.outputs[carried:], strict=True)
    for source, target in (*list(read)[consts + carried :], *written):
        if isinstance(source, Value):
            yield source, target


def tiling(
    shapes: np.ndarray,
    places: np.ndarray,
) -> np.ndarray:
    """Return how many times its bytes an array takes in tiles of (8, 128).

    The dims are taken in the order that wastes the least. [2048, 10] takes 1.6 times
    its bytes: 2048 numbers lie along the 128 lanes, and 10 fill up to 16 rows. But a
    dim before the last two lies along the lanes only if it fills them: [3547, 192, 320]
    takes 1.2 times its bytes, with 320 along the lanes (libtpu of jax 0.10, v5e).

    Args:
      shapes: float (arrays, dims), filled up with ones.
      places: int (arrays, dims), the `Place` of each dim.
    """
    # An array without elements takes nothing anyway.
    shapes = np.maximum(shapes, 1)
    lanes = np.ceil(shapes / LANES) * LANES / shapes
    # Up to four rows have smaller tiles, of a power of two.
    few = 2 ** np.ceil(np.log2(shapes))
    many = np.ceil(shapes / SUBLANES) * SUBLANES
    rows = np.where(shapes <= SUBLANES // 2, few, many) / shapes

    unfit = (shapes <= 1) | (places == Place.NEVER)
    ragged = (places == Place.EARLY) & (lanes > 1)
    lanes[unfit | ragged] = np.inf
    rows[unfit] = np.inf

    best = np.full(len(shapes), np.inf)
    for d in range(shapes.shape[1]):
        others = np.delete(rows, d, 1).min(1, initial=np.inf)
        others = np.where(np.isfinite(others), others, 1.0)
        best = np.minimum(best, lanes[:, d] * others)
    return np.where(np.isfinite(best), best, 1.0)

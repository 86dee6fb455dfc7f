"""An assignment of mesh axes to named axes, and what follows from it for every value
and every operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from lepton_jax.planner.program.graph import BARRIER, KEEPING, Graph, Operation, Value

# Mesh axes are bits: a spec is one mask a dim.
Spec = tuple[int, ...]


class Index(NamedTuple):
    """One index of a contraction: which dim of its operands and of its result it is
    (None: of none).

    An index without a result dim is summed over; `sizes` are of no interest, their
    product is the work.
    """

    left: int | None
    right: int | None
    out: int | None


@dataclass(frozen=True)
class Contraction:
    """An operation as sums of products over indices.

    Attributes:
      left, right: inputs' numbers.
      indices: the first of a grouped convolution is that of its groups, each of which
        is whole on a device.
      groups: of a convolution.
    """

    left: int
    right: int | None
    indices: tuple[Index, ...]
    groups: int = 1


class Move(NamedTuple):
    """A collective that an operation needs: over the mesh axes in `axes`, of `bytes` a
    device (see Link.seconds).

    `where` is "left", "right", "out" or "input N".
    """

    kind: str
    axes: int
    bytes: float
    where: str


@dataclass(frozen=True)
class Decision:
    """How an operation is split: the specs that it wants of its inputs, the one its
    result has by itself, and the moves.
    """

    inputs: dict[int, Spec]
    natural: Spec | None
    moves: tuple[Move, ...]


def contraction(op: Operation) -> Contraction | None:
    """The indices of dots, convolutions, lookups, scattered sums and reductions; None
    for other operations.
    """
    name = op.name
    p = op.params
    if name == "dot_general" and None not in op.inputs[:2]:
        return _dot(op)
    if name == "conv_general_dilated" and None not in op.inputs[:2]:
        return _convolution(op)
    if name == "gather" and None not in op.inputs[:2]:
        return _lookup(op)
    if name in ("scatter-add", "scatter_add") and None not in op.inputs[1:3]:
        return _scattered(op)
    if (
        name.startswith("reduce_")
        and "axes" in p
        and op.inputs[0] is not None
        and len(op.outputs) == 1
    ):
        kept = iter(range(len(op.outputs[0].shape)))
        rank = range(len(op.inputs[0].shape))
        return Contraction(
            0,
            None,
            tuple(Index(d, None, None if d in p["axes"] else next(kept)) for d in rank),
        )
    return None


def _dot(op: Operation) -> Contraction:
    (lc, rc), (lb, rb) = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    assert left is not None and right is not None
    out = iter(range(len(op.outputs[0].shape)))
    found = [Index(a, b, next(out)) for a, b in zip(lb, rb, strict=True)]
    found += [
        Index(d, None, next(out)) for d in range(len(left.shape)) if d not in (*lc, *lb)
    ]
    found += [
        Index(None, d, next(out))
        for d in range(len(right.shape))
        if d not in (*rc, *rb)
    ]
    found += [Index(a, b, None) for a, b in zip(lc, rc, strict=True)]
    return Contraction(0, 1, tuple(found))


def _convolution(op: Operation) -> Contraction:
    n = op.params["dimension_numbers"]
    p = op.params
    sample = Index(
        n.lhs_spec[0],
        None,
        n.out_spec[0],
    )
    summed = Index(
        n.lhs_spec[1],
        n.rhs_spec[1],
        None,
    )
    if p["feature_group_count"] > 1:
        return Contraction(
            0,
            1,
            (Index(n.lhs_spec[1], n.rhs_spec[0], n.out_spec[1]), sample),
            p["feature_group_count"],
        )
    if p["batch_group_count"] > 1:
        return Contraction(
            0,
            1,
            (Index(n.lhs_spec[0], n.rhs_spec[0], n.out_spec[1]), summed),
            p["batch_group_count"],
        )
    return Contraction(
        0,
        1,
        (
            sample,
            summed,
            Index(None, n.rhs_spec[0], n.out_spec[1]),
        ),
    )


def _lookup(op: Operation) -> Contraction:
    n = op.params["dimension_numbers"]
    source = op.inputs[0]
    out = op.outputs[0]
    assert source is not None
    batching = dict(
        zip(n.start_indices_batching_dims, n.operand_batching_dims, strict=True)
    )
    kept = [
        d
        for d in range(len(source.shape))
        if d not in (*n.collapsed_slice_dims, *n.operand_batching_dims)
    ]
    found = [Index(d, None, o) for d, o in zip(kept, n.offset_dims, strict=True)]
    found += [Index(d, None, None) for d in n.collapsed_slice_dims]
    places = [o for o in range(len(out.shape)) if o not in n.offset_dims]
    found += [Index(batching.get(i), i, o) for i, o in enumerate(places)]
    return Contraction(0, 1, tuple(found))


def _scattered(op: Operation) -> Contraction:
    n = op.params["dimension_numbers"]
    updates = op.inputs[2]
    out = op.outputs[0]
    assert updates is not None
    batching = dict(
        zip(n.scatter_indices_batching_dims, n.operand_batching_dims, strict=True)
    )
    kept = [
        d
        for d in range(len(out.shape))
        if d not in (*n.inserted_window_dims, *n.operand_batching_dims)
    ]
    found = [Index(u, None, d) for d, u in zip(kept, n.update_window_dims, strict=True)]
    found += [Index(None, None, d) for d in n.inserted_window_dims]
    places = [u for u in range(len(updates.shape)) if u not in n.update_window_dims]
    found += [Index(u, i, batching.get(i)) for i, u in enumerate(places)]
    return Contraction(2, 1, tuple(found))


class Layout:
    """What an assignment makes of a graph.

    Args:
      graph: the program.
      sizes: of the mesh axes; axis i is bit 1 << i.
      uses: root of a named axis to the mask of the mesh axes that split it in
        computing.
      storage: for each parameter, one mask a dim: how the state keeps it.
      prefers: by value's index, dims that win where two of them would take one mesh
        axis (see `meets_stored`).
      batched, parts: indices of the values that hold samples, and in how many
        micro-batches these come.
    """

    def __init__(
        self,
        graph: Graph,
        sizes: tuple[int, ...],
        uses: dict[int, int],
        storage: list[Spec],
        prefers: dict[int, int] | None = None,
        batched: frozenset[int] = frozenset(),
        parts: int = 1,
    ):
        self.graph = graph
        self.sizes = sizes
        self.uses = uses
        self.storage = storage
        self.prefers = prefers or {}
        self.batched = batched
        self.parts = parts
        self.counts = [
            math.prod(n for i, n in enumerate(sizes) if mask >> i & 1)
            for mask in range(1 << len(sizes))
        ]

    def use(self, value: Value) -> Spec:
        """How a value lies while it is computed with."""
        uses = self.uses
        find = self.graph.find
        wanted = [uses.get(find(n), 0) for n in value.nodes]
        if not any(wanted):
            return (0,) * len(wanted)
        taken = 0
        spec = [0] * len(wanted)
        first = self.prefers.get(value.index)
        order = (
            range(len(wanted))
            if first is None
            else (first, *(d for d in range(len(wanted)) if d != first))
        )
        for d in order:
            spec[d] = wanted[d] & ~taken
            if spec[d] and value.shape[d] % self.counts[spec[d]]:
                spec[d] = 0
            taken |= spec[d]
        return tuple(spec)

    def spec(self, value: Value) -> Spec:
        """How a value lies: a stored one as the state keeps it."""
        if value.stored is None:
            return self.use(value)
        index, dims = value.stored
        return tuple(self.storage[index][d] for d in dims)

    def made(
        self,
        op: Operation,
        value: Value,
    ) -> Spec:
        """How a result of an operation with whole dims comes out of it: split only as
        its inputs are.
        """
        spec = self.spec(value)
        find = self.graph.find
        if not any(spec):
            return spec
        split = {
            find(n)
            for i, v in enumerate(op.inputs)
            if v is not None
            for d, n in enumerate(v.nodes)
            if (i, d) not in op.whole
        }
        return tuple(
            m if find(n) in split else 0 for m, n in zip(spec, value.nodes, strict=True)
        )

    def bytes(
        self,
        value: Value,
        spec: Spec,
    ) -> float:
        mask = 0
        for m in spec:
            mask |= m
        parts = self.parts if value.index in self.batched else 1
        return math.prod(value.shape) * itemsize(value) / self.counts[mask] / parts

    def decide(
        self,
        op: Operation,
        product: Contraction | None,
    ) -> Decision:
        """How the operation is split: where its arrays disagree, the way that moves the
        least.
        """
        wanted: dict[int, Spec] = {}
        moves: list[Move] = []
        specs: dict[int, Spec] = {}
        keeps = (
            op.name in KEEPING
            or op.name in ("add_any", "scan", "while", "cond", BARRIER)
            or (
                bool(op.outputs)
                and op.outputs[0].stored is not None
                and op.name in ("mul", "div", "select_n", "add", "sub")
            )
        )
        for i, value in enumerate(op.inputs):
            if value is None:
                continue
            specs[i] = self.spec(value)
            if value.stored is not None and not keeps:
                use = self.use(value)
                if use != specs[i]:
                    axes = _mask(specs[i]) & ~_mask(use)
                    if axes:
                        moves.append(
                            Move(
                                "all-gather", axes, self.bytes(value, use), f"input {i}"
                            )
                        )
                    wanted[i] = specs[i] = use
        if product is None:
            for i, d in op.whole:
                if i in specs and specs[i][d] and op.inputs[i] is not None:
                    value = op.inputs[i]
                    mask = specs[i][d]
                    specs[i] = wanted[i] = tuple(
                        0 if k == d else m for k, m in enumerate(specs[i])
                    )
                    moves.append(
                        Move(
                            "all-gather",
                            mask,
                            self.bytes(value, specs[i]),  # type: ignore[arg-type]
                            f"input {i}",
                        )
                    )
            return Decision(wanted, None, tuple(moves))
        return self._contract(op, product, specs, wanted, moves)

    def _contract(
        self,
        op: Operation,
        product: Contraction,
        specs: dict[int, Spec],
        wanted: dict[int, Spec],
        moves: list[Move],
    ) -> Decision:
        arrays = [
            op.inputs[product.left],
            None if product.right is None else op.inputs[product.right],
            op.outputs[0],
        ]
        have = [
            specs[product.left],
            () if product.right is None else specs[product.right],
            self.spec(op.outputs[0]),
        ]
        groups: dict[tuple, int] = {}
        mask = _mask(have[0]) | _mask(have[1]) | _mask(have[2])
        for bit in range(len(self.sizes)):
            if mask >> bit & 1:
                at = tuple(
                    next((d for d, m in enumerate(spec) if m >> bit & 1), None)
                    for spec in have
                )
                groups[at] = groups.get(at, 0) | 1 << bit
        wants = [list(spec) for spec in have]
        sizes = [
            0.0 if v is None else self.bytes(v, s)
            for v, s in zip(arrays, have, strict=True)
        ]
        mine: list[Move] = []
        for at, axes in groups.items():
            index, group_moves = self._split(
                at,
                axes,
                product,
                sizes,
                arrays,
            )
            mine += group_moves
            for side, place in enumerate(at):
                goal = index[side] if index is not None else None
                if place is not None and place != goal:
                    wants[side][place] &= ~axes
                if goal is not None and place != goal:
                    wants[side][goal] |= axes
        for side, number in ((0, product.left), (1, product.right)):
            if number is not None and tuple(wants[side]) != have[side]:
                wanted[number] = tuple(wants[side])
        natural = tuple(wants[2])
        return Decision(
            wanted,
            None if natural == have[2] else natural,
            (*moves, *self._at_once(mine)),
        )

    def _at_once(self, moves: list[Move]) -> list[Move]:
        """Moves of one kind at one place are one collective over the axes of all."""
        found: list[Move] = []
        for move in moves:
            alike = (
                i
                for i, m in enumerate(found)
                if (m.kind, m.where) == (move.kind, move.where)
                and m.kind != "all-to-all"
            )
            place = next(alike, None)
            if place is None:
                found.append(move)
                continue
            first = found[place]
            whole = move.kind == "all-reduce" or (
                move.kind == "all-gather" and move.where == "out"
            )
            found[place] = first._replace(
                axes=first.axes | move.axes,
                bytes=first.bytes * (1 if whole else self.counts[move.axes]),
            )
        return found

    def _split(
        self,
        at: tuple,
        axes: int,
        product: Contraction,
        sizes: list[float],
        arrays: list[Any],
    ) -> tuple[Index | None, list[Move]]:
        """The index that a group of mesh axes splits, and what that moves; `at` are the
        dims they split in each array.
        """
        count = self.counts[axes]
        best: tuple[float, Index | None, list[Move]] | None = None
        for index in product.indices:
            if not any(
                d is not None and d == p for d, p in zip(index, at, strict=True)
            ):
                continue
            if any(
                d is not None and v is not None and v.shape[d] % count
                for d, v in zip(index, arrays, strict=True)
            ):
                continue
            if (
                index is product.indices[0]
                and product.groups > 1
                and product.groups % count
            ):
                continue
            moves = []
            for side, name in ((0, "left"), (1, "right")):
                if at[side] is None or at[side] == index[side]:
                    continue
                if index[side] is None:
                    moves.append(
                        Move(
                            "all-gather",
                            axes,
                            sizes[side] * count,
                            name,
                        )
                    )
                else:
                    moves.append(
                        Move(
                            "all-to-all",
                            axes,
                            sizes[side],
                            name,
                        )
                    )
            if index.out is None:
                if at[2] is None:
                    moves.append(
                        Move(
                            "all-reduce",
                            axes,
                            sizes[2],
                            "out",
                        )
                    )
                else:
                    moves.append(
                        Move(
                            "reduce-scatter",
                            axes,
                            sizes[2] * count,
                            "out",
                        )
                    )
            elif at[2] is None:
                moves.append(
                    Move(
                        "all-gather",
                        axes,
                        sizes[2],
                        "out",
                    )
                )
            elif at[2] != index.out:
                moves.append(
                    Move(
                        "all-to-all",
                        axes,
                        sizes[2],
                        "out",
                    )
                )
            cost = sum(
                m.bytes
                * (
                    2
                    if m.kind == "all-reduce"
                    else 1 / count
                    if m.kind == "all-to-all"
                    else 1
                )
                for m in moves
            )
            if best is None or cost < best[0]:
                best = (cost, index, moves)
        if best is None:  # nothing to split: every device gets all of it
            moves = [
                Move("all-gather", axes, sizes[side] * count, name)
                for side, name in ((0, "left"), (1, "right"))
                if at[side] is not None
            ]
            return None, moves
        return best[1], best[2]


def meets_stored(graph: Graph) -> dict[int, int]:
    """Values that meet a parameter along a dot's batch dim, as tokens meet their
    expert's kernel: by index, that dim.

    There the parameter's dim wins the mesh axis that both it and the samples could
    take: tokens move to the experts.
    """
    found: dict[int, int] = {}
    pending: list[tuple[Value, int]] = []
    near: dict[int, list[tuple[Value, dict[int, int]]]] = {}

    def link(
        a: Value,
        b: Value,
        dims: dict[int, int],
    ) -> None:
        near.setdefault(a.index, []).append((b, dims))
        near.setdefault(b.index, []).append((a, {v: k for k, v in dims.items()}))

    for op in graph.operations():
        if op.name == "dot_general" and None not in op.inputs[:2]:
            (_, _), (lb, rb) = op.params["dimension_numbers"]
            left, right = op.inputs[:2]
            assert left is not None and right is not None
            for place, (a, b) in enumerate(zip(lb, rb, strict=True)):
                trio = (
                    (left, a),
                    (right, b),
                    (op.outputs[0], place),
                )
                if any(v.stored is not None for v, _ in trio):
                    pending += [(v, d) for v, d in trio if v.stored is None]
        elif op.name == "transpose" and op.inputs[0] is not None:
            link(
                op.inputs[0],
                op.outputs[0],
                {d: o for o, d in enumerate(op.params["permutation"])},
            )
        elif op.known and op.outputs:
            for value in op.inputs:
                if (
                    value is not None
                    and value.shape == op.outputs[0].shape
                    and not op.whole
                ):
                    link(
                        value,
                        op.outputs[0],
                        {d: d for d in range(len(value.shape))},
                    )
    while pending:
        value, dim = pending.pop()
        if value.index in found:
            continue
        found[value.index] = dim
        pending += [
            (other, dims[dim])
            for other, dims in near.get(value.index, ())
            if dim in dims and other.stored is None
        ]
    return found


def itemsize(value: Value) -> int:
    return getattr(value.dtype, "itemsize", 4) or 4


def _mask(spec: Spec) -> int:
    mask = 0
    for m in spec:
        mask |= m
    return mask

"""The sharding of every value and operation of a graph under one assignment.

An assignment gives mesh axes to named axes. What follows is decided here, operation by
operation, both for the estimate of a plan's cost and for the constraints of its
program.

The named axes of a two-layer MLP are its features, hidden units, classes and batch (see
`graph`). Let the mesh have two axes of two devices each: bit 1 splits the batch, and
bit 2 the hidden units.

    >>> import jax, jax.numpy as jnp
    >>> def mlp(w1, w2, x):
    ...     return jnp.tanh(x @ w1) @ w2
    >>> shapes = [(4, 16), (16, 3), (8, 4)]
    >>> arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    >>> graph = Graph(jax.make_jaxpr(mlp)(*arguments), parameters=2)
    >>> w1, w2, x = graph.main.inputs
    >>> uses = {graph.find(x.nodes[0]): 1, graph.find(w1.nodes[1]): 2}

A spec has a mask of mesh axes for each dim. Here the kernels are stored as they are
used. The hidden layer is split over all four devices:

    >>> layout = Layout(graph, (2, 2), uses, storage=[(0, 2), (2, 0)])
    >>> first, tanh, second = graph.operations()
    >>> layout.spec(tanh.outputs[0])
    (1, 2)

The first product needs nothing that is elsewhere. The second one sums over the hidden
units, of which each device has a part, so the parts of the result are added up over bit
2: 4 x 3 numbers of 4 bytes, since the batch stays split.

    >>> layout.decide(first, contraction(first)).moves
    ()
    >>> layout.decide(second, contraction(second)).moves
    (Move(kind='all-reduce', axes=2, bytes=48.0, where='out'),)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from lepton_jax.planner.program import around
from lepton_jax.planner.program.graph import (
    BARRIER,
    IN_PART,
    KEEPING,
    Graph,
    Operation,
    Value,
)
from lepton_jax.planner.program.kernels import (
    BATCH,
    KERNELS,
    heads_dim,
    length_dim,
)
from lepton_jax.planner.program.ruled import Choice, decided
from lepton_jax.planner.program.staged import attention_spec, in_between, sent, stay
from lepton_jax.planner.rewrite.own import OWN_OPERATIONS
from lepton_jax.planner.rewrite.stage_moves import (
    MOVES,
    PARTS,
    PARTS_BACK,
    PICK,
    PLACE,
)
from lepton_jax.planner.rewrite.staged_attention import STAGED_KERNELS

# A mask of mesh axes for each dim; mesh axis i is bit 1 << i.
Spec = tuple[int, ...]

# Operations that take a stored value as it is stored, in addition to those of KEEPING:
# they sum gradients, or hand it on to what uses it.
AS_STORED = KEEPING | {"add_any", "scan", "while", "cond", BARRIER}

# So do these, where their own result is stored.
AS_STORED_BETWEEN = {"mul", "div", "select_n", "add", "sub", "slice", "pad"}

# Bytes of an element whose dtype does not say: a random key's, for instance.
ITEMSIZE = 4


# ---- contractions ----


class Index(NamedTuple):
    """One index of a contraction: the dim that it is in each array; None: in none.

    An index without a dim of the result is summed over. Sizes are of no interest here:
    their product is the work.
    """

    left: int | None
    right: int | None
    out: int | None


@dataclass(frozen=True)
class Contraction:
    """An operation as sums of products over indices.

    Attributes:
      left, right: numbers of its inputs.
      indices: the first of a grouped convolution is that of its groups, each of which
        is whole on a device.
      groups: of a convolution.
    """

    left: int
    right: int | None
    indices: tuple[Index, ...]
    groups: int = 1


def contraction(op: Operation) -> Contraction | None:
    """Return the indices of an operation that is a contraction.

    Returns:
      The indices of dots, convolutions, lookups, scattered sums and reductions; None
      for other operations.
    """
    name = op.name
    if name == "dot_general" and None not in op.inputs[:2]:
        return _dot(op)
    if name == "conv_general_dilated" and None not in op.inputs[:2]:
        return _convolution(op)
    if name == "gather" and None not in op.inputs[:2]:
        return _lookup(op)
    if name in ("scatter-add", "scatter_add") and None not in op.inputs[1:3]:
        return _scattered_sum(op)
    if name.startswith("reduce_") and "axes" in op.params:
        return _reduction(op, op.params["axes"])
    if name == PICK:
        return _reduction(op, (0,))
    return None


def _dot(op: Operation) -> Contraction:
    contracted, batched = op.params["dimension_numbers"]
    left, right = op.inputs[:2]
    assert left is not None and right is not None

    out = iter(range(len(op.outputs[0].shape)))
    indices = []
    for a, b in zip(*batched, strict=True):
        indices.append(Index(a, b, next(out)))
    for d in _other_dims(left, contracted[0], batched[0]):
        indices.append(Index(d, None, next(out)))
    for d in _other_dims(right, contracted[1], batched[1]):
        indices.append(Index(None, d, next(out)))
    for a, b in zip(*contracted, strict=True):
        indices.append(Index(a, b, None))
    return Contraction(0, 1, tuple(indices))


def _convolution(op: Operation) -> Contraction:
    numbers = op.params["dimension_numbers"]
    sample, feature, *_ = numbers.lhs_spec
    kernel_out, kernel_in, *_ = numbers.rhs_spec
    out_sample, out_feature, *_ = numbers.out_spec
    over_samples = Index(sample, None, out_sample)
    over_features = Index(feature, kernel_in, None)

    groups = op.params["feature_group_count"]
    if groups > 1:
        grouped = Index(feature, kernel_out, out_feature)
        return Contraction(0, 1, (grouped, over_samples), groups)

    groups = op.params["batch_group_count"]
    if groups > 1:
        grouped = Index(sample, kernel_out, out_feature)
        return Contraction(0, 1, (grouped, over_features), groups)

    over_kernels = Index(None, kernel_out, out_feature)
    return Contraction(0, 1, (over_samples, over_features, over_kernels))


def _lookup(op: Operation) -> Contraction:
    """Return the indices of a lookup: a product with one-hot rows, summed over them."""
    numbers = op.params["dimension_numbers"]
    table = op.inputs[0]
    assert table is not None
    looked_up = numbers.collapsed_slice_dims
    table_batch = numbers.operand_batching_dims
    index_batch = numbers.start_indices_batching_dims

    indices = []
    sliced = _other_dims(table, looked_up, table_batch)
    pairs = zip(sliced, numbers.offset_dims, strict=True)
    for d, out in pairs:
        indices.append(Index(d, None, out))
    for d in looked_up:
        indices.append(Index(d, None, None))

    table_dim = dict(zip(index_batch, table_batch, strict=True))
    rows = _other_dims(op.outputs[0], numbers.offset_dims)
    for d, out in enumerate(rows):
        indices.append(
            Index(
                table_dim.get(d),
                d,
                out,
            )
        )
    return Contraction(0, 1, tuple(indices))


def _scattered_sum(op: Operation) -> Contraction:
    """Return the indices of updates added to rows: the transpose of a lookup."""
    numbers = op.params["dimension_numbers"]
    updates = op.inputs[2]
    out = op.outputs[0]
    assert updates is not None
    inserted = numbers.inserted_window_dims
    out_batch = numbers.operand_batching_dims
    index_batch = numbers.scatter_indices_batching_dims

    indices = []
    sliced = _other_dims(out, inserted, out_batch)
    pairs = zip(sliced, numbers.update_window_dims, strict=True)
    for d, u in pairs:
        indices.append(Index(u, None, d))
    for d in inserted:
        indices.append(Index(None, None, d))

    out_dim = dict(zip(index_batch, out_batch, strict=True))
    rows = _other_dims(updates, numbers.update_window_dims)
    for d, u in enumerate(rows):
        indices.append(Index(u, d, out_dim.get(d)))
    return Contraction(2, 1, tuple(indices))


def _reduction(op: Operation, axes: Iterable[int]) -> Contraction | None:
    source = op.inputs[0]
    if source is None or len(op.outputs) != 1:
        return None
    out = iter(range(len(op.outputs[0].shape)))
    indices = []
    for d in range(len(source.shape)):
        out_dim = None if d in axes else next(out)
        indices.append(Index(d, None, out_dim))
    return Contraction(0, None, tuple(indices))


def _other_dims(value: Value, *excluded: Any) -> list[int]:
    """List the dims of a value that are not in any of some tuples of dims."""
    taken = {d for dims in excluded for d in dims}
    return [d for d in range(len(value.shape)) if d not in taken]


# ---- decisions ----


class Move(NamedTuple):
    """A collective that an operation needs.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", or of a ring
        "collective-permute" and "permutation" (see `around`).
      axes: mask of the mesh axes over which it runs.
      bytes: of a device (see Link.seconds).
      where: "left", "right", "out" or "input N"; of an operation with a user's rule
        "operand N" or "result N".
      steps: collectives that send these bytes one after the other.
    """

    kind: str
    axes: int
    bytes: float
    where: str
    steps: int = 1


@dataclass(frozen=True)
class Decision:
    """The split of one operation over the devices.

    Attributes:
      inputs: number of an input to the spec in which the operation takes it, where
        that is not the one in which it lies.
      natural: the spec that the result has by itself; None: the wanted one.
      moves: the collectives that this takes.
      choice: of an operation with a user's rule: how it is split.
    """

    inputs: dict[int, Spec]
    natural: Spec | None
    moves: tuple[Move, ...]
    choice: Choice | None = None


class _Split(NamedTuple):
    """The index of a contraction that some mesh axes split, and what that moves."""

    chosen: Index | None
    moves: list[Move]


class Layout:
    """The sharding of every value and operation of a graph under one assignment.

    Args:
      graph: the program.
      sizes: of the mesh axes; axis i is bit 1 << i.
      uses: root of a named axis to the mask of the mesh axes that split it in
        computing.
      storage: for each parameter, one mask a dim: how the state keeps it.
      prefers: by value's index, dims that win where two of them would take one mesh
        axis (see `meets_stored`).
      batched: indices of the values that hold samples.
      parts: the number of micro-batches in which the samples come.
      ring: whether attention over a split sequence goes around a ring, also where heads
        can be exchanged.

    Attributes:
      counts: the number of devices along each mask of mesh axes.
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
        ring: bool = False,
    ):
        """Lay out a graph."""
        self.graph = graph
        self.sizes = sizes
        self.uses = uses
        self.storage = storage
        self.prefers = prefers or {}
        self.batched = batched
        self.parts = parts
        self.ring = ring
        self.counts = device_counts(sizes)

    # ---- values ----

    def use(self, value: Value) -> Spec:
        """Return the spec of a value while it is computed with.

        Each mesh axis goes to the first dim that could take it.
        """
        uses = self.uses
        find = self.graph.find
        wanted = [uses.get(find(node), 0) for node in value.nodes]
        if not any(wanted):
            return (0,) * len(wanted)

        dims = range(len(wanted))
        preferred = self.prefers.get(value.index)
        order = dims if preferred is None else _with_first(preferred, dims)

        taken = 0
        spec = [0] * len(wanted)
        for dim in order:
            mask = wanted[dim] & ~taken
            if mask and value.shape[dim] % self.counts[mask]:
                mask = 0
            spec[dim] = mask
            taken |= mask
        return tuple(spec)

    def spec(self, value: Value) -> Spec:
        """Return the spec in which a value lies; a stored one as the state keeps it."""
        if value.stored is None:
            return self.use(value)
        index, dims = value.stored
        stored = self.storage[index]
        return tuple(0 if dim == IN_PART else stored[dim] for dim in dims)

    def result(
        self,
        op: Operation,
        value: Value,
    ) -> Spec:
        """Return the spec in which a result comes out of an operation with whole dims.

        It is split only as the operation's inputs are.
        """
        spec = self.spec(value)
        find = self.graph.find
        if not any(spec):
            return spec

        split = set()
        for number, source in enumerate(op.inputs):
            if source is None:
                continue
            for dim, node in enumerate(source.nodes):
                if (number, dim) not in op.whole:
                    split.add(find(node))
        pairs = zip(spec, value.nodes, strict=True)
        return tuple(mask if find(node) in split else 0 for mask, node in pairs)

    def bytes(
        self,
        value: Value,
        spec: Spec,
    ) -> float:
        """Return the bytes that a device has of a value in one micro-batch."""
        parts = self.parts if value.index in self.batched else 1
        whole = math.prod(value.shape) * itemsize(value)
        return whole / self.counts[_union(spec)] / parts

    # ---- operations ----

    def decide(
        self,
        op: Operation,
        product: Contraction | None,
    ) -> Decision:
        """Decide how an operation is split.

        Where its arrays disagree, the way is taken that moves the fewest bytes.

        Args:
          op: an operation of the graph.
          product: the same as a contraction (see `contraction`).
        """
        specs: dict[int, Spec] = {}
        wanted: dict[int, Spec] = {}
        moves: list[Move] = []
        as_stored = _takes_as_stored(op)
        for number, value in enumerate(op.inputs):
            if value is None:
                continue
            spec = self.spec(value)
            if value.stored is not None and not as_stored:
                use = self.use(value)
                if use != spec:
                    wanted[number] = use
                    moves += self._gather(number, value, spec, use)
                    spec = use
            specs[number] = spec

        if product is not None:
            return self._contract(op, product, specs, wanted, moves)
        if op.name in KERNELS:
            return self._attend(op, specs)
        if op.name in OWN_OPERATIONS:
            return self._own(op, specs, moves)
        if op.name in (*STAGED_KERNELS, *MOVES):
            return self._between_stages(op, specs)
        return self._whole(op, specs, wanted, moves)

    def _whole(
        self,
        op: Operation,
        specs: dict[int, Spec],
        wanted: dict[int, Spec],
        moves: list[Move],
    ) -> Decision:
        """Decide how an operation is split that needs some dims whole."""
        for number, dim in op.whole:
            spec = specs.get(number, ())
            if spec and spec[dim]:
                value = op.inputs[number]
                assert value is not None
                whole = (
                    *spec[:dim],
                    0,
                    *spec[dim + 1 :],
                )
                wanted[number] = whole
                moves += self._gather(number, value, spec, whole)
                specs[number] = whole
        return Decision(wanted, None, tuple(moves))

    def shares(self, op: Operation) -> around.Shares:
        """Return how attention meets its sequence."""
        values = [value for value in (*op.inputs, *op.outputs) if value is not None]
        specs = [self.spec(value) for value in values[: len(op.inputs)]]
        _, heads, length = _common(specs)
        shapes = [value.shape for value in values]
        return around.shares(shapes, heads, length, self.counts, self.ring)

    def _attend(
        self,
        op: Operation,
        specs: dict[int, Spec],
    ) -> Decision:
        """Decide how attention is split: over samples and heads, in all its arrays.

        Where its arrays are split along the length, the devices exchange parts of it
        for heads, or pass keys and values around (see `around`).
        """
        values = [value for value in (*op.inputs, *op.outputs) if value is not None]
        shapes = [value.shape for value in values]
        samples, heads, _ = _common(specs.values())
        shares = self.shares(op)
        heads |= shares.exchanged

        wanted = {}
        moves = []
        for number, spec in specs.items():
            goal = around.goal(spec, samples, heads, shares.ring)
            if goal == spec:
                continue
            wanted[number] = goal
            value = values[number]
            if shares.exchanged and heads_dim(spec) is not None:
                size = self.bytes(value, spec)
                where = f"input {number}"
                moves.append(Move("all-to-all", shares.exchanged, size, where))
            moves += self._gather(number, value, spec, goal)
        if shares.exchanged:
            sizes = [self.bytes(value, self.spec(value)) for value in op.outputs]
            moves += [
                Move("all-to-all", shares.exchanged, size, "out") for size in sizes
            ]
        if shares.ring:
            goals = [around.goal(s, samples, heads, shares.ring) for s in shapes]
            pairs = zip(values, goals, strict=True)
            sizes = [self.bytes(value, goal) for value, goal in pairs]
            for passage in around.passages(op, sizes, self.counts[shares.ring]):
                kind, where, size, steps = passage
                moves.append(Move(kind, shares.ring, size, where, steps))
        return Decision(wanted, None, tuple(moves))

    def _between_stages(
        self,
        op: Operation,
        specs: dict[int, Spec],
    ) -> Decision:
        """Decide how operations of all stages are split."""
        if op.name in MOVES:
            return self._move_stages(op, specs)
        return self._attend_in_stages(op, specs)

    def _attend_in_stages(
        self,
        op: Operation,
        specs: dict[int, Spec],
    ) -> Decision:
        """Decide how attention of all stages is split: stages, samples and heads."""
        wanted = {}
        moves = []
        for number, spec in specs.items():
            value = op.inputs[number]
            assert value is not None
            goal = attention_spec(specs.values(), value.shape)
            if goal != spec:
                wanted[number] = goal
                moves += self._gather(number, value, spec, goal)
        return Decision(wanted, None, tuple(moves))

    def _move_stages(
        self,
        op: Operation,
        specs: dict[int, Spec],
    ) -> Decision:
        """Decide how a move between stages is split: as its result is."""
        value = op.inputs[0]
        if value is None:
            return Decision({}, None, ())
        spec = specs[0]
        if op.name == PLACE:
            goal = self.spec(op.outputs[0])[1:]
            moves = self._gather(0, value, spec, goal)
            return Decision({} if goal == spec else {0: goal}, None, tuple(moves))
        if op.name in (PARTS, PARTS_BACK):
            return self._take_apart(op, spec)
        needs = sent(op, spec)
        if needs is None:
            return Decision({}, None, ())
        size = self.bytes(value, spec)
        return Decision({}, None, (Move(needs.kind, needs.axes, size, "input 0"),))

    def _take_apart(self, op: Operation, spec: Spec) -> Decision:
        """Decide how samples become micro-batches, or these samples again."""
        result = self.spec(op.outputs[0])
        value = op.inputs[0]
        assert value is not None
        whole, parted = (result, spec) if op.name == PARTS_BACK else (spec, result)
        between = in_between(whole, parted)
        moves = []
        if not stay(between, op.params["groups"], self.counts):
            axes = between[0] | between[1]
            moves.append(Move("all-to-all", axes, self.bytes(value, spec), "input 0"))
        if op.name == PARTS_BACK:
            wanted = {} if between == spec else {0: between}
            return Decision(wanted, None, tuple(moves))
        if between == result:
            return Decision({}, None, tuple(moves))
        size = self.bytes(op.outputs[0], result)
        moves.append(Move("all-gather", between[0], size, "out"))
        return Decision({}, between, tuple(moves))

    def _own(
        self,
        op: Operation,
        specs: dict[int, Spec],
        moves: list[Move],
    ) -> Decision:
        """Decide how an operation with a user's rule is split."""
        choice = decided(self, op, specs)
        wanted = {}
        for number, spec in choice.inputs.items():
            value = op.inputs[number]
            assert value is not None
            if spec != self.spec(value):
                wanted[number] = spec
        own_moves = [Move(*move) for move in choice.moves]
        return Decision(wanted, None, (*moves, *own_moves), choice)

    def _gather(
        self,
        number: int,
        value: Value,
        spec: Spec,
        goal: Spec,
    ) -> list[Move]:
        """Return the move of an input to a spec that splits it over fewer axes."""
        axes = _union(spec) & ~_union(goal)
        if not axes:
            return []
        size = self.bytes(value, goal)
        return [Move("all-gather", axes, size, f"input {number}")]

    def _contract(
        self,
        op: Operation,
        product: Contraction,
        specs: dict[int, Spec],
        wanted: dict[int, Spec],
        moves: list[Move],
    ) -> Decision:
        """Decide how a contraction is split, each group of mesh axes by itself."""
        sides = _Sides.of(self, op, product, specs)
        goals = [list(spec) for spec in sides.specs]
        own_moves: list[Move] = []
        for places, axes in sides.groups(len(self.sizes)):
            split = self._split(places, axes, product, sides)
            own_moves += split.moves
            _move_axes(goals, places, split.chosen, axes)

        left, right, natural = (tuple(goal) for goal in goals)
        if left != sides.specs[0]:
            wanted[product.left] = left
        if product.right is not None and right != sides.specs[1]:
            wanted[product.right] = right
        all_moves = (*moves, *self._merged(own_moves))
        as_wanted = natural == sides.specs[2]
        return Decision(wanted, None if as_wanted else natural, all_moves)

    def _merged(
        self,
        moves: list[Move],
    ) -> list[Move]:
        """Merge moves of one kind at one place to one collective over all axes."""
        merged: list[Move] = []
        numbers: dict[tuple[str, str], int] = {}
        for move in moves:
            key = (move.kind, move.where)
            number = None if move.kind == "all-to-all" else numbers.get(key)
            if number is None:
                numbers[key] = len(merged)
                merged.append(move)
                continue

            # the bytes of these are those of the result; those of others grow with it
            of_result = key in (("all-reduce", "out"), ("all-gather", "out"))
            growth = 1 if of_result else self.counts[move.axes]
            first = merged[number]
            merged[number] = first._replace(
                axes=first.axes | move.axes,
                bytes=first.bytes * growth,
            )
        return merged

    def _split(
        self,
        places: tuple,
        axes: int,
        product: Contraction,
        sides: _Sides,
    ) -> _Split:
        """Choose the index that a group of mesh axes splits.

        Args:
          places: the dim that the axes split in each of left, right and out.
          axes: the mesh axes.
          product: the contraction.
          sides: its arrays.
        """
        count = self.counts[axes]
        best: _Split | None = None
        lowest = math.inf
        for index in product.indices:
            if not _is_split(index, places) or not sides.divides(index, count):
                continue
            grouped = product.groups > 1 and index is product.indices[0]
            if grouped and product.groups % count:
                continue
            moves = _moves_to(index, places, axes, count, sides.bytes)
            cost = sum(_weight(move, count) for move in moves)
            if cost < lowest:
                best = _Split(index, moves)
                lowest = cost
        if best is not None:
            return best

        # nothing can be split: every device gets all of it
        moves = []
        for side, name in enumerate(("left", "right")):
            if places[side] is not None:
                size = sides.bytes[side] * count
                moves.append(Move("all-gather", axes, size, name))
        return _Split(None, moves)


class _Sides(NamedTuple):
    """The left, right and resulting array of a contraction, as they lie."""

    values: tuple[Value | None, ...]
    specs: tuple[Spec, ...]
    bytes: tuple[float, ...]

    @classmethod
    def of(
        cls,
        layout: Layout,
        op: Operation,
        product: Contraction,
        specs: dict[int, Spec],
    ) -> _Sides:
        """Return the sides of an operation whose inputs have some specs."""
        left = op.inputs[product.left]
        out = op.outputs[0]
        right = None
        right_spec: Spec = ()
        if product.right is not None:
            right = op.inputs[product.right]
            right_spec = specs[product.right]

        values = (left, right, out)
        own_specs = (
            specs[product.left],
            right_spec,
            layout.spec(out),
        )
        sizes = []
        for value, spec in zip(values, own_specs, strict=True):
            sizes.append(0.0 if value is None else layout.bytes(value, spec))
        return cls(values, own_specs, tuple(sizes))

    def groups(
        self,
        axes: int,
    ) -> Iterator[tuple[tuple, int]]:
        """Group the mesh axes that split the same dims.

        Yields:
          The dim in each array, None where it is not split, and the mask of the axes.
        """
        groups: dict[tuple, int] = {}
        used = 0
        for spec in self.specs:
            used |= _union(spec)
        for axis in range(axes):
            bit = 1 << axis
            if used & bit:
                places = tuple(_dim_with(spec, bit) for spec in self.specs)
                groups[places] = groups.get(places, 0) | bit
        yield from groups.items()

    def divides(
        self,
        index: Index,
        count: int,
    ) -> bool:
        """Whether a number of devices divides an index in each array that has it."""
        pairs = zip(index, self.values, strict=True)
        for dim, value in pairs:
            if dim is not None and value is not None and value.shape[dim] % count:
                return False
        return True


def _common(specs: Iterable[Spec]) -> tuple[int, int, int]:
    """Return the axes that split samples, heads and length of all of some arrays."""
    samples = heads = length = -1
    for spec in specs:
        samples &= spec[BATCH]
        length &= spec[length_dim(spec)]
        place = heads_dim(spec)
        heads &= -1 if place is None else spec[place]
    return samples, heads, length


def _with_first(
    first: int,
    dims: Iterable[int],
) -> tuple[int, ...]:
    return (first, *(dim for dim in dims if dim != first))


def _takes_as_stored(op: Operation) -> bool:
    """Whether an operation takes stored values as the state keeps them."""
    if op.name in AS_STORED:
        return True
    stored = bool(op.outputs) and op.outputs[0].stored is not None
    return stored and op.name in AS_STORED_BETWEEN


def _dim_with(
    spec: Spec,
    bit: int,
) -> int | None:
    """Return the first dim that a mesh axis splits."""
    for dim, mask in enumerate(spec):
        if mask & bit:
            return dim
    return None


def _move_axes(
    goals: list[list[int]],
    places: tuple,
    chosen: Index | None,
    axes: int,
) -> None:
    """Move mesh axes, in the masks of each array, to the dims of a chosen index."""
    for side, place in enumerate(places):
        goal = None if chosen is None else chosen[side]
        if place == goal:
            continue
        if place is not None:
            goals[side][place] &= ~axes
        if goal is not None:
            goals[side][goal] |= axes


def _is_split(index: Index, places: tuple) -> bool:
    """Whether some array is split along an index."""
    for dim, place in zip(index, places, strict=True):
        if dim is not None and dim == place:
            return True
    return False


def _moves_to(
    index: Index,
    places: tuple,
    axes: int,
    count: int,
    sizes: tuple[float, ...],
) -> list[Move]:
    """List the moves after which mesh axes split one index.

    Args:
      index: the index.
      places: the dim that the axes split now in left, right and out; of the result,
        the one that is wanted.
      axes: the mesh axes.
      count: the number of devices along them.
      sizes: bytes of left, right and out on a device.
    """
    moves = []
    for side, name in enumerate(("left", "right")):
        if places[side] is None or places[side] == index[side]:
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

    wanted = places[2]
    size = sizes[2]
    if index.out is None:
        if wanted is None:
            moves.append(Move("all-reduce", axes, size, "out"))
        else:
            moves.append(Move("reduce-scatter", axes, size * count, "out"))
    elif wanted is None:
        moves.append(Move("all-gather", axes, size, "out"))
    elif wanted != index.out:
        moves.append(Move("all-to-all", axes, size, "out"))
    return moves


def _weight(move: Move, count: int) -> float:
    """Return the bytes that a move sends, as a ring does, for comparison.

    An all-reduce passes its bytes around twice, an all-to-all sends each device its
    part only.
    """
    if move.kind == "all-reduce":
        return move.bytes * 2
    if move.kind == "all-to-all":
        return move.bytes * (1 / count)
    return move.bytes


# ---- values that meet parameters ----


def meets_stored(
    graph: Graph,
) -> dict[int, int]:
    """Find the values that meet a parameter along a dot's batch dim.

    Tokens meet the kernel of their expert so. There the parameter's dim wins the mesh
    axis that both it and the samples could take: tokens move to the experts.

    Returns:
      The value's index to that dim. Values that are only elementwise or transposed from
      those that meet a parameter are among them.
    """
    pending: list[tuple[Value, int]] = []
    neighbors = _Neighbors()
    for op in graph.operations():
        if op.name == "dot_general":
            pending += _meetings(op)
        else:
            neighbors.add(op)

    meeting: dict[int, int] = {}
    while pending:
        value, dim = pending.pop()
        if value.index not in meeting:
            meeting[value.index] = dim
            pending += neighbors.along(value, dim)
    return meeting


def _meetings(
    dot: Operation,
) -> list[tuple[Value, int]]:
    """List the values that meet a stored one along a dot's batch dim, with that dim."""
    left, right = dot.inputs[:2]
    if left is None or right is None:
        return []
    meetings = []
    _, batched = dot.params["dimension_numbers"]
    pairs = zip(*batched, strict=True)
    for out_dim, (left_dim, right_dim) in enumerate(pairs):
        arrays = (
            (left, left_dim),
            (right, right_dim),
            (dot.outputs[0], out_dim),
        )
        free = [(value, dim) for value, dim in arrays if value.stored is None]
        if len(free) < len(arrays):
            meetings += free
    return meetings


_Link = tuple[Value, dict[int, int]]


class _Neighbors:
    """Values that are only elementwise or transposed from each other."""

    def __init__(self):
        # a value's index to its neighbors, each with their dim for each of its dims
        self._links: dict[int, list[_Link]] = {}

    def add(self, op: Operation) -> None:
        """Link the inputs of an operation to its result, if it is of that kind."""
        if op.name == "transpose":
            source = op.inputs[0]
            if source is not None:
                permutation = op.params["permutation"]
                dims = {d: out for out, d in enumerate(permutation)}
                self._link(source, op.outputs[0], dims)
            return
        if not op.known or not op.outputs or op.whole:
            return
        result = op.outputs[0]
        for value in op.inputs:
            if value is not None and value.shape == result.shape:
                dims = {d: d for d in range(len(value.shape))}
                self._link(value, result, dims)

    def _link(
        self,
        left: Value,
        right: Value,
        dims: dict[int, int],
    ) -> None:
        back = {there: here for here, there in dims.items()}
        of_left = self._links.setdefault(left.index, [])
        of_left.append((right, dims))
        of_right = self._links.setdefault(right.index, [])
        of_right.append((left, back))

    def along(
        self,
        value: Value,
        dim: int,
    ) -> list[tuple[Value, int]]:
        """List the neighbors of a value that are not stored, with their same dims."""
        neighbors = []
        for other, dims in self._links.get(value.index, ()):
            if dim in dims and other.stored is None:
                neighbors.append((other, dims[dim]))
        return neighbors


# ---- sizes ----


def device_counts(
    sizes: tuple[int, ...],
) -> list[int]:
    """Return the number of devices along each mask of mesh axes of some sizes."""
    counts = []
    for mask in range(1 << len(sizes)):
        split = [size for axis, size in enumerate(sizes) if mask >> axis & 1]
        counts.append(math.prod(split))
    return counts


def itemsize(value: Value) -> int:
    """Return the bytes of an element of a value."""
    return getattr(value.dtype, "itemsize", ITEMSIZE) or ITEMSIZE


def _union(spec: Spec) -> int:
    mask = 0
    for own in spec:
        mask |= own
    return mask

"""Operations that a user brings: what the planner makes of their rules.

A mesh axis splits one named dim of an operation, in all of its arrays, or none. Take
rows that are normalized, (batch, width) and (width,), of which the width is whole, on a
mesh axis of two devices:

  rows split by the axis, scale whole     nothing moves
  rows whole, the result wanted split     each device takes its rows
  the width split                         rows change hands (all-to-all)
  gradient of the scale                   the sum of both devices' parts

Of all ways to give the axis to a dim the one is taken that moves the fewest bytes.
Where some array is split along a dim that may be, the work is always divided.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.planner.program.ragged import RAGGED, is_dense, ragged_flops
from lepton_jax.planner.rewrite.notation import UNNAMED, Names
from lepton_jax.planner.rewrite.own import (
    MAPPED,
    OWN_OPERATIONS,
    Own,
    Shapes,
    shape_of,
)
from lepton_jax.planner.rewrite.program import (
    parts,
    shape_of_operand,
    shape_of_result,
)

# A mask of mesh axes for each dim
Spec = tuple[int, ...]

# The name of a dim that a mesh axis called "expert" splits.
EXPERTS = "experts"

# FLOP of a gradient over those of the operation: one product forward is two backward.
BACKWARD_BY_FORWARD = 2


class Arrays(NamedTuple):
    """An operation's arrays that have dims.

    Attributes:
      inputs: number, value and names of each operand that is no literal.
      results: value and names.
      sums: for each result, the names of the dims over which it is added up.
      free: names of the dims that may be split.
    """

    inputs: tuple[tuple[int, Any, Names], ...]
    results: tuple[tuple[Any, Names], ...]
    sums: tuple[frozenset[str], ...]
    free: tuple[str, ...]

    @classmethod
    def of(cls, op: Any) -> Arrays:
        """Return the arrays of an operation with a rule."""
        own: Own = op.params["own"]
        given = own.dims()
        whole = own.whole()
        inputs = []
        seen: dict[str, None] = {}
        pairs = zip(op.inputs, given.inputs, strict=True)
        for number, (value, names) in enumerate(pairs):
            seen.update(dict.fromkeys(names))
            if value is not None:
                inputs.append((number, value, names))

        free = tuple(name for name in seen if name not in whole)
        results = tuple(zip(op.outputs, given.results, strict=False))
        sums = [frozenset(free).difference(names) for _, names in results]
        return cls(tuple(inputs), results, tuple(sums), free)

    def named(self) -> list[tuple[Any, Names]]:
        """List all arrays with the names of their dims."""
        inputs = [(value, names) for _, value, names in self.inputs]
        return [*inputs, *self.results]


class Choice(NamedTuple):
    """The split of an operation.

    Attributes:
      inputs: the spec of each operand, by its number.
      results: the spec of each result as it comes out, sums added up.
      sums: for each result, the mesh axes over which it is added up, all of the
        result on each device.
      scattered: for each result, the mesh axes over which it is added up of each dim
        of which a device gets its part.
      moves: kind, mesh axes, bytes, where, as in `layout.Move`.
      share: of the work that a device has.
      workspace: the spec of each array that it needs while it runs.
    """

    inputs: dict[int, Spec]
    results: tuple[Spec, ...]
    sums: tuple[int, ...]
    scattered: tuple[Spec, ...]
    moves: tuple[tuple[str, int, float, str], ...]
    share: float
    workspace: tuple[Spec, ...] = ()


def join_own(graph: Any, op: Any) -> None:
    """Join the dims that have one name; add the workspace to the results."""
    scratch = [_scratch(graph, op, names) for names in _workspace(op)]
    op.outputs = [*op.outputs, *scratch]

    arrays = Arrays.of(op)
    first: dict[str, int] = {}
    for value, names in arrays.named():
        for node, name in zip(value.nodes, names, strict=True):
            if name != UNNAMED:
                graph.join(node, first.setdefault(name, node))
    for number, _, names in arrays.inputs:
        for dim, name in enumerate(names):
            if name not in arrays.free:
                op.whole.append((number, dim))
            elif any(name in sums for sums in arrays.sums):
                op.reduced.append((number, dim))


def expert_nodes(op: Any) -> list[int]:
    """List the nodes of dims of parameters that a user's rule calls "experts"."""
    if op.name not in OWN_OPERATIONS:
        return []
    nodes = []
    dims = op.params["own"].dims()
    for value, names in zip(op.inputs, dims.inputs, strict=True):
        if value is None or value.stored is None:
            continue
        if EXPERTS in names:
            dim = names.index(EXPERTS)
            nodes.append(value.nodes[dim])
    return nodes


def decided(layout: Any, op: Any, specs: dict[int, Spec]) -> Choice:
    """Decide how an operation with a rule is split.

    Args:
      layout: of the graph.
      op: the operation.
      specs: the spec in which each of its operands lies, by number.
    """
    arrays = Arrays.of(op)
    wanted = [layout.spec(value) for value, _ in arrays.results]
    split: dict[str, int] = {}
    axes = 0
    moves: list[_Move] = []
    for axis in range(len(layout.sizes)):
        bit = 1 << axis
        grown = _grown(moves)
        options = _options(layout, arrays, specs, wanted, split, bit, grown)
        best = _best(list(options))
        moves += best.moves
        if best.name is not None:
            split[best.name] = split.get(best.name, 0) | bit
            axes |= bit

    scattered = []
    sums = []
    results = []
    natural = [_spec(names, split) for _, names in arrays.results]
    for own, goal, over in zip(natural, wanted, arrays.sums, strict=True):
        mask = _union(split.get(name, 0) for name in over)
        apart = _scattered(own, goal, mask)
        pairs = zip(own, apart, strict=True)
        scattered.append(apart)
        sums.append(mask & ~_union(apart))
        results.append(tuple(a | b for a, b in pairs))
    return Choice(
        {number: _spec(names, split) for number, _, names in arrays.inputs},
        tuple(results),
        tuple(sums),
        tuple(scattered),
        tuple(_merged(layout, moves)),
        1 / layout.counts[axes],
        tuple(_spec(names, split) for names in _workspace(op)),
    )


def workspace(op: Any) -> list[Any]:
    """List the values of the arrays that an operation with a rule needs meanwhile."""
    if op.name not in OWN_OPERATIONS:
        return []
    return op.outputs[len(op.eqn.outvars) :]


def _best(options: list[_Option]) -> _Option:
    """Return the option with the lowest rank; one that splits, if an array is split."""
    if any(option.meets for option in options):
        options = [option for option in options if option.name is not None]
    return min(options, key=lambda option: option.rank)


def added_up(results: list[Any], choice: Choice, mesh: Any) -> list[Any]:
    """Add up a device's results with those of the others, in `shard_map`.

    Args:
      results: the device's own.
      choice: see `decided`.
      mesh: with the layout's axes, in their order.
    """
    names = mesh.axis_names
    # On CPUs as XLA's partitioner has it, see `estimate.cost.as_compiled`. On TPUs XLA
    # forms reduce-scatters itself; libtpu 0.0.42 fails on some that it is given
    # ("subgroup_size == 1 || shard_count == subgroup_size": `tools/plan.py
    # recipes/lm.py --size 8b --experts 32 --dropless --on v5p:4x4x8 --verify`).
    scatters = mesh.devices.flat[0].platform not in ("cpu", "tpu")
    whole = []
    triples = zip(results, choice.sums, choice.scattered, strict=True)
    for x, mask, scattered in triples:
        for dim, axes in enumerate(scattered):
            picked = _picked(axes, names)
            if axes and scatters:
                x = jax.lax.psum_scatter(x, picked, scatter_dimension=dim, tiled=True)
            elif axes:
                x = jax.lax.psum(x, picked)
                x = _own_part(x, picked, dim)
        if mask:
            x = jax.lax.psum(x, _picked(mask, names))
        whole.append(x)
    return whole


def _own_part(x: Any, axes: tuple[str, ...], dim: int) -> Any:
    """Return a device's part of a dim."""
    size = x.shape[dim] // jax.lax.axis_size(axes)
    start = jax.lax.axis_index(axes) * size
    return jax.lax.dynamic_slice_in_dim(x, start, size, dim)


# ---- work ----


def own_flops(eqn: Any, platform: str = "", merged: bool = False) -> float:
    """Return the FLOP of an equation with a rule, on whole arrays.

    Args:
      eqn: the equation.
      platform: of the backend that computes it; "": as few as the rule needs.
      merged: whether XLA merges the two runs of a forward pass that the backward pass
        runs again.
    """
    own: Own = eqn.params["own"]
    shapes = _shapes(eqn.invars)
    flops = _flops(own, shapes, platform)
    forward, _ = own.rule.flops
    if merged and own.repeats and forward is None:
        operands = shapes[: len(own.shapes)]
        flops -= _flops(own.before(), operands, platform)
    return flops


def _shapes(variables: Iterable[Any]) -> Shapes:
    return tuple(shape_of(variable.aval) for variable in variables)


def own_bytes(eqn: Any) -> float:
    """Return the bytes that an equation with a rule reads and writes, whole."""
    own: Own = eqn.params["own"]
    shapes = _shapes(eqn.invars)
    forward, backward = own.rule.bytes
    given = (own.backward and backward) or forward
    if given is not None:
        return _times(own, shapes) * float(given(*own.shapes))
    moved = [*shapes, *_shapes(eqn.outvars)]
    return float(sum(_nbytes(x) for x in moved))


def _nbytes(x: jax.ShapeDtypeStruct) -> int:
    return x.size * np.dtype(x.dtype).itemsize


@functools.lru_cache(maxsize=256)
def _flops(own: Own, shapes: Shapes, platform: str) -> float:
    forward, backward = own.rule.flops
    if own.backward and backward is not None:
        return _times(own, shapes) * float(backward(*own.shapes))
    if forward is not None:
        factor = BACKWARD_BY_FORWARD if own.backward else 1
        once = float(forward(*own.shapes))
        return _times(own, shapes) * factor * once
    return traced_flops(_traced(own, shapes, platform), platform)


def _traced(own: Own, shapes: Shapes, platform: str) -> Any:
    """Return the program of an operation on whole arrays."""
    run = functools.partial(own.run, platform)
    return jax.make_jaxpr(run)(*shapes).jaxpr


def hidden_flops(eqn: Any, platform: str) -> float:
    """Return those FLOP of an equation with a rule that XLA's text does not show.

    Args:
      eqn: the equation.
      platform: of the backend; on CPUs kernels are interpreted, and XLA sees their
        products.
    """
    own: Own = eqn.params["own"]
    program = _traced(own, _shapes(eqn.invars), platform)
    shown = traced_flops(program, platform, shown=True)
    return max(0.0, own_flops(eqn, platform) - shown)


def traced_flops(jaxpr: Any, platform: str = "", shown: bool = False) -> float:
    """Return the FLOP of the products of a program.

    A kernel of `pallas` runs once for each point of its grid, unless its
    `cost_estimate` says how much it computes.

    Args:
      jaxpr: the program.
      platform: of the backend that computes it.
      shown: only the products that XLA's text shows.
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        total += _flops_of(eqn, platform, shown)
    return total


def _flops_of(eqn: Any, platform: str, shown: bool) -> float:
    """Return the FLOP of the products of an equation, see `traced_flops`."""
    name = eqn.primitive.name
    is_hidden = shown and platform != "cpu"
    if name == "dot_general":
        return _product_flops(eqn)
    if name == RAGGED:
        dense = bool(platform) and is_dense(eqn, platform)
        return 0.0 if is_hidden and not dense else ragged_flops(eqn, dense)

    times = 1
    if name == "scan":
        times = eqn.params["length"]
    if name == "pallas_call":
        if is_hidden:
            return 0.0
        estimate = eqn.params.get("cost_estimate")
        if estimate is not None:
            return float(estimate.flops)
        times = math.prod(eqn.params["grid_mapping"].grid)
    return times * sum(traced_flops(part, platform, shown) for part in parts(eqn))


def _product_flops(eqn: Any) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left = shape_of_operand(eqn)
    terms = math.prod(left[dim] for dim in contracted)
    return 2.0 * math.prod(shape_of_result(eqn)) * terms


def _times(own: Own, shapes: Shapes) -> int:
    """Return how often a `jax.vmap` around it repeats an operation."""
    extents: dict[str, int] = {}
    for names, x in zip(own.dims().inputs, shapes, strict=True):
        extents.update(zip(names, x.shape, strict=True))
    mapped = [name for name in extents if name.startswith(MAPPED)]
    return math.prod(extents[name] for name in mapped)


# ---- internals ----


def _extents(op: Any) -> dict[str, tuple[int, int]]:
    """Return the extent and a node of each name of an operation's operands."""
    extents: dict[str, tuple[int, int]] = {}
    given = op.params["own"].dims()
    for value, own in zip(op.inputs, given.inputs, strict=True):
        if value is not None:
            dims = zip(value.shape, value.nodes, strict=True)
            extents.update(zip(own, dims, strict=True))
    return extents


def _workspace(op: Any) -> list[Names]:
    """List the arrays of an operation's workspace whose dims its operands have."""
    known = _extents(op).keys()
    return [names for names in op.params["own"].workspace() if set(names) <= known]


def _scratch(graph: Any, op: Any, names: Names) -> Any:
    """Return a value for an array that an operation needs while it runs."""
    extents = _extents(op)
    dtype = op.outputs[0].dtype
    value = graph.scratch(tuple(extents[name][0] for name in names), dtype)
    for node, name in zip(value.nodes, names, strict=True):
        graph.join(node, extents[name][1])
    return value


class _Option(NamedTuple):
    """A way to give a mesh axis to a dim.

    Attributes:
      name: of the dim; None: the axis splits nothing, and all its devices do the same.
      moves: what this takes.
      meets: arrays that are split so already.
      rank: the best option has the lowest.
    """

    name: str | None
    moves: list[_Move]
    meets: int
    rank: tuple[float, int]


def _options(
    layout: Any,
    arrays: Arrays,
    specs: dict[int, Spec],
    wanted: list[Spec],
    split: dict[str, int],
    bit: int,
    grown: dict[str, int],
) -> Iterator[_Option]:
    """Yield each way to give a mesh axis to a dim, or to none.

    Args:
      layout: of the graph.
      arrays: of the operation.
      specs: in which the operands lie.
      wanted: the specs that are wanted of the results.
      split: the mesh axes that split each name already.
      bit: the mesh axis.
      grown: the mesh axes over which each array is gathered, or scattered, already.
    """
    for name in (*arrays.free, None):
        if name is not None and not _divides(layout, arrays, name, split, bit):
            continue
        moves: list[_Move] = []
        meets = 0
        for number, value, names in arrays.inputs:
            here = _place(specs[number], bit)
            there = _index(names, name)
            meets += here is not None and here == there
            size = layout.bytes(value, specs[number])
            moves += _moves_of(here, there, bit, size, f"operand {number}")
        triples = zip(arrays.results, arrays.sums, wanted, strict=True)
        for number, ((value, names), sums, goal) in enumerate(triples):
            where = f"result {number}"
            here = _index(names, name)
            there = _place(goal, bit)
            meets += here is not None and here == there
            size = layout.bytes(value, goal)
            if name in sums:
                moves.append(_sum_of(there, bit, size, where))
            else:
                moves += _result_moves(here, there, bit, size, where)
        cost = sum(_weight(layout, move, grown) for move in moves)
        second = 1 if name is None else -meets
        yield _Option(name, moves, meets, (cost, second))


def _index(names: Names, name: str | None) -> int | None:
    """Return the dim that a mesh axis given to a name splits; None: none."""
    if name is None or name not in names:
        return None
    return names.index(name)


def _divides(
    layout: Any, arrays: Arrays, name: str, split: dict[str, int], bit: int
) -> bool:
    axes = split.get(name, 0) | bit
    count = layout.counts[axes]
    for value, names in arrays.named():
        dim = _index(names, name)
        if dim is not None and value.shape[dim] % count:
            return False
    return True


class _Move(NamedTuple):
    """A collective over one mesh axis.

    Attributes:
      kind, where: as in `layout.Move`.
      bit: the mesh axis.
      bytes: what a device has of the array.
      grows: whether it sends as many times more as the mesh axis has devices.
    """

    kind: str
    bit: int
    bytes: float
    where: str
    grows: bool


def _moves_of(
    here: int | None, there: int | None, bit: int, size: float, where: str
) -> list[_Move]:
    """List the move of an operand whose dim `here` is split, to a split of `there`."""
    if here is None or here == there:
        return []
    if there is None:
        return [_Move("all-gather", bit, size, where, True)]
    return [_Move("all-to-all", bit, size, where, False)]


def _result_moves(
    here: int | None, there: int | None, bit: int, size: float, where: str
) -> list[_Move]:
    """List the move of a result, of which a device is to have `size` bytes."""
    if here is None or here == there:
        return []
    kind = "all-gather" if there is None else "all-to-all"
    return [_Move(kind, bit, size, where, False)]


def _sum_of(there: int | None, bit: int, size: float, where: str) -> _Move:
    kind = "all-reduce" if there is None else "reduce-scatter"
    return _Move(kind, bit, size, where, there is not None)


def _grown(moves: list[_Move]) -> dict[str, int]:
    """Return the mesh axes over which each array is gathered or scattered."""
    grown: dict[str, int] = {}
    for move in moves:
        if move.grows:
            before = grown.get(move.where, 0)
            grown[move.where] = before | move.bit
    return grown


def _weight(layout: Any, move: _Move, grown: dict[str, int]) -> float:
    """Return the bytes that a move sends in addition, as `layout._weight` has them."""
    counts = layout.counts
    if move.kind == "all-reduce":
        return 2 * move.bytes
    if move.kind == "all-to-all":
        return move.bytes / counts[move.bit]
    if not move.grows:
        return move.bytes
    before = grown.get(move.where, 0)
    less = counts[before] if before else 0
    return move.bytes * (counts[before | move.bit] - less)


def _merged(layout: Any, moves: list[_Move]) -> Iterator[tuple[str, int, float, str]]:
    """Yield moves; those of one kind of one array are one, over all their axes."""
    merged: dict[tuple[str, str], _Move] = {}
    for move in moves:
        key = (move.kind, move.where)
        before = merged.get(key, move)
        axes = before.bit | move.bit
        merged[key] = before._replace(bit=axes)
    for kind, mask, size, where, grows in merged.values():
        factor = layout.counts[mask] if grows else 1
        yield kind, mask, size * factor, where


def _spec(names: Names, split: dict[str, int]) -> Spec:
    return tuple(split.get(name, 0) for name in names)


def _place(spec: Spec, bit: int) -> int | None:
    for dim, mask in enumerate(spec):
        if mask & bit:
            return dim
    return None


def _scattered(own: Spec, goal: Spec, sums: int) -> Spec:
    """Return the axes of a sum of which each dim's parts are wanted apart."""
    scattered = []
    for here, mask in zip(own, goal, strict=True):
        is_summed = not mask & ~sums
        scattered.append(mask if is_summed and not here else 0)
    return tuple(scattered)


def _union(masks: Any) -> int:
    union = 0
    for mask in masks:
        union |= mask
    return union


def _picked(mask: int, names: tuple[str, ...]) -> tuple[str, ...]:
    numbered = enumerate(names)
    return tuple(name for axis, name in numbered if mask >> axis & 1)

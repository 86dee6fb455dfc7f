"""Operations that treat the rows of an array each by itself.

The logits of a language model have a row for each token. A softmax, a comparison with
the labels or a cap treat each row alone, so a piece of the rows can be computed without
the others. Here is said, operation by operation, where the rows of a result are in its
operands, and how the operation is run on a piece of them:

    >>> import jax, jax.numpy as jnp
    >>> def widened(x):
    ...     return jnp.broadcast_to(x[:, None], (6, 5))
    >>> program = jax.make_jaxpr(widened)(jnp.ones(6))
    >>> [eqn.primitive.name for eqn in program.eqns]
    ['broadcast_in_dim', 'broadcast_in_dim']
    >>> needs(program.eqns[1], Rows(0, 1))
    [Rows(dim=0, minor=1)]
    >>> [piece] = on_piece(program.eqns[1], Rows(0, 1), [jnp.ones((2, 1))], pieces=3)
    >>> piece.shape
    (2, 5)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lepton_jax.planner.rewrite.program import (
    bind,
    shape_of_operand,
    shape_of_result,
)
from lepton_jax.planner.rewrite.units import ELEMENTWISE

# Functions of elements in addition to those that `units` knows.
MORE_ELEMENTWISE = {
    "asinh",
    "atan",
    "cbrt",
    "ceil",
    "clamp",
    "copy",
    "cos",
    "cosh",
    "digamma",
    "erf_inv",
    "erfc",
    "floor",
    "lgamma",
    "name",
    "nextafter",
    "reduce_precision",
    "rem",
    "round",
    "sin",
    "sinh",
    "tan",
    "xor",
}
REDUCTIONS = {
    "argmax",
    "argmin",
    "reduce_and",
    "reduce_max",
    "reduce_min",
    "reduce_or",
    "reduce_prod",
    "reduce_sum",
}


class Rows(NamedTuple):
    """The place of the rows in an array.

    Attributes:
      dim: the dim in which the rows lie, one after the other.
      minor: the number of elements of that dim that one row has: from (8, 6, 5) to (48,
        5), each of the 8 rows has 6 of the 48.
    """

    dim: int
    minor: int

    def at(self, dim: int) -> Rows:
        """Return the same rows in another dim."""
        return self._replace(dim=dim)


# The rows of each operand (None: it is taken whole), or None: rows meet each other.
Needs = list[Rows | None] | None


def needs(eqn: Any, rows: Rows) -> Needs:
    """Return which rows of its operands make rows of an equation's result.

    Args:
      eqn: an equation with one result.
      rows: the place of the rows in that.

    Returns:
      For each operand the place of its rows, or None where all of it is needed. None:
      each row needs other rows, or nothing is known of the operation.
    """
    rule = _RULES.get(eqn.primitive.name)
    if rule is None or len(eqn.outvars) != 1:
        return None
    return rule(eqn, rows)


def follow(eqn: Any, number: int, rows: Rows, count: int) -> Rows | None:
    """Return where the rows of an operand are in an equation's result.

    Args:
      eqn: the equation.
      number: of the operand.
      rows: the place of the rows in that.
      count: the number of rows.
    """
    if len(eqn.outvars) != 1:
        return None
    for dim, extent in enumerate(shape_of_result(eqn)):
        if extent and extent % count == 0:
            there = Rows(dim, extent // count)
            needed = needs(eqn, there)
            if needed is not None and needed[number] == rows:
                return there
    return None


def sums_rows(eqn: Any, rows: Rows) -> bool:
    """Whether an equation adds up all rows of its operand."""
    if eqn.primitive.name != "reduce_sum":
        return False
    return rows.dim in eqn.params["axes"]


def on_piece(
    eqn: Any,
    rows: Rows | None,
    operands: Sequence[Any],
    pieces: int,
) -> list[Any]:
    """Run an equation on one of several equal pieces of its rows.

    Args:
      eqn: the equation.
      rows: where they are in its result; None: it adds them up.
      operands: those that have rows, a piece of them.
      pieces: their number.
    """
    if rows is None:
        return bind(eqn, operands)
    name = eqn.primitive.name
    shape = list(shape_of_result(eqn))
    shape[rows.dim] //= pieces
    if name in ("broadcast_in_dim", "iota"):
        return bind(eqn, operands, shape=tuple(shape))
    if name == "reshape":
        return bind(eqn, operands, new_sizes=tuple(shape))
    if name == "gather":
        sizes = _slice_sizes(eqn, operands[0])
        return bind(eqn, operands, slice_sizes=sizes)
    return bind(eqn, operands)


def taken_apart(x: jax.Array, rows: Rows, pieces: int) -> jax.Array:
    """Return the pieces of an array's rows, along a new leading dim.

    Piece i has the rows i, i + pieces, i + 2 pieces, ...: where the rows are split over
    devices, each device has some rows of every piece.
    """
    dim, minor = rows
    major = x.shape[dim] // (pieces * minor)
    before = x.shape[:dim]
    after = x.shape[dim + 1 :]
    x = x.reshape(*before, major, pieces, minor, *after)
    x = jnp.moveaxis(x, dim + 1, 0)
    return x.reshape(pieces, *before, major * minor, *after)


def put_together(x: jax.Array, rows: Rows, pieces: int) -> jax.Array:
    """Return the array whose pieces `taken_apart` gives."""
    dim, minor = rows
    shape = x.shape[1:]
    major = shape[dim] // minor
    before = shape[:dim]
    after = shape[dim + 1 :]
    x = x.reshape(pieces, *before, major, minor, *after)
    x = jnp.moveaxis(x, 0, dim + 1)
    return x.reshape(*before, major * pieces * minor, *after)


# ---- internals ----


def _by_element(eqn: Any, rows: Rows) -> Needs:
    """Need the rows of what has them, and all of what is the same for each row."""
    shape = shape_of_result(eqn)
    needed: list[Rows | None] = []
    for operand in eqn.invars:
        own = operand.aval.shape
        if not own:
            needed.append(None)
            continue
        if len(own) != len(shape):
            return None

        if own[rows.dim] == 1:
            needed.append(None)
        elif own[rows.dim] == shape[rows.dim]:
            needed.append(rows)
        else:
            return None
    return needed


def _broadcast(eqn: Any, rows: Rows) -> Needs:
    places = tuple(eqn.params["broadcast_dimensions"])
    if rows.dim not in places:
        return [None]
    dim = places.index(rows.dim)
    before = shape_of_operand(eqn)
    after = shape_of_result(eqn)
    if before[dim] != after[rows.dim]:
        return [None]
    return [rows.at(dim)]


def _reshape(eqn: Any, rows: Rows) -> Needs:
    """Find the dim that has as many elements before it, and holds whole rows."""
    if eqn.params.get("dimensions") is not None:
        return None
    target = shape_of_result(eqn)
    source = shape_of_operand(eqn)
    count = target[rows.dim] // rows.minor
    before = math.prod(target[: rows.dim])
    for dim, extent in enumerate(source):
        if extent < 2 or extent % count:
            continue
        if math.prod(source[:dim]) == before:
            return [Rows(dim, extent // count)]
    return None


def _transpose(eqn: Any, rows: Rows) -> Needs:
    permutation = eqn.params["permutation"]
    return [rows.at(permutation[rows.dim])]


def _reduction(eqn: Any, rows: Rows) -> Needs:
    shape = shape_of_operand(eqn)
    kept = _others(shape, eqn.params["axes"])
    return [rows.at(kept[rows.dim])]


def _squeeze(eqn: Any, rows: Rows) -> Needs:
    shape = shape_of_operand(eqn)
    dims = eqn.params["dimensions"]
    kept = _others(shape, [dim % len(shape) for dim in dims])
    return [rows.at(kept[rows.dim])]


def _others(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    """Return the dims of a shape that are not among some."""
    return [dim for dim in range(len(shape)) if dim not in dims]


def _iota(eqn: Any, rows: Rows) -> Needs:
    if eqn.params["dimension"] == rows.dim:
        return None
    return []


def _dot(eqn: Any, rows: Rows) -> Needs:
    contracted, batched = eqn.params["dimension_numbers"]
    if rows.dim < len(batched[0]):
        return [rows.at(dims[rows.dim]) for dims in batched]

    place = rows.dim - len(batched[0])
    for side in (0, 1):
        shape = shape_of_operand(eqn, side)
        free = _others(shape, [*contracted[side], *batched[side]])
        if place < len(free):
            needed: list[Rows | None] = [None, None]
            needed[side] = rows.at(free[place])
            return needed
        place -= len(free)
    return None


def _gather(eqn: Any, rows: Rows) -> Needs:
    numbers = eqn.params["dimension_numbers"]
    if rows.dim in numbers.offset_dims:
        return _gather_of_slices(eqn, rows)

    others = _others(shape_of_result(eqn), numbers.offset_dims)
    place = others.index(rows.dim)
    batched = tuple(numbers.start_indices_batching_dims)
    if place not in batched:
        return [None, rows.at(place)]
    dim = numbers.operand_batching_dims[batched.index(place)]
    return [rows.at(dim), rows.at(place)]


def _gather_of_slices(eqn: Any, rows: Rows) -> Needs:
    """Need the rows of the operand: each index takes a slice with all of them."""
    numbers = eqn.params["dimension_numbers"]
    operand = shape_of_operand(eqn)
    gone = [*numbers.collapsed_slice_dims, *numbers.operand_batching_dims]
    sliced = _others(operand, gone)

    place = tuple(numbers.offset_dims).index(rows.dim)
    dim = sliced[place]
    sizes = eqn.params["slice_sizes"]
    if sizes[dim] != operand[dim]:
        return None
    return [rows.at(dim), None]


def _slice_sizes(eqn: Any, operand: Any) -> tuple[int, ...]:
    """Return a gather's slice sizes for a piece of its operand."""
    whole = shape_of_operand(eqn)
    sizes = list(eqn.params["slice_sizes"])
    for dim, extent in enumerate(operand.shape):
        if sizes[dim] == whole[dim]:
            sizes[dim] = extent
    return tuple(sizes)


_RULES: dict[str, Callable[[Any, Rows], Needs]] = {
    **dict.fromkeys(ELEMENTWISE | MORE_ELEMENTWISE, _by_element),
    **dict.fromkeys(REDUCTIONS, _reduction),
    "broadcast_in_dim": _broadcast,
    "dot_general": _dot,
    "gather": _gather,
    "iota": _iota,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
}

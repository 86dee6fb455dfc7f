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

from lepton_jax.planner.rewrite.program import bind
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
    for dim, extent in enumerate(eqn.outvars[0].aval.shape):
        if extent and extent % count == 0:
            there = Rows(dim, extent // count)
            needed = needs(eqn, there)
            if needed is not None and needed[number] == rows:
                return there
    return None


def sums_rows(eqn: Any, rows: Rows) -> bool:
    """Whether an equation adds up all rows of its operand."""
    return eqn.primitive.name == "reduce_sum" and rows.dim in eqn.params["axes"]


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
    shape = list(eqn.outvars[0].aval.shape)
    shape[rows.dim] //= pieces
    if name in ("broadcast_in_dim", "iota"):
        return bind(eqn, operands, shape=tuple(shape))
    if name == "reshape":
        return bind(eqn, operands, new_sizes=tuple(shape))
    if name == "gather":
        return bind(eqn, operands, slice_sizes=_slice_sizes(eqn, operands[0]))
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
    shape = eqn.outvars[0].aval.shape
    needed: list[Rows | None] = []
    for operand in eqn.invars:
        own = operand.aval.shape
        if not own or (len(own) == len(shape) and own[rows.dim] == 1):
            needed.append(None)
        elif len(own) == len(shape) and own[rows.dim] == shape[rows.dim]:
            needed.append(rows)
        else:
            return None
    return needed


def _broadcast(eqn: Any, rows: Rows) -> Needs:
    places = tuple(eqn.params["broadcast_dimensions"])
    if rows.dim not in places:
        return [None]
    dim = places.index(rows.dim)
    operand = eqn.invars[0].aval.shape
    is_whole = operand[dim] == eqn.outvars[0].aval.shape[rows.dim]
    return [Rows(dim, rows.minor) if is_whole else None]


def _reshape(eqn: Any, rows: Rows) -> Needs:
    """Find the dim that has as many elements before it, and holds whole rows."""
    if eqn.params.get("dimensions") is not None:
        return None
    target = eqn.outvars[0].aval.shape
    source = eqn.invars[0].aval.shape
    count = target[rows.dim] // rows.minor
    before = math.prod(target[: rows.dim])
    for dim, extent in enumerate(source):
        if math.prod(source[:dim]) == before and extent > 1 and extent % count == 0:
            return [Rows(dim, extent // count)]
    return None


def _transpose(eqn: Any, rows: Rows) -> Needs:
    return [Rows(eqn.params["permutation"][rows.dim], rows.minor)]


def _reduction(eqn: Any, rows: Rows) -> Needs:
    rank = len(eqn.invars[0].aval.shape)
    kept = [dim for dim in range(rank) if dim not in eqn.params["axes"]]
    return [Rows(kept[rows.dim], rows.minor)]


def _squeeze(eqn: Any, rows: Rows) -> Needs:
    rank = len(eqn.invars[0].aval.shape)
    gone = {dim % rank for dim in eqn.params["dimensions"]}
    kept = [dim for dim in range(rank) if dim not in gone]
    return [Rows(kept[rows.dim], rows.minor)]


def _iota(eqn: Any, rows: Rows) -> Needs:
    return None if eqn.params["dimension"] == rows.dim else []


def _dot(eqn: Any, rows: Rows) -> Needs:
    contracted, batched = eqn.params["dimension_numbers"]
    if rows.dim < len(batched[0]):
        left = Rows(batched[0][rows.dim], rows.minor)
        return [left, Rows(batched[1][rows.dim], rows.minor)]

    place = rows.dim - len(batched[0])
    for side in (0, 1):
        rank = len(eqn.invars[side].aval.shape)
        used = (*contracted[side], *batched[side])
        free = [dim for dim in range(rank) if dim not in used]
        if place < len(free):
            needed: list[Rows | None] = [None, None]
            needed[side] = Rows(free[place], rows.minor)
            return needed
        place -= len(free)
    return None


def _gather(eqn: Any, rows: Rows) -> Needs:
    numbers = eqn.params["dimension_numbers"]
    rank = len(eqn.outvars[0].aval.shape)
    if rows.dim in numbers.offset_dims:  # each index takes a slice with all rows
        operand = eqn.invars[0].aval.shape
        gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
        sliced = [dim for dim in range(len(operand)) if dim not in gone]
        dim = sliced[tuple(numbers.offset_dims).index(rows.dim)]
        is_whole = eqn.params["slice_sizes"][dim] == operand[dim]
        return [Rows(dim, rows.minor), None] if is_whole else None

    others = [dim for dim in range(rank) if dim not in numbers.offset_dims]
    place = others.index(rows.dim)
    indices = Rows(place, rows.minor)
    if place not in numbers.start_indices_batching_dims:
        return [None, indices]
    number = tuple(numbers.start_indices_batching_dims).index(place)
    return [Rows(numbers.operand_batching_dims[number], rows.minor), indices]


def _slice_sizes(eqn: Any, operand: Any) -> tuple[int, ...]:
    """Return a gather's slice sizes for a piece of its operand."""
    whole = eqn.invars[0].aval.shape
    sizes = eqn.params["slice_sizes"]
    triples = zip(sizes, whole, operand.shape, strict=True)
    return tuple(own if size == extent else size for size, extent, own in triples)


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

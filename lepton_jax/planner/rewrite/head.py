"""The loss of a language model without its logits.

The logits of 65,536 tokens over 128,256 words take 34 GB in float32, and nothing needs
them all at once: a token's loss needs the logits of this token. Here the product that
makes them is run on a piece of the tokens, with all that uses them: softmax, loss,
metrics. The loop over the pieces returns the sums, and what it knows of each token.

    >>> import jax, jax.numpy as jnp, optax
    >>> def loss(params, x, labels):
    ...     logits = x @ params
    ...     each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    ...     hits = (logits.argmax(-1) == labels).sum()
    ...     return each.mean(), hits
    >>> args = jnp.ones((4, 50)), jnp.ones((6, 4)), jnp.arange(6)
    >>> shorter = in_pieces(loss, pieces=3)
    >>> float(loss(*args)[0]), float(shorter(*args)[0])
    (3.912..., 3.912...)
    >>> logits = "f32[6,50]"
    >>> logits in str(jax.make_jaxpr(loss)(*args))
    True
    >>> logits in str(jax.make_jaxpr(jax.grad(shorter, has_aux=True))(*args))
    False

What is differentiated is one sum over the tokens, as a rule. Its gradient is taken in
the forward pass, piece by piece, while the piece's logits are there; the backward pass
multiplies it by a number. So no product is computed twice. (Cf. Hsu et al. 2024, "Liger
Kernel", arXiv 2410.10989, section 3.2, which does so for a mean.) Where the gradient
needs more than one number, or in float16, whose small gradients need the loss scale,
the logits of a piece are computed again in the backward pass.

Any loss will do that treats each token by itself, so will metrics. Where something
needs the logits of several tokens, or all of them, the program stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, add_any, at_source
from lepton_jax.planner.rewrite.program import (
    Env,
    Uses,
    opened,
    operands_of,
    read,
    run,
    run_equations,
)
from lepton_jax.planner.rewrite.rows import (
    Rows,
    follow,
    needs,
    on_piece,
    put_together,
    sums_rows,
    taken_apart,
)
from lepton_jax.trees import with_leaves

# Products that are looked at, the largest first. Assumption: where a hidden layer is
# wider than the vocabulary, so are its two or three products.
MOST_HEADS = 8

# A result of at least this share of the logits' elements would spare too little.
# Assumption.
LARGE = 1 / 8


def in_pieces(function: Callable, pieces: int) -> Callable:
    """Return a loss that computes its largest logits piece by piece.

    Args:
      function: of arrays in pytrees, the first of which are parameters, to (value,
        auxiliary results); the value alone is differentiated, by the parameters.
      pieces: into which the tokens are divided, about.

    Returns:
      A function of the same values and gradients, but for rounding. Where some
      operation needs the logits of several tokens, it is the same function.
    """
    if pieces < 2:
        return function

    def shorter(*args: Any) -> Any:
        program, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        program = opened(program)
        leaves = jax.tree.leaves(args)
        found = find(program.jaxpr, len(jax.tree.leaves(args[0])), pieces)
        results = (
            run(program, leaves) if found is None else _run(program, leaves, found)
        )
        return with_leaves(shapes, results)

    return shorter


def logits_shape(program: ClosedJaxpr) -> tuple[int, ...]:
    """Return the shape of the largest logits that can be computed in pieces.

    Args:
      program: a loss, as in `in_pieces`.

    Returns:
      The dims of the tokens, and the vocabulary last; (): there are no such logits.
    """
    program = opened(program)
    found = find(program.jaxpr, len(program.jaxpr.invars), pieces=2)
    return () if found is None else tuple(found.head.outvars[0].aval.shape)


@dataclass
class Region:
    """The part of a program that is run in pieces.

    Attributes:
      head: the product that makes the logits.
      rows: how many there are.
      pieces: into which they are divided.
      made: variable to the place of its rows, for those that the part makes.
      taken: the same for those that it takes, from outside.
      whole: variables that it takes as they are, as keys.
      sums: sums over all rows that it makes, as keys.
      pulled: variables that it makes for itself, though they don't need the logits.
      numbers: of its equations in the program.
      later: variables that need results of it, and are made outside.
      stacked: variables with rows that are needed outside.
      twice: numbers of equations that are run outside, too.
      moving: variables of real numbers that depend on the parameters.
      steering: results that the value depends on.
    """

    head: Any
    rows: int
    pieces: int
    made: dict[Any, Rows] = field(default_factory=dict)
    taken: dict[Any, Rows] = field(default_factory=dict)
    whole: dict[Any, None] = field(default_factory=dict)
    sums: dict[Any, None] = field(default_factory=dict)
    pulled: set[Any] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)
    later: set[Any] = field(default_factory=set)

    stacked: list[Any] = field(default_factory=list)
    twice: set[int] = field(default_factory=set)
    moving: set[Any] = field(default_factory=set)
    steering: list[Any] = field(default_factory=list)


def find(jaxpr: Jaxpr, parameters: int, pieces: int) -> Region | None:
    """Find the part of a loss that its largest logits make necessary.

    Args:
      jaxpr: the loss, its calls opened; the first result is differentiated.
      parameters: the number of inputs by which it is differentiated.
      pieces: how many there should be, about.
    """
    moving = _moving(jaxpr, parameters)
    heads: list[Any] = [eqn for eqn in reversed(jaxpr.eqns) if _is_head(eqn)]
    heads.sort(key=lambda eqn: -eqn.outvars[0].aval.size)
    for head in heads[:MOST_HEADS]:
        # the last dim of the tokens first: their position in a sample, not the sample
        for dim in reversed(range(len(head.outvars[0].aval.shape) - 1)):
            count = head.outvars[0].aval.shape[dim]
            divisor = _divisor(count, pieces)
            if divisor is None:
                continue
            region = Region(head, count, divisor, moving=moving)
            if _Growth(jaxpr, region, dim).succeeds():
                region.steering = _steering_results(jaxpr, region)
                return region
    return None


# ---- internals: finding it ----


def _is_head(eqn: Any) -> bool:
    """Whether an equation is a product that makes wide rows from narrow ones."""
    if eqn.primitive.name != "dot_general":
        return False
    (contracted, _), batched = eqn.params["dimension_numbers"]
    out = eqn.outvars[0].aval
    if (
        any(batched)
        or len(out.shape) < 2
        or not jnp.issubdtype(out.dtype, jnp.floating)
    ):
        return False
    left, right = (operand.aval for operand in eqn.invars)
    narrow = math.prod(left.shape[dim] for dim in contracted)
    free = len(right.shape) - len(contracted)
    return free == 1 and out.shape[-1] > narrow


def _divisor(count: int, wanted: int) -> int | None:
    """Return the divisor of a count that is nearest to a wanted one, within 2 times."""
    least = max(2, -(-wanted // 2))
    near = [n for n in range(least, 2 * wanted + 1) if count % n == 0]
    if not near:
        return None
    return min(near, key=lambda n: (abs(math.log(n / wanted)), n))


class _Growth:
    """Grows a region from a product, along the dim of its rows."""

    def __init__(self, jaxpr: Jaxpr, region: Region, dim: int):
        self.jaxpr = jaxpr
        self.found = region
        self.uses = Uses(jaxpr)
        self.place = {id(eqn): number for number, eqn in enumerate(jaxpr.eqns)}
        self.size = region.head.outvars[0].aval.size
        self.dim = dim

    def succeeds(self) -> bool:
        """Grow the region; False: something needs the logits of several rows.

        Nor does it succeed if another layer follows: then this was no head.
        """
        found = self.found
        head = found.head
        if not self._take_in(head, Rows(self.dim, 1)):
            return False
        for eqn in self.jaxpr.eqns[self.place[id(head)] + 1 :]:
            if not self._joins(eqn):
                found.later.update(self._late(eqn))
        self._look_outside()
        large = LARGE * self.size
        if any(variable.aval.size >= large for variable in found.stacked):
            return False
        return bool(found.sums or found.stacked) and not self._has_layers()

    def _has_layers(self) -> bool:
        """Whether there are products with parameters in addition to the head."""
        found = self.found
        for number in found.numbers:
            eqn = self.jaxpr.eqns[number]
            if eqn.primitive.name != "dot_general" or eqn is found.head:
                continue
            outside = (v for v in eqn.invars if v not in found.made)
            if any(v in found.moving for v in outside):
                return True
        return False

    def _joins(self, eqn: Any) -> bool:
        """Take in an equation that uses a value of the region, if that can be."""
        found = self.found
        variables = [v for v in eqn.invars if not isinstance(v, Literal)]
        inside = [v for v in variables if v in found.made]
        late = any(v in found.later or v in found.sums for v in variables)
        if not inside or late or eqn.effects or len(eqn.outvars) != 1:
            return False
        first = inside[0]
        rows = found.made[first]
        if sums_rows(eqn, rows):
            found.sums[eqn.outvars[0]] = None
            found.numbers.add(self.place[id(eqn)])
            return True
        number = next(n for n, v in enumerate(eqn.invars) if v is first)
        there = follow(eqn, number, rows, found.rows)
        return there is not None and self._take_in(eqn, there)

    def _late(self, eqn: Any) -> list[Any]:
        """Return the results of an equation outside if they need the region's."""
        found = self.found
        for variable in eqn.invars:
            if isinstance(variable, Literal):
                continue
            if variable in found.later or variable in found.sums:
                return eqn.outvars
            if variable in found.made and variable not in found.pulled:
                return eqn.outvars
        return []

    def _take_in(self, eqn: Any, rows: Rows) -> bool:
        """Take in an equation and what its operands need, or change nothing."""
        wanted = needs(eqn, rows)
        if wanted is None:
            return False
        found = self.found
        for operand, own in zip(eqn.invars, wanted, strict=True):
            if not self._can_have(operand, own):
                return False
        found.made[eqn.outvars[0]] = rows
        found.numbers.add(self.place[id(eqn)])
        for operand, own in zip(eqn.invars, wanted, strict=True):
            if not isinstance(operand, Literal) and operand not in found.made:
                self._bring(operand, own)
        return True

    def _can_have(self, operand: Any, rows: Rows | None) -> bool:
        """Whether the region can have an operand's rows there (None: all of it)."""
        found = self.found
        if isinstance(operand, Literal):
            return rows is None
        if operand in found.later or operand in found.sums:
            return False
        if rows is not None and operand in found.whole:
            return False
        known = found.taken | found.made
        return known.get(operand, rows) == rows

    def _bring(self, operand: Any, rows: Rows | None) -> None:
        """Let the region take a value, or make it if it is as large as the logits."""
        found = self.found
        if rows is None:
            found.whole[operand] = None
            return
        maker = self.uses.maker.get(operand)
        is_free = maker is not None and not maker.effects
        is_large = operand.aval.size >= self.size
        if is_large and is_free and self._take_in(maker, rows):
            found.pulled.add(operand)
        else:
            found.taken[operand] = rows

    def _look_outside(self) -> None:
        """Note what is needed outside of the region: results, and what it pulled in."""
        found = self.found
        needed = {v for v in self.jaxpr.outvars if not isinstance(v, Literal)}
        for number in reversed(range(len(self.jaxpr.eqns))):
            eqn = self.jaxpr.eqns[number]
            if number in found.numbers:
                variable = eqn.outvars[0]
                if variable not in found.pulled or variable not in needed:
                    continue
                found.twice.add(number)
            needed.update(v for v in eqn.invars if not isinstance(v, Literal))
        found.stacked = [v for v in found.made if v in needed - found.pulled]


def _moving(jaxpr: Jaxpr, parameters: int) -> set[Any]:
    """List the variables of real numbers that depend on the parameters."""
    moving = set(jaxpr.invars[:parameters])
    for eqn in jaxpr.eqns:
        if any(v in moving for v in eqn.invars if not isinstance(v, Literal)):
            moving.update(eqn.outvars)
    return {v for v in moving if _is_real(v)}


def _steering_results(jaxpr: Jaxpr, region: Region) -> list[Any]:
    """List the results of a region on which the value depends."""
    value = jaxpr.outvars[0]
    steering = set() if isinstance(value, Literal) else {value}
    for number in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[number]
        if number in region.numbers or eqn.primitive.name == "stop_gradient":
            continue
        if any(variable in steering for variable in eqn.outvars):
            steering.update(v for v in eqn.invars if not isinstance(v, Literal))
    results = [*region.stacked, *region.sums]
    return [v for v in results if v in steering and v in region.moving]


def _is_real(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


# ---- internals: running it ----


def _run(program: ClosedJaxpr, leaves: Sequence[Any], region: Region) -> list[Any]:
    """Run a program with a part of it in pieces."""
    jaxpr = program.jaxpr
    env: Env = dict(zip(jaxpr.constvars, program.consts, strict=True))
    env.update(zip(jaxpr.invars, leaves, strict=True))
    before = []
    after = []
    for number, eqn in enumerate(jaxpr.eqns):
        is_late = any(variable in region.later for variable in eqn.outvars)
        if is_late or (eqn.effects and _uses_any(eqn, region)):
            after.append(eqn)
        elif number not in region.numbers or number in region.twice:
            before.append(eqn)
    run_equations(before, env)
    with at_source(region.head, ()):
        env.update(_pieces_of(jaxpr, region, env))
    run_equations(after, env)
    return [read(env, variable) for variable in jaxpr.outvars]


def _uses_any(eqn: Any, region: Region) -> bool:
    results = {*region.stacked, *region.sums}
    return any(v in results for v in eqn.invars if not isinstance(v, Literal))


def _pieces_of(jaxpr: Jaxpr, region: Region, env: Env) -> Env:
    """Return the results of a region."""
    taken = list(region.taken)
    whole = list(region.whole)
    eqns = [jaxpr.eqns[number] for number in sorted(region.numbers)]
    moving = [
        [v for v in taken if v in region.moving],
        [v for v in whole if v in region.moving],
    ]
    still = [
        [v for v in taken if v not in region.moving],
        [v for v in whole if v not in region.moving],
    ]
    piece = partial(_piece, eqns, region, (moving, still))

    apart = {
        v: taken_apart(env[v], rows, region.pieces) for v, rows in region.taken.items()
    }

    def values(lists: list[list[Any]]) -> tuple[list[Any], list[Any]]:
        return [apart[v] for v in lists[0]], [env[v] for v in lists[1]]

    steering = _steering(region)
    stacked, sums = _looped(piece, steering, values(moving), values(still))
    results: Env = dict(zip(region.sums, sums, strict=True))
    for variable, x in zip(region.stacked, stacked, strict=True):
        results[variable] = put_together(x, region.made[variable], region.pieces)
    return results


def _steering(region: Region) -> int | None:
    """Return the number of the sum that alone steers the gradient; None: several do."""
    if len(region.steering) != 1 or region.steering[0] not in region.sums:
        return None
    variables = [*region.made, *region.sums]
    if any(v.aval.dtype == jnp.float16 for v in variables):
        return None
    steers = region.steering[0]
    return list(region.sums).index(steers) if steers.aval.shape == () else None


def _piece(
    eqns: Sequence[Any],
    region: Region,
    names: tuple[list[list[Any]], list[list[Any]]],
    moving: tuple[list[Any], list[Any]],
    still: tuple[list[Any], list[Any]],
) -> tuple[list[Any], list[Any]]:
    """Run a region on one piece of the rows.

    Args:
      eqns: of the region.
      region: the region.
      names: variables of `moving` and of `still`.
      moving: a piece of what it takes, and what it takes whole, that moves with the
        parameters.
      still: the same of what does not.

    Returns:
      The pieces of the values that are stacked, and the sums over the rows.
    """
    env: Env = {}
    for variables, values in zip(names, (moving, still), strict=True):
        for own, arrays in zip(variables, values, strict=True):
            env.update(zip(own, arrays, strict=True))
    for eqn in eqns:
        variable = eqn.outvars[0]
        operands = operands_of(eqn, env)
        with at_source(eqn, ()):
            results = on_piece(eqn, region.made.get(variable), operands, region.pieces)
        env[variable] = results[0]
    return [env[v] for v in region.stacked], [env[v] for v in region.sums]


# ---- internals: the loop and its gradient ----


def _looped(piece: Callable, steering: int | None, moving: Any, still: Any) -> Any:
    """Run a function on all pieces, and give it a gradient that needs no logits.

    Args:
      piece: (moving, still) to (arrays to stack, arrays to add up).
      steering: as in `_steering`.
      moving: (arrays with pieces along the leading dim, whole arrays) to differentiate.
      still: the same, not to differentiate.
    """
    dtypes = jax.tree.map(lambda x: x.dtype, moving)

    @jax.custom_vjp
    def looped(moving: Any, still: Any) -> Any:
        return _forward(piece, moving, still)

    def forward(moving: Any, still: Any) -> Any:
        if steering is None:
            return looped(moving, still), (moving, still)
        return _with_gradient(piece, steering, moving, still)

    def backward(kept: Any, cotangents: Any) -> Any:
        if steering is not None:
            scaled = partial(_scaled, cotangents[1][steering])
            return jax.tree.map(scaled, kept, dtypes), None
        own, others = kept
        return _again(piece, own, others, cotangents), None

    looped.defvjp(forward, backward)
    return looped(moving, still)


def _forward(piece: Callable, moving: Any, still: Any) -> Any:
    def body(sums: Any, slices: Any) -> Any:
        stacked, more = piece((slices[0], moving[1]), (slices[1], still[1]))
        return _added(sums, more), stacked

    shapes = _sums(piece, moving, still)
    sums, stacked = lax.scan(body, _zeros(shapes), (moving[0], still[0]))
    return stacked, jax.tree.map(_cast, sums, shapes)


def _with_gradient(piece: Callable, steering: int, moving: Any, still: Any) -> Any:
    """Run all pieces, and add up the gradient of one of the sums."""

    def body(carry: Any, slices: Any) -> Any:
        def steered(own: Any, whole: Any) -> Any:
            results = piece((own, whole), (slices[1], still[1]))
            return results[1][steering], results

        gradient = jax.grad(steered, (0, 1), has_aux=True)
        (own, whole), (stacked, more) = gradient(slices[0], moving[1])
        sums, total = carry
        return (_added(sums, more), _added(total, whole)), (stacked, own)

    shapes = _sums(piece, moving, still)
    first = (_zeros(shapes), _zeros(moving[1]))
    last, (stacked, own) = lax.scan(body, first, (moving[0], still[0]))
    sums, total = last
    return (stacked, jax.tree.map(_cast, sums, shapes)), (own, total)


def _again(piece: Callable, moving: Any, still: Any, cotangents: Any) -> Any:
    """Return the gradient by all results of the loop, each piece computed again."""
    of_stacked, of_sums = cotangents

    def body(total: Any, slices: Any) -> Any:
        own, others, given = slices

        def run_piece(own: Any, whole: Any) -> Any:
            return piece((own, whole), (others, still[1]))

        _, pull = jax.vjp(run_piece, own, moving[1])
        gradient, whole = pull((given, of_sums))
        return _added(total, whole), gradient

    first = _zeros(moving[1])
    slices = (moving[0], still[0], of_stacked)
    total, own = lax.scan(body, first, slices)
    return own, jax.tree.map(_cast, total, moving[1])


def _sums(piece: Callable, moving: Any, still: Any) -> Any:
    """Return the shapes of the sums that a piece returns."""

    def run_first(moving: Any, still: Any) -> Any:
        own, others = jax.tree.map(lambda x: x[0], (moving[0], still[0]))
        return piece((own, moving[1]), (others, still[1]))[1]

    return jax.eval_shape(run_first, moving, still)


def _cast(x: jax.Array, like: Any) -> jax.Array:
    return x.astype(like.dtype)


def _zeros(shapes: Any) -> Any:
    """Return zeros to add up arrays of some shapes: at least in float32."""

    def zero(x: Any) -> jax.Array:
        return jnp.zeros(x.shape, _wide(x.dtype))

    return jax.tree.map(zero, shapes)


def _wide(dtype: Any) -> Any:
    is_narrow = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4
    return jnp.float32 if is_narrow else dtype


def _added(total: Any, more: Any) -> Any:
    return jax.tree.map(lambda x, y: add_any(x, y.astype(x.dtype)), total, more)


def _scaled(factor: Any, gradient: jax.Array, dtype: Any) -> jax.Array:
    wide = gradient.astype(_wide(gradient.dtype))
    return (wide * factor.astype(wide.dtype)).astype(dtype)

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
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lepton_jax.compat import ClosedJaxpr, Jaxpr, Literal, add_any, at_source
from lepton_jax.planner.rewrite.program import (
    Env,
    Uses,
    inputs_of,
    opened,
    operands_of,
    read_all,
    run,
    run_equations,
    shape_of_operand,
    shape_of_result,
    trace,
    variables_of,
    write,
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
        program, shapes = trace(function, *args)
        leaves = jax.tree.leaves(args)
        parameters = jax.tree.leaves(args[0])
        found = find(program.jaxpr, len(parameters), pieces)

        if found is None:
            results = run(program, leaves)
        else:
            results = _run(program, leaves, found)
        return with_leaves(shapes, results)

    return shorter


def logits_shape(program: ClosedJaxpr) -> tuple[int, ...]:
    """Return the shape of the largest logits that can be computed in pieces.

    Args:
      program: a loss, as in `in_pieces`.

    Returns:
      The dims of the tokens, and the vocabulary last; (): there are no such logits.
    """
    jaxpr = opened(program).jaxpr
    found = find(jaxpr, len(jaxpr.invars), pieces=2)
    if found is None:
        return ()
    return tuple(shape_of_result(found.head))


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
    for head in _heads(jaxpr):
        tokens = range(len(shape_of_result(head)) - 1)
        # the last dim of the tokens first: their position in a sample, not the sample
        for dim in reversed(tokens):
            count = shape_of_result(head)[dim]
            divisor = _divisor(count, pieces)
            if divisor is None:
                continue
            region = Region(head, count, divisor, moving=moving)
            if _Growth(jaxpr, region, dim).succeeds():
                region.steering = _steering_results(jaxpr, region)
                return region
    return None


# ---- internals: finding it ----


def _heads(jaxpr: Jaxpr) -> list[Any]:
    """Return the products to look at: the largest first, of equal ones the last."""

    def size(eqn: Any) -> int:
        return eqn.outvars[0].aval.size

    heads = [eqn for eqn in reversed(jaxpr.eqns) if _is_head(eqn)]
    heads.sort(key=size, reverse=True)
    return heads[:MOST_HEADS]


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
    rows = shape_of_operand(eqn, 0)
    kernel = shape_of_operand(eqn, 1)
    narrow = math.prod(rows[dim] for dim in contracted)
    free = len(kernel) - len(contracted)
    return free == 1 and out.shape[-1] > narrow


def _divisor(count: int, wanted: int) -> int | None:
    """Return the divisor of a count that is nearest to a wanted one, within 2 times."""

    def distance(divisor: int) -> tuple[float, int]:
        return abs(math.log(divisor / wanted)), divisor

    least = max(2, -(-wanted // 2))
    most = 2 * wanted
    near = [n for n in range(least, most + 1) if count % n == 0]
    return min(near, key=distance, default=None)


class _Growth:
    """Grows a region from a product, along the dim of its rows."""

    def __init__(self, jaxpr: Jaxpr, region: Region, dim: int):
        self.jaxpr = jaxpr
        self.found = region
        self.uses = Uses(jaxpr)
        self.size = region.head.outvars[0].aval.size
        self.dim = dim
        self._numbers: dict[int, int] = {}
        for number, eqn in enumerate(jaxpr.eqns):
            self._numbers[id(eqn)] = number

    def number(self, eqn: Any) -> int:
        """Return the place of an equation in the program."""
        return self._numbers[id(eqn)]

    def succeeds(self) -> bool:
        """Grow the region; False: something needs the logits of several rows.

        Nor does it succeed if another layer follows: then this was no head.
        """
        found = self.found
        rows = Rows(self.dim, 1)
        if not self._take_in(found.head, rows):
            return False
        after = self.number(found.head) + 1
        for eqn in self.jaxpr.eqns[after:]:
            if not self._joins(eqn):
                found.later.update(self._late(eqn))
        self._look_outside()

        if not found.sums and not found.stacked:
            return False
        sizes = [variable.aval.size for variable in found.stacked]
        if max(sizes, default=0) >= LARGE * self.size:
            return False
        return not self._has_layers()

    def _has_layers(self) -> bool:
        """Whether there are products with parameters in addition to the head."""
        found = self.found
        for number in found.numbers:
            eqn = self.jaxpr.eqns[number]
            is_product = eqn.primitive.name == "dot_general"
            if eqn is found.head or not is_product:
                continue
            outside = set(variables_of(eqn.invars)).difference(found.made)
            if not found.moving.isdisjoint(outside):
                return True
        return False

    def _joins(self, eqn: Any) -> bool:
        """Take in an equation that uses a value of the region, if that can be."""
        found = self.found
        variables = variables_of(eqn.invars)
        inside = [v for v in variables if v in found.made]
        if not inside or eqn.effects or len(eqn.outvars) != 1:
            return False
        if any(self._is_late(v) for v in variables):
            return False

        first = inside[0]
        rows = found.made[first]
        if sums_rows(eqn, rows):
            found.sums[eqn.outvars[0]] = None
            found.numbers.add(self.number(eqn))
            return True
        places = [number for number, v in enumerate(eqn.invars) if v is first]
        there = follow(eqn, places[0], rows, found.rows)
        return there is not None and self._take_in(eqn, there)

    def _is_late(self, variable: Any) -> bool:
        """Whether a variable is there only after all pieces have run."""
        return variable in self.found.later or variable in self.found.sums

    def _late(self, eqn: Any) -> list[Any]:
        """Return the results of an equation outside if they need the region's."""
        found = self.found
        for variable in variables_of(eqn.invars):
            if self._is_late(variable):
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
        pairs = list(zip(eqn.invars, wanted, strict=True))
        for operand, own in pairs:
            if not self._can_have(operand, own):
                return False

        found.made[eqn.outvars[0]] = rows
        found.numbers.add(self.number(eqn))
        for operand, own in pairs:
            if isinstance(operand, Literal) or operand in found.made:
                continue
            self._bring(operand, own)
        return True

    def _can_have(self, operand: Any, rows: Rows | None) -> bool:
        """Whether the region can have an operand's rows there (None: all of it)."""
        found = self.found
        if isinstance(operand, Literal):
            return rows is None
        if self._is_late(operand):
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
        needed = set(variables_of(self.jaxpr.outvars))
        for eqn in reversed(self.jaxpr.eqns):
            number = self.number(eqn)
            if number in found.numbers:
                variable = eqn.outvars[0]
                if variable not in found.pulled or variable not in needed:
                    continue
                found.twice.add(number)
            needed.update(variables_of(eqn.invars))
        needed -= found.pulled
        found.stacked = [v for v in found.made if v in needed]


def _moving(jaxpr: Jaxpr, parameters: int) -> set[Any]:
    """List the variables of real numbers that depend on the parameters."""
    moving = set(jaxpr.invars[:parameters])
    for eqn in jaxpr.eqns:
        if not moving.isdisjoint(variables_of(eqn.invars)):
            moving.update(eqn.outvars)
    return {v for v in moving if _is_real(v)}


def _steering_results(jaxpr: Jaxpr, region: Region) -> list[Any]:
    """List the results of a region on which the value depends."""
    value = jaxpr.outvars[0]
    steering = set(variables_of([value]))
    numbered = list(enumerate(jaxpr.eqns))
    for number, eqn in reversed(numbered):
        is_stopped = eqn.primitive.name == "stop_gradient"
        if is_stopped or number in region.numbers:
            continue
        if not steering.isdisjoint(eqn.outvars):
            steering.update(variables_of(eqn.invars))
    steering &= region.moving
    results = [*region.stacked, *region.sums]
    return [v for v in results if v in steering]


def _is_real(variable: Any) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    if dtype is None:
        return False
    return jnp.issubdtype(dtype, jnp.floating)


# ---- internals: running it ----


def _run(program: ClosedJaxpr, leaves: Sequence[Any], region: Region) -> list[Any]:
    """Run a program with a part of it in pieces."""
    jaxpr = program.jaxpr
    env = inputs_of(program, leaves)
    before = []
    after = []
    for number, eqn in enumerate(jaxpr.eqns):
        is_late = not region.later.isdisjoint(eqn.outvars)
        has_effects = eqn.effects and _uses_any(eqn, region)
        if is_late or has_effects:
            after.append(eqn)
        elif number not in region.numbers or number in region.twice:
            before.append(eqn)
    run_equations(before, env)
    with at_source(region.head, ()):
        env.update(_pieces_of(jaxpr, region, env))
    run_equations(after, env)
    return read_all(env, jaxpr.outvars)


def _uses_any(eqn: Any, region: Region) -> bool:
    results = {*region.stacked, *region.sums}
    return not results.isdisjoint(variables_of(eqn.invars))


class _Taken(NamedTuple):
    """Variables that a region takes, or their arrays: in pieces, and whole."""

    pieces: list[Any]
    whole: list[Any]


def _taken(region: Region, moving: bool) -> _Taken:
    """List what a region takes that moves with the parameters, or all the rest."""

    def chosen(variables: Iterable[Any]) -> list[Any]:
        return [v for v in variables if (v in region.moving) == moving]

    return _Taken(chosen(region.taken), chosen(region.whole))


def _pieces_of(jaxpr: Jaxpr, region: Region, env: Env) -> Env:
    """Return the results of a region."""
    eqns = [jaxpr.eqns[number] for number in sorted(region.numbers)]
    moving = _taken(region, moving=True)
    still = _taken(region, moving=False)
    piece = partial(_piece, eqns, region, (moving, still))

    apart: Env = {}
    for variable, rows in region.taken.items():
        apart[variable] = taken_apart(env[variable], rows, region.pieces)

    def arrays(taken: _Taken) -> _Taken:
        pieces = read_all(apart, taken.pieces)
        return _Taken(pieces, read_all(env, taken.whole))

    steering = _steering(region)
    stacked, sums = _looped(piece, steering, arrays(moving), arrays(still))
    results: Env = {}
    write(results, region.sums, sums)
    for variable, x in zip(region.stacked, stacked, strict=True):
        rows = region.made[variable]
        results[variable] = put_together(x, rows, region.pieces)
    return results


def _steering(region: Region) -> int | None:
    """Return the number of the sum that alone steers the gradient; None: several do."""
    if len(region.steering) != 1:
        return None
    [steers] = region.steering
    if steers not in region.sums or steers.aval.shape != ():
        return None
    variables = [*region.made, *region.sums]
    if any(v.aval.dtype == jnp.float16 for v in variables):
        return None
    return list(region.sums).index(steers)


def _piece(
    eqns: Sequence[Any],
    region: Region,
    names: tuple[_Taken, _Taken],
    moving: _Taken,
    still: _Taken,
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
    for variables, arrays in zip(names, (moving, still), strict=True):
        write(env, variables.pieces, arrays.pieces)
        write(env, variables.whole, arrays.whole)

    for eqn in eqns:
        variable = eqn.outvars[0]
        rows = region.made.get(variable)
        operands = operands_of(eqn, env)
        with at_source(eqn, ()):
            [env[variable]] = on_piece(eqn, rows, operands, region.pieces)
    stacked = read_all(env, region.stacked)
    return stacked, read_all(env, region.sums)


# ---- internals: the loop and its gradient ----


def _looped(
    piece: Callable, steering: int | None, moving: _Taken, still: _Taken
) -> Any:
    """Run a function on all pieces, and give it a gradient that needs no logits.

    Args:
      piece: (moving, still) to (arrays to stack, arrays to add up).
      steering: as in `_steering`.
      moving: arrays to differentiate, those in pieces with a leading dim for these.
      still: the same, not to differentiate.
    """
    dtypes = jax.tree.map(_dtype, moving)

    @jax.custom_vjp
    def looped(moving: _Taken, still: _Taken) -> Any:
        return _forward(piece, moving, still)

    def forward(moving: _Taken, still: _Taken) -> Any:
        if steering is None:
            return looped(moving, still), (moving, still)
        return _with_gradient(piece, steering, moving, still)

    def backward(kept: Any, cotangents: Any) -> Any:
        if steering is not None:
            _, of_sums = cotangents
            scaled = partial(_scaled, of_sums[steering])
            return jax.tree.map(scaled, kept, dtypes), None
        own, others = kept
        return _again(piece, own, others, cotangents), None

    looped.defvjp(forward, backward)
    return looped(moving, still)


def _forward(piece: Callable, moving: _Taken, still: _Taken) -> Any:
    def body(sums: Any, slices: Any) -> Any:
        own, others = slices
        here = moving._replace(pieces=own)
        stacked, more = piece(here, still._replace(pieces=others))
        return _added(sums, more), stacked

    shapes = _sums(piece, moving, still)
    slices = (moving.pieces, still.pieces)
    sums, stacked = lax.scan(body, _zeros(shapes), slices)
    return stacked, _cast_all(sums, shapes)


def _with_gradient(
    piece: Callable,
    steering: int,
    moving: _Taken,
    still: _Taken,
) -> Any:
    """Run all pieces, and add up the gradient of one of the sums."""

    def body(carry: Any, slices: Any) -> Any:
        own, others = slices
        fixed = still._replace(pieces=others)

        def steered(own: Any, whole: Any) -> Any:
            stacked, more = piece(_Taken(own, whole), fixed)
            return more[steering], (stacked, more)

        differentiated = jax.grad(steered, (0, 1), has_aux=True)
        gradient, (stacked, more) = differentiated(own, moving.whole)
        of_own, of_whole = gradient
        sums, total = carry
        carry = _added(sums, more), _added(total, of_whole)
        return carry, (stacked, of_own)

    shapes = _sums(piece, moving, still)
    first = (_zeros(shapes), _zeros(moving.whole))
    slices = (moving.pieces, still.pieces)
    last, (stacked, of_own) = lax.scan(body, first, slices)
    sums, total = last
    results = stacked, _cast_all(sums, shapes)
    return results, _Taken(of_own, total)


def _again(piece: Callable, moving: _Taken, still: _Taken, cotangents: Any) -> _Taken:
    """Return the gradient by all results of the loop, each piece computed again."""
    of_stacked, of_sums = cotangents

    def body(total: Any, slices: Any) -> Any:
        own, others, given = slices
        fixed = still._replace(pieces=others)

        def run_piece(own: Any, whole: Any) -> Any:
            return piece(_Taken(own, whole), fixed)

        _, pull = jax.vjp(run_piece, own, moving.whole)
        of_own, of_whole = pull((given, of_sums))
        return _added(total, of_whole), of_own

    first = _zeros(moving.whole)
    slices = (moving.pieces, still.pieces, of_stacked)
    total, of_own = lax.scan(body, first, slices)
    return _Taken(of_own, _cast_all(total, moving.whole))


def _sums(piece: Callable, moving: _Taken, still: _Taken) -> Any:
    """Return the shapes of the sums that a piece returns."""

    def first_piece(taken: _Taken) -> _Taken:
        pieces = [x[0] for x in taken.pieces]
        return taken._replace(pieces=pieces)

    def run_first(moving: _Taken, still: _Taken) -> Any:
        _, sums = piece(first_piece(moving), first_piece(still))
        return sums

    return jax.eval_shape(run_first, moving, still)


def _cast_all(arrays: Any, like: Any) -> Any:
    return jax.tree.map(_cast, arrays, like)


def _cast(x: jax.Array, like: Any) -> jax.Array:
    return x.astype(like.dtype)


def _zeros(shapes: Any) -> Any:
    """Return zeros to add up arrays of some shapes: at least in float32."""

    def zero(x: Any) -> jax.Array:
        wide = _wide(x.dtype)
        return jnp.zeros(x.shape, wide)

    return jax.tree.map(zero, shapes)


def _wide(dtype: Any) -> Any:
    is_real = jnp.issubdtype(dtype, jnp.floating)
    is_narrow = is_real and dtype.itemsize < 4
    return jnp.float32 if is_narrow else dtype


def _dtype(x: Any) -> Any:
    return x.dtype


def _added(total: Any, more: Any) -> Any:
    def add(x: jax.Array, y: jax.Array) -> jax.Array:
        return add_any(x, y.astype(x.dtype))

    return jax.tree.map(add, total, more)


def _scaled(factor: Any, gradient: jax.Array, dtype: Any) -> jax.Array:
    wide = gradient.astype(_wide(gradient.dtype))
    scaled = wide * factor.astype(wide.dtype)
    return scaled.astype(dtype)

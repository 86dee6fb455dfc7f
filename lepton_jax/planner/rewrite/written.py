"""Attention that somebody wrote by hand, found in a program.

It is two products around a softmax. The second product is looked at first, and from
its operands everything is followed back: the shares, the softmax over the keys, what
was done to the scores, and the first product. Each step must be one of a few
operations; where it is another one, such as dropout, the program stays as it is.

    >>> import jax, jax.numpy as jnp
    >>> def attends(q, k, v):  # (batch, length, heads, width)
    ...     scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0
    ...     seen = jnp.tril(jnp.ones((6, 6), bool))
    ...     scores = jnp.where(seen, 50 * jnp.tanh(scores / 50), -1e9)
    ...     return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
    >>> x = jnp.ones((1, 6, 2, 4))
    >>> program = opened(jax.make_jaxpr(attends)(x, x, x))
    >>> [found] = find(program.jaxpr, {})
    >>> found.shape, found.causal, found.scale, found.cap
    ((1, 6, 2, 4), True, 0.5, 50.0)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.compat import Jaxpr, Literal
from lepton_jax.planner.rewrite import masks
from lepton_jax.planner.rewrite.attention import How
from lepton_jax.planner.rewrite.masks import KEY, QUERY, Labels
from lepton_jax.planner.rewrite.program import (
    Env,
    Uses,
    opened,
    read,
    shape_of_operand,
    shape_of_result,
)
from lepton_jax.planner.rewrite.scores import Axes, Axis, Known, Walk, is_of

__all__ = ["Written", "find", "opened"]

# dtypes of values in which a kernel computes
FLOATS = ("bfloat16", "float32", "float64")


class Operand(NamedTuple):
    """Queries, keys or values as a kernel takes them: an array that is only moved.

    Attributes:
      variable: of the program.
      order: its dims as (batch, length, key heads, group, width); None: there is none.
    """

    variable: Any
    order: tuple[int | None, ...]

    def read(self, env: Env, dtype: Any) -> jax.Array:
        """Return the array, (batch, length, heads, width)."""
        x = read(env, self.variable)
        x = x.astype(dtype)
        dims = [dim for dim in self.order if dim is not None]
        rest = set(range(x.ndim)).difference(dims)  # of extent 1
        x = x.transpose(*dims, *sorted(rest))
        batch, length, heads, group, width = self.extents()
        return x.reshape(batch, length, heads * group, width)

    def extents(self) -> list[int]:
        """Return the extents of batch, length, key heads, group and width."""
        shape = self.variable.aval.shape
        return [1 if dim is None else shape[dim] for dim in self.order]


class Written(NamedTuple):
    """Attention in a program.

    Attributes:
      result: the variable that holds the second product.
      query, key, value: its operands.
      segments: a variable, (batch, length), or None.
      causal, scale, behind, cap: as in `attention.How`.
      dtype: in which a kernel computes.
      place: the dims of the result as (batch, length, key heads, group, width).
    """

    result: Any
    query: Operand
    key: Operand
    value: Operand
    segments: Any
    causal: bool
    scale: float
    behind: int | None
    cap: float | None
    dtype: Any
    place: tuple[int | None, ...]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch, length, heads and width."""
        extents = self.query.extents()
        batch, length, heads, group, width = extents
        return batch, length, heads * group, width

    @property
    def keys(self) -> int:
        """Number of keys."""
        return self.key.extents()[1]

    def how(self, kernel: str) -> How:
        """Return how a kernel computes it."""
        return How(self.causal, self.scale, kernel, self.behind, cap=self.cap)

    def operands(self, env: Env) -> list[Any]:
        """Return query, key, value and segments as a kernel takes them."""
        operands = (self.query, self.key, self.value)
        arrays = [x.read(env, self.dtype) for x in operands]
        segments = None
        if self.segments is not None:
            segments = read(env, self.segments)
        return [*arrays, segments]

    def placed(self, out: jax.Array) -> jax.Array:
        """Return attention as the program has it."""
        aval = self.result.aval
        dims = [dim for dim in self.place if dim is not None]
        shape = [aval.shape[dim] for dim in dims]
        order = np.argsort(dims)
        x = out.reshape(shape).transpose(order)
        return x.astype(aval.dtype)


def find(jaxpr: Jaxpr, known: Known) -> Iterator[Written]:
    """Iterate over the attention in a program, its calls opened, loops left out."""
    uses = Uses(jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name != "dot_general":
            continue
        for side in (0, 1):
            found = _attention(eqn, side, uses, known)
            if found is not None:
                yield found
                break


# ---- internals ----


def _attention(eqn: Any, side: int, uses: Uses, known: Known) -> Written | None:
    """Return the attention whose second product is an equation.

    Args:
      eqn: a product.
      side: the number of the operand that holds the shares.
      uses: of the program.
      known: variables whose arrays are known.
    """
    second = _Product.of(eqn, side)
    if second is None or len(second.free[1 - side]) != 1:
        return None
    walk = Walk(uses, known, second.contracted[side])
    scores = walk.shares(eqn.invars[side], _axes(eqn, side))
    if scores is None:
        return None
    made = walk.scores(*scores)
    if made is None:
        return None
    first = _First.of(*made, walk.keys)
    if first is None:
        return None
    if set(first.batch) != set(second.batch[side]):
        return None
    return _written(eqn, side, second, first, walk)


def _axes(eqn: Any, side: int) -> Axes:
    """Return the axes of the shares, which are an operand of the second product."""
    rank = len(shape_of_operand(eqn, side))
    return tuple(range(rank))


Dims = tuple[int, ...]


class _Product(NamedTuple):
    """The dims of a product that sums over one dim, each as (left, right)."""

    contracted: tuple[int, int]
    batch: tuple[Dims, Dims]
    free: tuple[Dims, Dims]

    @classmethod
    def of(cls, eqn: Any, side: int = 0) -> _Product | None:
        contracted, batch = eqn.params["dimension_numbers"]
        left, right = (tuple(dims) for dims in contracted)
        if len(left) != 1:
            return None
        free = []
        for number in (0, 1):
            rank = len(shape_of_operand(eqn, number))
            others = set(range(rank)).difference(contracted[number], batch[number])
            free.append(tuple(sorted(others)))
        return cls(
            (left[0], right[0]),
            (tuple(batch[0]), tuple(batch[1])),
            (free[0], free[1]),
        )


# axis of the scores to the dim of an array
Places = dict[Axis | None, int]


class _First(NamedTuple):
    """The product of queries and keys.

    Attributes:
      query, key: variables.
      of_query, of_key: axis of the scores to the dim of the array.
      widths: the dims that are summed over.
      batch: axes that both have.
    """

    query: Any
    key: Any
    of_query: Places
    of_key: Places
    widths: tuple[int, int]
    batch: Axes

    def extent_of_query(self, axis: Axis) -> int:
        """Return the extent of the queries along an axis."""
        shape = self.query.aval.shape
        return shape[self.of_query[axis]]

    def extent_of_key(self, axis: Axis) -> int:
        """Return the extent of the keys along an axis."""
        shape = self.key.aval.shape
        return shape[self.of_key[axis]]

    @classmethod
    def of(cls, eqn: Any, axes: Axes, keys: Axis) -> _First | None:
        product = _Product.of(eqn)
        if product is None:
            return None
        # the axes of a product: those of the batch, the left ones, the right ones
        count = len(product.batch[0])
        middle = count + len(product.free[0])
        batch = axes[:count]
        free = [axes[count:middle], axes[middle:]]
        side = 0 if free[0] == (keys,) else 1
        if free[side] != (keys,):
            return None

        places: list[Places] = []
        for number in (0, 1):
            own = batch + free[number]
            dims = product.batch[number] + product.free[number]
            places.append(dict(zip(own, dims, strict=True)))
        other = 1 - side
        return cls(
            eqn.invars[other],
            eqn.invars[side],
            places[other],
            places[side],
            (product.contracted[other], product.contracted[side]),
            batch,
        )


# axes in the order of an operand's dims: batch, length, key heads, group
Order = tuple[Axis | None, ...]


class _Roles(NamedTuple):
    """The axes of the scores by their roles; None: there is no such axis."""

    batch: Axis | None
    length: Axis
    heads: Axis | None
    group: Axis | None

    def order(self) -> Order:
        """Return the axes in the order of the dims of the queries, and the result."""
        return self.batch, self.length, self.heads, self.group

    def order_of_keys(self, keys: Axis) -> Order:
        """Return the axes in the order of the dims of keys and values."""
        return self.batch, keys, self.heads, None


def _roles(first: _First, axes: Axes, keys: Axis) -> Iterator[_Roles]:
    """Yield what the axes may be: any of two free axes of the queries is the length."""
    batch = sorted(first.batch, key=first.of_query.__getitem__)
    taken = (keys, *batch)
    free = [axis for axis in axes if axis not in taken]
    if len(batch) > 2 or not 1 <= len(free) <= 2:
        return
    samples, heads, *_ = [*batch, None, None]
    count = first.extent_of_key(keys)

    def differs(axis: Axis) -> bool:
        return first.extent_of_query(axis) != count

    for length in sorted(free, key=differs):
        others: list[Axis | None] = [axis for axis in free if axis != length]
        group = others[0] if others else None
        yield _Roles(samples, length, heads, group)


def _written(
    eqn: Any, side: int, second: _Product, first: _First, walk: Walk
) -> Written | None:
    masked = _masked(walk, first, _axes(eqn, side))
    if masked is None:
        return None
    roles, mask = masked

    operands = _Operands(
        _query(first, roles),
        _key(first, roles, walk.keys),
        _value(eqn, 1 - side, second, roles, walk.keys),
    )
    dtype = _dtype(walk, operands)
    if dtype is None or not operands.have_one_width():
        return None
    uncast = _Operands(*(_uncast(walk, x, dtype) for x in operands))
    operands = _unrepeated(walk, uncast)

    scale = walk.factor
    cap = None
    if walk.inner is not None:
        cap = walk.factor
        scale = walk.factor * walk.inner
        if cap <= 0:
            return None
    return Written(
        eqn.outvars[0],
        *operands,
        mask.segments,
        mask.shown.causal,
        scale,
        mask.shown.behind,
        cap,
        dtype,
        _place(second, side, roles),
    )


def _masked(walk: Walk, first: _First, axes: Axes) -> tuple[_Roles, _Mask] | None:
    """Return the first roles of the axes in which the masks make sense, and these."""
    for roles in _roles(first, axes, walk.keys):
        mask = _mask_of(walk, roles, first)
        if mask is not None:
            return roles, mask
    return None


class _Operands(NamedTuple):
    query: Operand
    key: Operand
    value: Operand

    def have_one_width(self) -> bool:
        """Whether queries are as wide as values."""
        return self.query.extents()[-1] == self.value.extents()[-1]


def _query(first: _First, roles: _Roles) -> Operand:
    order = _dims(first.of_query, roles.order())
    return Operand(first.query, (*order, first.widths[0]))


def _key(first: _First, roles: _Roles, keys: Axis) -> Operand:
    order = _dims(first.of_key, roles.order_of_keys(keys))
    return Operand(first.key, (*order, first.widths[1]))


def _value(eqn: Any, side: int, second: _Product, roles: _Roles, keys: Axis) -> Operand:
    """Return the values, which are the operand `side` of the second product."""
    places: Places = {keys: second.contracted[side]}
    shared = zip(second.batch[1 - side], second.batch[side], strict=True)
    places.update(shared)
    order = _dims(places, roles.order_of_keys(keys))
    [width] = second.free[side]
    return Operand(eqn.invars[side], (*order, width))


def _dims(places: Places, order: Order) -> list[int | None]:
    """Return the dims of axes; None: the array has no such axis."""
    return [places.get(axis) for axis in order]


def _place(second: _Product, side: int, roles: _Roles) -> tuple[int | None, ...]:
    """Return the dims of the second product as an operand's."""
    # the dims of a product: those of the batch, the left ones, the right ones
    batch = second.batch[side]
    own = second.free[side]
    width = len(batch) if side else len(batch) + len(own)
    first = len(batch) + len(second.free[0]) if side else len(batch)

    places: Places = {}
    for place, axis in enumerate(batch):
        places[axis] = place
    for place, axis in enumerate(own, first):
        places[axis] = place
    return (*_dims(places, roles.order()), width)


# ---- internals: masks, dtypes and repeated heads ----


class _Mask(NamedTuple):
    shown: masks.Shown
    segments: Any


def _mask_of(walk: Walk, roles: _Roles, first: _First) -> _Mask | None:
    """Return what the masks of some scores show; None: what no kernel knows."""
    queries = first.extent_of_query(roles.length)
    keys = first.extent_of_key(walk.keys)
    seen = []
    segments = None
    for part in _parts(walk):
        found = walk.expression(part.variable, _names(part.labels, walk, roles))
        if found is not None:
            seen.append(found if part.shows else ("not", found))
            continue
        own = _segments(walk, part, roles)
        if own is None or segments is not None or queries != keys:
            return None
        segments = own
    for variable, axes in walk.biases:
        labels = tuple(map(str, axes))
        found = walk.expression(variable, _names(labels, walk, roles))
        if found is None:
            return None
        seen.append(masks.seen_where_zero(found))

    if seen:
        shown = masks.shown(tuple(seen), queries, keys)
        return None if shown is None else _Mask(shown, segments)
    # without a mask, which axis is the length is told by its extent alone
    length_is_sure = roles.group is None or queries == keys
    if not length_is_sure:
        return None
    return _Mask(masks.Shown(False, None), segments)


class _Part(NamedTuple):
    """A mask, or one of those that are all true where it is.

    Attributes:
      variable: that holds it.
      labels: of its dims.
      shows: whether keys are seen where it is true; else they are hidden there.
    """

    variable: Any
    labels: Labels
    shows: bool


def _parts(walk: Walk) -> Iterator[_Part]:
    """Yield the masks of some scores, each taken apart where that can be."""
    for variable, axes, shows in walk.masks:
        labels = tuple(map(str, axes))
        if not shows:
            yield _Part(variable, labels, shows)
            continue
        for own, own_labels in _conjuncts(walk, variable, labels):
            yield _Part(own, own_labels, shows)


def _names(labels: Labels, walk: Walk, roles: _Roles) -> Labels:
    """Return the names of dims, by their axes, as `masks.expression` has them."""
    names: dict[str | None, str] = {}
    names[str(roles.length)] = QUERY
    names[str(walk.keys)] = KEY
    return tuple(names.get(label) for label in labels)


def _conjuncts(walk: Walk, variable: Any, labels: Labels) -> Iterator[Any]:
    """Yield masks that are all true where one is, with the labels of their dims."""
    variable, labels = _origin(walk, variable, labels)
    eqn = walk.maker(variable)
    if is_of(eqn, "and"):
        for own in eqn.invars:
            yield from _conjuncts(walk, own, labels)
    else:
        yield variable, labels


def _segments(walk: Walk, part: _Part, roles: _Roles) -> Any:
    """Return the variable (batch, length) whose entries a mask compares; or None."""
    eqn = walk.maker(part.variable)
    if not part.shows or not is_of(eqn, "eq"):
        return None
    left, right = eqn.invars
    variable, labels = _origin(walk, left, part.labels)
    other, other_labels = _origin(walk, right, part.labels)
    if variable is not other or isinstance(variable, Literal):
        return None

    batch = str(roles.batch)
    of_queries = (batch, str(roles.length))
    of_keys = (batch, str(walk.keys))
    found = [labels, other_labels]
    if found in ([of_queries, of_keys], [of_keys, of_queries]):
        return variable
    return None


def _origin(walk: Walk, variable: Any, labels: Labels) -> tuple[Any, Labels]:
    """Go back over what only moves an array; return it and its dims' labels."""
    while True:
        eqn = walk.maker(variable)
        if eqn is None:
            return variable, labels
        moved = masks.moved_labels(eqn, labels)
        if moved is None or not shape_of_operand(eqn):
            return variable, labels
        variable = eqn.invars[0]
        labels = moved


def _dtype(walk: Walk, operands: _Operands) -> Any:
    """Return the dtype in which a kernel loses nothing; None: there is none."""
    dtype = operands.value.variable.aval.dtype
    if str(dtype) not in FLOATS:
        return None
    for operand in (operands.query, operands.key):
        source = _uncast(walk, operand, dtype).variable
        if not _holds(dtype, source.aval.dtype):
            return None
    return dtype


def _holds(dtype: Any, other: Any) -> bool:
    """Whether a dtype holds all numbers of another."""
    return jnp.promote_types(other, dtype) == dtype


def _uncast(walk: Walk, operand: Operand, dtype: Any) -> Operand:
    """Return an operand before casts to a wider dtype than a kernel's."""
    variable = operand.variable
    while variable.aval.dtype != dtype:
        eqn = walk.maker(variable)
        if not is_of(eqn, "convert_element_type"):
            break
        source = eqn.invars[0]
        if not _holds(variable.aval.dtype, source.aval.dtype):
            break
        variable = source
    return Operand(variable, operand.order)


def _unrepeated(walk: Walk, operands: _Operands) -> _Operands:
    """Return operands whose key heads are not repeated for each query head."""
    *_, group, _ = operands.query.order
    if group is not None:
        return operands
    of_key = _source_of_heads(walk, operands.key)
    of_value = _source_of_heads(walk, operands.value)
    if of_key is None or of_value is None:
        return operands
    key, repeats = of_key
    value, repeats_of_value = of_value
    if repeats != repeats_of_value:
        return operands
    return operands._replace(key=key, value=value)


def _source_of_heads(walk: Walk, operand: Operand) -> tuple[Operand, int] | None:
    """Return an operand before `jnp.repeat` over its heads, and how often it does."""
    operand = _untransposed(walk, operand)
    eqn = walk.maker(operand.variable)
    heads = operand.order[2]
    if heads is None or not is_of(eqn, "reshape"):
        return None
    wide = shape_of_operand(eqn)
    broadcast = walk.maker(eqn.invars[0])
    if not is_of(broadcast, "broadcast_in_dim"):
        return None
    source = broadcast.invars[0]
    if isinstance(source, Literal):
        return None

    # the reshape merges heads and repeats: (..., heads, repeats, ...)
    repeated = heads + 1
    merged = math.prod(wide[heads : repeated + 1])
    shape = (*wide[:heads], merged, *wide[repeated + 1 :])
    if len(wide) <= repeated or shape != operand.variable.aval.shape:
        return None
    dims = _only_repeated(broadcast, repeated)
    if dims is None:
        return None
    order: list[int | None] = []
    for dim in operand.order:
        after = dim is not None and dim > heads
        order.append(None if dim is None else dims[dim + after])
    return Operand(source, tuple(order)), wide[repeated]


def _untransposed(walk: Walk, operand: Operand) -> Operand:
    """Return an operand before transpositions."""
    eqn = walk.maker(operand.variable)
    while is_of(eqn, "transpose"):
        permutation = eqn.params["permutation"]
        before: dict[int | None, int] = dict(enumerate(permutation))
        order = tuple(before.get(dim) for dim in operand.order)
        operand = Operand(eqn.invars[0], order)
        eqn = walk.maker(operand.variable)
    return operand


def _only_repeated(broadcast: Any, repeated: int) -> dict[int, int] | None:
    """Return where each dim of a broadcast is in its operand.

    None: it repeats along another dim than this one, or not along this one.
    """
    before = shape_of_operand(broadcast)
    places = broadcast.params["broadcast_dimensions"]
    dims = {place: dim for dim, place in enumerate(places)}
    for place, extent in enumerate(shape_of_result(broadcast)):
        if extent == 1:
            continue
        is_there = place in dims and before[dims[place]] == extent
        if is_there == (place == repeated):
            return None
    return dims

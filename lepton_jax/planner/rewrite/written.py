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

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.compat import Jaxpr, Literal
from lepton_jax.planner.rewrite import masks
from lepton_jax.planner.rewrite.attention import How
from lepton_jax.planner.rewrite.masks import KEY, QUERY, Labels
from lepton_jax.planner.rewrite.program import Env, Uses, opened, read
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
        x = read(env, self.variable).astype(dtype)
        dims = [dim for dim in self.order if dim is not None]
        rest = [dim for dim in range(x.ndim) if dim not in dims]  # of extent 1
        x = x.transpose(*dims, *rest)
        extents = iter(x.shape)
        batch, length, heads, group, width = (
            1 if dim is None else next(extents) for dim in self.order
        )
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
        batch, length, heads, group, width = self.query.extents()
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
        arrays = (self.query, self.key, self.value)
        segments = None if self.segments is None else read(env, self.segments)
        return [*(x.read(env, self.dtype) for x in arrays), segments]

    def placed(self, out: jax.Array) -> jax.Array:
        """Return attention as the program has it."""
        aval = self.result.aval
        dims = [dim for dim in self.place if dim is not None]
        x = out.reshape([aval.shape[dim] for dim in dims])
        return x.transpose(np.argsort(dims)).astype(aval.dtype)


def find(jaxpr: Jaxpr, known: Known) -> Iterator[Written]:
    """Iterate over the attention in a program, its calls opened, loops left out."""
    uses = Uses(jaxpr)
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
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
    own = tuple(range(len(eqn.invars[side].aval.shape)))
    walk = Walk(uses, known, second.contracted[side])
    scores = walk.shares(eqn.invars[side], own)
    if scores is None:
        return None
    made = walk.scores(*scores)
    if made is None:
        return None
    first = _First.of(*made, walk.keys)
    if first is None or set(first.batch) != set(second.batch[side]):
        return None
    return _written(eqn, side, second, first, walk)


class _Product(NamedTuple):
    """The dims of a product that sums over one dim, each as (left, right)."""

    contracted: tuple[int, int]
    batch: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]

    @classmethod
    def of(cls, eqn: Any, side: int = 0) -> _Product | None:
        contracted, batch = eqn.params["dimension_numbers"]
        if len(contracted[0]) != 1:
            return None
        free = []
        for number in (0, 1):
            taken = {*contracted[number], *batch[number]}
            rank = len(eqn.invars[number].aval.shape)
            free.append(tuple(dim for dim in range(rank) if dim not in taken))
        return cls(
            (contracted[0][0], contracted[1][0]),
            (tuple(batch[0]), tuple(batch[1])),
            (free[0], free[1]),
        )


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
    of_query: dict[Axis | None, int]
    of_key: dict[Axis | None, int]
    widths: tuple[int, int]
    batch: Axes

    @classmethod
    def of(cls, eqn: Any, axes: Axes, keys: Axis) -> _First | None:
        product = _Product.of(eqn)
        if product is None:
            return None
        count = len(product.batch[0])
        batch = axes[:count]
        rest = list(axes[count:])
        free = [rest[: len(product.free[0])], rest[len(product.free[0]) :]]
        side = 0 if free[0] == [keys] else 1
        if free[side] != [keys]:
            return None
        places: list[dict[Axis | None, int]] = []
        for number in (0, 1):
            dims = (*product.batch[number], *product.free[number])
            places.append(dict(zip((*batch, *free[number]), dims, strict=True)))
        other = 1 - side
        return cls(
            eqn.invars[other],
            eqn.invars[side],
            places[other],
            places[side],
            (product.contracted[other], product.contracted[side]),
            batch,
        )


class _Roles(NamedTuple):
    """The axes of the scores by their roles; None: there is no such axis."""

    batch: Axis | None
    length: Axis
    heads: Axis | None
    group: Axis | None


def _roles(first: _First, axes: Axes, keys: Axis) -> Iterator[_Roles]:
    """Yield what the axes may be: any of two free axes of the queries is the length."""
    batch = sorted(first.batch, key=lambda axis: first.of_query[axis])
    free = [axis for axis in axes if axis != keys and axis not in batch]
    if len(batch) > 2 or not 1 <= len(free) <= 2:
        return
    samples = batch[0] if batch else None
    heads = batch[1] if len(batch) > 1 else None
    keys_extent = first.key.aval.shape[first.of_key[keys]]

    def rank(axis: Axis) -> bool:
        return first.query.aval.shape[first.of_query[axis]] != keys_extent

    for length in sorted(free, key=rank):
        group = next((axis for axis in free if axis != length), None)
        yield _Roles(samples, length, heads, group)


def _written(
    eqn: Any, side: int, second: _Product, first: _First, walk: Walk
) -> Written | None:
    axes = tuple(range(len(eqn.invars[side].aval.shape)))
    roles: _Roles | None = None
    mask: _Mask | None = None
    for roles in _roles(first, axes, walk.keys):
        mask = _mask_of(walk, roles, first)
        if mask is not None:
            break
    if roles is None or mask is None:
        return None

    of_value: dict[Axis | None, int] = {}
    of_value.update(zip(second.batch[side], second.batch[1 - side], strict=True))
    of_value[walk.keys] = second.contracted[1 - side]
    order = (roles.batch, walk.keys, roles.heads)
    value = eqn.invars[1 - side]
    query = Operand(
        first.query,
        (*(first.of_query.get(axis) for axis in roles_order(roles)), first.widths[0]),
    )
    keys = Operand(
        first.key, (*(first.of_key.get(axis) for axis in order), None, first.widths[1])
    )
    values = Operand(
        value,
        (*(of_value.get(axis) for axis in order), None, second.free[1 - side][0]),
    )
    dtype = _dtype(walk, query, keys, values)
    if dtype is None or query.extents()[-1] != values.extents()[-1]:
        return None
    query, keys, values = (_uncast(walk, x, dtype) for x in (query, keys, values))
    query, keys, values = _unrepeated(walk, query, keys, values)
    scale = walk.factor
    cap = None
    if walk.inner is not None:
        cap = walk.factor
        scale = walk.factor * walk.inner
        if cap <= 0:
            return None
    return Written(
        eqn.outvars[0],
        query,
        keys,
        values,
        mask.segments,
        mask.shown.causal,
        scale,
        mask.shown.behind,
        cap,
        dtype,
        _place(second, side, roles),
    )


def roles_order(roles: _Roles) -> tuple[Axis | None, ...]:
    """Return the axes in the order of an operand's dims."""
    return roles.batch, roles.length, roles.heads, roles.group


def _place(second: _Product, side: int, roles: _Roles) -> tuple[int | None, ...]:
    """Return the dims of the second product as an operand's."""
    count = len(second.batch[0])
    dims: dict[Axis | None, int] = {}
    for place, axis in enumerate(second.batch[side]):
        dims[axis] = place
    before = count + (len(second.free[0]) if side else 0)
    for place, axis in enumerate(second.free[side]):
        dims[axis] = before + place
    width = count if side else count + len(second.free[0])
    return (*(dims.get(axis) for axis in roles_order(roles)), width)


# ---- internals: masks, dtypes and repeated heads ----


class _Mask(NamedTuple):
    shown: masks.Shown
    segments: Any


def _mask_of(walk: Walk, roles: _Roles, first: _First) -> _Mask | None:
    """Return what the masks of some scores show; None: what no kernel knows."""
    names: dict[str | None, str] = {str(roles.length): QUERY, str(walk.keys): KEY}
    queries = first.query.aval.shape[first.of_query[roles.length]]
    keys = first.key.aval.shape[first.of_key[walk.keys]]
    seen = []
    segments = None
    for variable, axes, shows in walk.masks:
        whole = (variable, tuple(map(str, axes)))
        for part, labels in _conjuncts(walk, *whole) if shows else [whole]:
            own_names = tuple(names.get(label) for label in labels)
            found = masks.expression(part, own_names, walk.uses, walk.known)
            if found is not None:
                seen.append(found if shows else ("not", found))
                continue
            own = _segments(walk, part, labels, roles) if shows else None
            if own is None or segments is not None or queries != keys:
                return None
            segments = own
    for variable, axes in walk.biases:
        own_names = tuple(names.get(str(axis)) for axis in axes)
        found = masks.expression(variable, own_names, walk.uses, walk.known)
        if found is None:
            return None
        seen.append(masks.seen_where_zero(found))
    if not seen:
        length_is_sure = roles.group is None or queries == keys
        shown = masks.Shown(False, None) if length_is_sure else None
    else:
        shown = masks.shown(tuple(seen), queries, keys)
    return None if shown is None else _Mask(shown, segments)


def _conjuncts(walk: Walk, variable: Any, labels: Labels) -> Iterator[Any]:
    """Yield masks that are all true where one is, with the labels of their dims."""
    variable, labels = _origin(walk, variable, labels)
    eqn = walk.maker(variable)
    if is_of(eqn, "and"):
        for own in eqn.invars:
            yield from _conjuncts(walk, own, labels)
    else:
        yield variable, labels


def _segments(walk: Walk, variable: Any, labels: Labels, roles: _Roles) -> Any:
    """Return the variable (batch, length) whose entries a mask compares; or None."""
    eqn = walk.maker(variable)
    if not is_of(eqn, "eq"):
        return None
    origins = [_origin(walk, operand, labels) for operand in eqn.invars]
    batch = str(roles.batch)
    wanted = [(batch, str(roles.length)), (batch, str(walk.keys))]
    if origins[0][0] is not origins[1][0] or isinstance(origins[0][0], Literal):
        return None
    found = [labels for _, labels in origins]
    return origins[0][0] if found in (wanted, wanted[::-1]) else None


def _origin(walk: Walk, variable: Any, labels: Labels) -> tuple[Any, Labels]:
    """Go back over what only moves an array; return it and its dims' labels."""
    while True:
        eqn = walk.maker(variable)
        moved = None if eqn is None else masks.moved_labels(eqn, labels)
        if moved is None or not eqn.invars[0].aval.shape:
            return variable, labels
        variable = eqn.invars[0]
        labels = moved


def _dtype(walk: Walk, query: Operand, key: Operand, value: Operand) -> Any:
    """Return the dtype in which a kernel loses nothing; None: there is none."""
    dtype = value.variable.aval.dtype
    if str(dtype) not in FLOATS:
        return None
    for operand in (query, key):
        own = _uncast(walk, operand, dtype).variable.aval.dtype
        if jnp.promote_types(own, dtype) != dtype:
            return None
    return dtype


def _uncast(walk: Walk, operand: Operand, dtype: Any) -> Operand:
    """Return an operand before casts to a wider dtype than a kernel's."""
    variable = operand.variable
    while variable.aval.dtype != dtype:
        eqn = walk.maker(variable)
        if not is_of(eqn, "convert_element_type"):
            break
        source = eqn.invars[0].aval.dtype
        if jnp.promote_types(source, variable.aval.dtype) != variable.aval.dtype:
            break
        variable = eqn.invars[0]
    return Operand(variable, operand.order)


def _unrepeated(
    walk: Walk, query: Operand, key: Operand, value: Operand
) -> tuple[Operand, Operand, Operand]:
    """Return operands whose key heads are not repeated for each query head."""
    if query.order[3] is not None:
        return query, key, value
    sources = [_source_of_heads(walk, operand) for operand in (key, value)]
    if None in sources:
        return query, key, value
    (keys, of_key), (values, of_value) = sources  # type: ignore[misc]
    return (query, keys, values) if of_key == of_value else (query, key, value)


def _source_of_heads(walk: Walk, operand: Operand) -> tuple[Operand, int] | None:
    """Return an operand before `jnp.repeat` over its heads, and how often it does."""
    order = operand.order
    variable = operand.variable
    heads = order[2]
    eqn = walk.maker(variable)
    while is_of(eqn, "transpose"):
        permutation = eqn.params["permutation"]
        order = tuple(None if dim is None else permutation[dim] for dim in order)
        variable = eqn.invars[0]
        eqn = walk.maker(variable)
    heads = order[2]
    if heads is None or not is_of(eqn, "reshape"):
        return None
    shape = variable.aval.shape
    wide = eqn.invars[0].aval.shape
    broadcast = walk.maker(eqn.invars[0])
    if len(wide) != len(shape) + 1 or not is_of(broadcast, "broadcast_in_dim"):
        return None
    merged = (*wide[:heads], wide[heads] * wide[heads + 1], *wide[heads + 2 :])
    source = broadcast.invars[0]
    places = broadcast.params["broadcast_dimensions"]
    if merged != shape or isinstance(source, Literal):
        return None
    own = source.aval.shape
    dims = {place: dim for dim, place in enumerate(places)}
    repeated = heads + 1
    for place, extent in enumerate(wide):
        has = place in dims and own[dims[place]] == extent
        if has == (place == repeated) and extent != 1:
            return None
    wanted = []
    for dim in order:
        after = dim is not None and dim > heads
        wanted.append(None if dim is None else dims[dim + after])
    return Operand(source, tuple(wanted)), wide[repeated]

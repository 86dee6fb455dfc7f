"""Attention over a sequence that lies in parts on several devices.

Each device keeps its queries. Keys and values go around: at each step a device passes
those that it has to the next one, and computes with them while the next ones come. The
softmax of the parts is put together from their results and the logarithms of their sums
(Liu et al. 2023, "Ring Attention with Blockwise Transformers", section 3). Backward,
the gradients of keys and values travel with them, one step behind, and come home.

**Causal attention, balanced.** With the sequence in order, the first device sees one
part and the last one all, and everybody waits for the last. So the sequence is cut into
two halves a device, and device i of n gets the halves i and 2n-1-i, for queries, keys
and values (Llama team 2024, "The Llama 3 Herd of Models", section 3.3.2). Four devices
have the halves

    0 7 | 1 6 | 2 5 | 3 4

At each step but the first, two of the four products of halves are seen, each whole:
that of the high queries with the low keys, and that of the low ones if the keys come
from an earlier device, else that of the high ones. No device computes what is not seen,
but in the diagonal's blocks. A part of odd length gets one more position, of a segment
of its own.

**Windows.** A query sees keys a little way back, so the sequence stays in order, and
only as many steps are made as the window reaches. Devices at the beginning compute
parts that nobody sees; the others take as long.

    >>> causal = How(causal=True, scale=1.0, kernel="blocks")
    >>> steps(causal, local=256, size=4)
    3
    >>> steps(causal._replace(behind=100), local=256, size=4)
    1
    >>> [(how.causal, count) for how, _, count in work(causal, local=256, size=4)]
    [(True, 2), (False, 1), (False, 6)]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lepton_jax.planner.rewrite.attention import (
    ATTENTION,
    HIDDEN,
    How,
    attention_p,
    gradient_p,
)
from lepton_jax.planner.rewrite.splash import BLOCKS

# the halves of a part that is cut in two
LOW, HIGH = 0, 1
# a segment that no document has
NOBODY = jnp.iinfo(jnp.int32).min


class Ring(NamedTuple):
    """The devices among which a sequence is divided.

    Attributes:
      axes: names of the mesh axes.
      size: number of devices.
    """

    axes: tuple[str, ...]
    size: int

    def passed(self, x: Any, by: int = 1) -> Any:
        """Return what the device `by` places before this one has."""
        pairs = [(i, (i + by) % self.size) for i in range(self.size)]
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axes, pairs), x)


class Product(NamedTuple):
    """A part of the queries that meets a part of the keys.

    Attributes:
      query, key: numbers of the parts, which may be traced.
      how: the kind of attention between them.
      seen: whether the product counts, a traced bool; None: it does.
    """

    query: Any
    key: Any
    how: How
    seen: Any = None


class Cut(NamedTuple):
    """A device's arrays, each with its parts as a first dim.

    Attributes:
      query, key, value: (parts, batch, length, heads, width).
      segments: (parts, batch, length), or None.
    """

    query: Any
    key: Any
    value: Any
    segments: Any


def halved(how: How) -> bool:
    """Whether the sequence is cut into two halves a device."""
    return how.causal and how.behind is None


def steps(
    how: How,
    local: int,
    size: int,
) -> int:
    """Return how often keys and values are passed on.

    Args:
      how: the kind of attention.
      local: tokens of a device.
      size: devices.
    """
    if how.behind is None:
        return size - 1
    return min(size - 1, -(-how.behind // local))


def work(
    how: How,
    local: int,
    size: int,
) -> Iterator[tuple[How, int, int]]:
    """Iterate over the products of a device: their kind, their length, their number.

    Args:
      how: the kind of attention.
      local: tokens of a device.
      size: devices.
    """
    length = -(-local // 2) if halved(how) else local
    if halved(how):
        yield _diagonal(how, length), length, 2
        yield _whole(how, length), length, 1
        yield _whole(how, length), length, 2 * (size - 1)
    elif how.behind is None:
        yield _whole(how, length), length, size
    else:
        for step in range(steps(how, local, size) + 1):
            yield _behind(how, length, step), length, 1


def run(
    name: str,
    how: How,
    ring: Ring,
    arrays: Sequence[Any],
) -> list[jax.Array]:
    """Run attention, or its gradient, on one device of a ring, inside `shard_map`.

    Args:
      name: of the operation.
      how: the kind of attention.
      ring: the devices.
      arrays: its operands, each this device's part of the sequence.
    """
    if name == ATTENTION:
        return forward(*arrays, how=how, ring=ring)
    return backward(*arrays, how=how, ring=ring)


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *segments: jax.Array,
    how: How,
    ring: Ring,
) -> list[jax.Array]:
    """Return a device's part of attention, and the logarithms of its sums.

    Args:
      query: (batch, length, heads, width), this device's part of the sequence.
      key: (batch, length, key heads, width).
      value: likewise.
      *segments: (batch, length), if there are some.
      how: the kind of attention.
      ring: the devices.
    """
    local = query.shape[1]
    cut = _cut((query, key, value), segments, how, ring)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    parts, batch, length, heads, _ = cut.query.shape
    sofar = (
        jnp.zeros(cut.query.shape, wide),
        jnp.full((parts, batch, heads, length), HIDDEN, wide),
    )

    def step(number: Any, keys: Any, sofar: Any) -> Any:
        for product in _products(number, how, ring, length):
            sofar = _with_product(sofar, product, cut, keys)
        return sofar

    out, sums = _around(step, cut, sofar, how, local, ring)
    out = _together(out.astype(query.dtype), 2, local, how, ring)
    return [out, _together(sums, 3, local, how, ring)]


def backward(
    *arrays: jax.Array,
    how: How,
    ring: Ring,
) -> list[jax.Array]:
    """Return a device's part of the gradients by query, key and value.

    Args:
      *arrays: query, key and value as for `forward`, its two results, the cotangent of
        the first, and segments if there are some.
      how: the kind of attention.
      ring: the devices.
    """
    query, _, _, out, sums, cotangent, *segments = arrays
    local = query.shape[1]
    cut = _cut(arrays[:3], segments, how, ring)
    others = (
        _parts(out, 1, how, ring),
        _parts(sums, 2, how, ring),
        _parts(cotangent, 1, how, ring),
    )
    length = cut.query.shape[2]

    def step(number: Any, keys: Any, sofar: Any) -> Any:
        of_query, of_keys = sofar
        if not _is_first(number):
            of_keys = ring.passed(of_keys)
        for product in _products(number, how, ring, length):
            mine, *theirs = _gradients(product, cut, keys, others)
            of_query = _added(of_query, product.query, mine)
            of_keys = [
                _added(x, product.key, more)
                for x, more in zip(of_keys, theirs, strict=True)
            ]
        return of_query, of_keys

    wide = jnp.promote_types(query.dtype, jnp.float32)
    zeros = [jnp.zeros(x.shape, wide) for x in cut[:3]]
    sofar = (zeros[0], zeros[1:])
    of_query, of_keys = _around(step, cut, sofar, how, local, ring)

    home = ring.size - steps(how, local, ring.size)
    of_keys = ring.passed(of_keys, home)
    return [
        _together(x.astype(like.dtype), 2, local, how, ring)
        for x, like in zip((of_query, *of_keys), arrays[:3], strict=True)
    ]


# ---- internals: the steps ----


def _around(
    step: Any,
    cut: Cut,
    sofar: Any,
    how: How,
    local: int,
    ring: Ring,
) -> Any:
    """Take each step with the keys that are there, while the next ones come.

    Steps that are alike are a loop. The last one passes nothing on.
    """
    last = steps(how, local, ring.size)
    keys = (cut.key, cut.value, cut.segments)
    if last == 0:
        return step(0, keys, sofar)
    coming = ring.passed(keys)
    sofar = step(0, keys, sofar)

    if how.behind is not None:
        for number in range(1, last):
            keys = coming
            coming = ring.passed(keys)
            sofar = step(number, keys, sofar)
        return step(last, coming, sofar)

    def body(number: Any, carry: Any) -> Any:
        keys, sofar = carry
        coming = ring.passed(keys)
        return coming, step(number, keys, sofar)

    if last > 1:
        coming, sofar = lax.fori_loop(1, last, body, (coming, sofar))
    return step(jnp.int32(last), coming, sofar)


def _products(
    step: Any,
    how: How,
    ring: Ring,
    length: int,
) -> Iterator[Product]:
    """Iterate over the products of a step.

    Args:
      step: its number; the first and those with a window are no traced numbers.
      how: the kind of attention.
      ring: the devices.
      length: tokens of a part.
    """
    if how.behind is not None:
        seen = None if _is_first(step) else lax.axis_index(ring.axes) >= step
        yield Product(0, 0, _behind(how, length, step), seen)
        return
    whole = _whole(how, length)
    if not halved(how):
        yield Product(0, 0, whole)
        return
    yield Product(HIGH, LOW, whole)
    if _is_first(step):
        diagonal = _diagonal(how, length)
        yield Product(LOW, LOW, diagonal)
        yield Product(HIGH, HIGH, diagonal)
        return
    # the keys come from the device `step` places before this one
    is_earlier = lax.axis_index(ring.axes) >= step
    both = jnp.where(is_earlier, LOW, HIGH)
    yield Product(both, both, whole)


def _is_first(step: Any) -> bool:
    return isinstance(step, int) and step == 0


def _kernel(how: How, length: int) -> str:
    """Return the kernel for parts of some length: splash takes whole blocks only."""
    return "blocks" if length % BLOCKS[-1] else how.kernel


def _diagonal(how: How, length: int) -> How:
    return how._replace(kernel=_kernel(how, length))


def _whole(how: How, length: int) -> How:
    return how._replace(causal=False, kernel=_kernel(how, length))


def _behind(how: How, length: int, step: int) -> How:
    """Return the attention of queries that lie `step` parts after the keys."""
    return how._replace(ahead=step * length, kernel=_kernel(how, length))


def _with_product(
    sofar: Any,
    product: Product,
    cut: Cut,
    keys: Any,
) -> Any:
    """Return results and sums with those of one more product."""
    arrays = (_part(cut.query, product.query), *_of_keys(product, keys))
    segments = _segments(product, cut, keys)
    out, sums = attention_p.bind(*arrays, *segments, how=product.how)
    if product.seen is not None:
        sums = jnp.where(product.seen, sums, HIDDEN)
    # a query that sees none of these keys: a kernel's result may be no number
    is_there = sums > HIDDEN / 2
    sums = jnp.where(is_there, sums, HIDDEN)
    out = jnp.where(_as_factor(is_there), out, 0)

    outs, logs = sofar
    before = _part(logs, product.query)
    after = jnp.logaddexp(before, sums)
    kept = _part(outs, product.query) * _as_factor(jnp.exp(before - after))
    both = kept + out * _as_factor(jnp.exp(sums - after))
    return (
        lax.dynamic_update_index_in_dim(outs, both, product.query, 0),
        lax.dynamic_update_index_in_dim(logs, after, product.query, 0),
    )


def _gradients(
    product: Product,
    cut: Cut,
    keys: Any,
    others: Any,
) -> list[Any]:
    """Return the gradients of one product by its queries, keys and values."""
    arrays = (_part(cut.query, product.query), *_of_keys(product, keys))
    more = [_part(x, product.query) for x in others]
    segments = _segments(product, cut, keys)
    gradients = gradient_p.bind(*arrays, *more, *segments, how=product.how)
    if product.seen is None:
        return gradients
    return [jnp.where(product.seen, x, 0) for x in gradients]


def _of_keys(product: Product, keys: Any) -> list[Any]:
    return [_part(x, product.key) for x in keys[:2]]


def _segments(
    product: Product,
    cut: Cut,
    keys: Any,
) -> list[Any]:
    """Return the segments of queries and keys, if there are some."""
    if cut.segments is None:
        return []
    return [_part(cut.segments, product.query), _part(keys[2], product.key)]


def _part(x: jax.Array, number: Any) -> jax.Array:
    return lax.dynamic_index_in_dim(x, number, 0, keepdims=False)


def _added(
    x: jax.Array,
    number: Any,
    more: jax.Array,
) -> jax.Array:
    """Return an array with something added to one of its parts."""
    both = _part(x, number) + more
    return lax.dynamic_update_index_in_dim(x, both, number, 0)


def _as_factor(sums: jax.Array) -> jax.Array:
    """Return (batch, heads, length) as (batch, length, heads, 1)."""
    return sums.transpose(0, 2, 1)[..., None]


# ---- internals: halves ----


def _cut(
    arrays: Sequence[Any],
    segments: Sequence[Any],
    how: How,
    ring: Ring,
) -> Cut:
    """Return a device's arrays in parts, halves exchanged if there are some."""
    batch, length, *_ = arrays[0].shape
    if halved(how) and length % 2:
        own = segments[0] if segments else jnp.zeros((batch, length))
        own = own.astype(jnp.int32)
        segments = [jnp.pad(own, ((0, 0), (0, 1)), constant_values=NOBODY)]
    query, key, value, *others = (_parts(x, 1, how, ring) for x in (*arrays, *segments))
    return Cut(query, key, value, others[0] if others else None)


def _parts(
    x: jax.Array,
    dim: int,
    how: How,
    ring: Ring,
) -> jax.Array:
    """Return an array with its parts as a first dim.

    Args:
      x: the array.
      dim: of the tokens.
      how: the kind of attention.
      ring: the devices.
    """
    if not halved(how):
        return x[None]
    if x.shape[dim] % 2:
        pads = [(0, 0)] * x.ndim
        pads[dim] = (0, 1)
        x = jnp.pad(x, pads)
    first, second = jnp.split(x, 2, dim)
    # Device i has the halves 2i and 2i+1. As one wanders to its place, so do the even
    # ones of all devices, each to another device.
    evens = [(i, _place(2 * i, ring.size)) for i in range(ring.size)]
    odds = [(i, _place(2 * i + 1, ring.size)) for i in range(ring.size)]
    first = lax.ppermute(first, ring.axes, evens)
    second = lax.ppermute(second, ring.axes, odds)
    is_even = lax.axis_index(ring.axes) % 2 == 0
    return jnp.stack(
        [jnp.where(is_even, first, second), jnp.where(is_even, second, first)]
    )


def _together(
    x: jax.Array,
    dim: int,
    local: int,
    how: How,
    ring: Ring,
) -> jax.Array:
    """Undo `_parts`; `dim` counts the first one, `local` are a device's tokens."""
    if not halved(how):
        return x[0]
    is_even = lax.axis_index(ring.axes) % 2 == 0
    first = jnp.where(is_even, x[LOW], x[HIGH])
    second = jnp.where(is_even, x[HIGH], x[LOW])
    evens = [(_place(2 * i, ring.size), i) for i in range(ring.size)]
    odds = [(_place(2 * i + 1, ring.size), i) for i in range(ring.size)]
    first = lax.ppermute(first, ring.axes, evens)
    second = lax.ppermute(second, ring.axes, odds)
    x = jnp.concatenate([first, second], dim - 1)
    return lax.slice_in_dim(x, 0, local, axis=dim - 1)


def _place(half: int, size: int) -> int:
    """Return the device that computes with a half of the sequence.

    >>> [_place(half, 4) for half in range(8)]
    [0, 1, 2, 3, 3, 2, 1, 0]
    """
    return min(half, 2 * size - 1 - half)

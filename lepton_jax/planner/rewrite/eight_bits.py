"""Products of numbers of 8 bits, forward and backward, with scales of the moment.

`product` computes y = x w as `dot_general` does. Its operands, and in the backward pass
the gradient, are divided by a scale and rounded to 8 bits first:

    y  = q(x) q(w)
    dx = q(g) q(w)'
    dw = q(x)' q(g)

  fp8   q(x) and q(w) are e4m3, q(g) is e5m2; one scale an array (Micikevicius et al.
        2022, "FP8 formats for deep learning", arXiv 2209.05433)
  int8  whole numbers from -127 to 127; a scale for each row of x and column of w, over
        what the product sums; q(g) is rounded at random, so that small gradients next
        to a large one are kept in the mean (Gupta et al. 2015, "Deep learning with
        limited numerical precision", arXiv 1502.02551)

A scale is that of the array at hand ("current scaling"): the greatest absolute value
over all devices becomes the greatest number of the format. So a step depends on nothing
but its state and its batch. Histories of maxima ("delayed scaling") would spare one
pass over each array, and be one more thing to keep, resume and distrust.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.3], [100.0, 50.0]])
    >>> w = jnp.array([[1.0], [2.0]])
    >>> rounded = product(x, w, jnp.uint32(0), How("int8", (((1,), (0,)), ((), ()))))
    >>> rounded.round(1).tolist(), (x @ w).tolist()
    ([[1.600...], [201.600...]], [[1.600...], [200.0]])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

# Formats of x and w, and of gradients.
FORMATS = {
    "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2),
    "int8": (jnp.int8, jnp.int8),
}
# Greatest numbers of the formats. Of int8 without -128, so that a number and its
# opposite are alike.
GREATEST = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0, "int8": 127.0}
# Least maximum of an array: below, its inverse scale would exceed float32 for e5m2.
LEAST = 2.0**-100

# What a product's result is called where rematerialization may keep it.
RESULT = "product of 8 bits"

# Multipliers and shifts of the last step of MurmurHash3, 32 bits (Appleby 2011,
# github.com/aappleby/smhasher): each bit of a position changes each bit of the result
# in half of all cases.
MURMUR = ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1))
BITS_OF_NOISE = 24  # as many as float32 holds

Dims = tuple[tuple[Any, Any], tuple[Any, Any]]


class How(NamedTuple):
    """The kind of a product.

    Attributes:
      kind: "fp8" or "int8".
      dims: its `dimension_numbers`.
      computed: dtype to which the numbers of 8 bits are cast for a product on devices
        that can't multiply them; "": they are multiplied as they are.
    """

    kind: str
    dims: Dims
    computed: str = ""


class Quantized(NamedTuple):
    """An array as numbers of 8 bits, times a scale; one for each place that is left."""

    numbers: jax.Array
    scale: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def product(left: jax.Array, right: jax.Array, salt: jax.Array, how: How) -> jax.Array:
    """Return `lax.dot_general(left, right, how.dims)` from numbers of 8 bits.

    Args:
      left, right: of one floating-point dtype, which the result has, too.
      salt: uint32, from which the rounding of int8 gradients is drawn.
      how: the kind of the product.
    """
    return _product(left, right, how.dims, how)


def quantized(
    x: jax.Array,
    form: Any,
    axes: Sequence[int] | None,
    salt: Any = None,
) -> Quantized:
    """Return an array as numbers of 8 bits.

    Args:
      x: of any floating-point dtype.
      form: the dtype of the numbers.
      axes: over which a scale is taken; None: all.
      salt: of rounding at random; None: to the nearest, ties to even.
    """
    axes = tuple(range(x.ndim)) if axes is None else tuple(axes)
    greatest = GREATEST[jnp.dtype(form).name]
    most = jnp.abs(x).max(axes).astype(jnp.float32)
    most = jnp.maximum(most, LEAST)
    factor = lax.broadcast_in_dim(greatest / most, x.shape, _others(x.ndim, axes))
    scaled = x.astype(jnp.float32) * factor
    if form == jnp.int8:
        drawn = salt is not None
        scaled = jnp.floor(scaled + noise(x.shape, salt)) if drawn else scaled.round()
    numbers = jnp.clip(scaled, -greatest, greatest).astype(form)
    return Quantized(numbers, most / greatest)


def noise(shape: Sequence[int], salt: Any) -> jax.Array:
    """Return numbers from 0 to 1, each decided by its position and the salt alone."""
    bits = jnp.full(shape, salt, jnp.uint32)
    stride = 1
    for dim in reversed(range(len(shape))):
        place = lax.broadcasted_iota(jnp.uint32, shape, dim)
        bits = bits + place * jnp.uint32(stride % 2**32)
        stride *= shape[dim]
    for shift, factor in MURMUR:
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    bits = bits >> (32 - BITS_OF_NOISE)
    return bits.astype(jnp.float32) * 2.0**-BITS_OF_NOISE


# ---- internals: the gradient ----


def _forward(left: Any, right: Any, salt: Any, how: How) -> Any:
    return _product(left, right, how.dims, how), (left, right, salt)


def _backward(how: How, kept: Any, cotangent: Any) -> Any:
    left, right, salt = kept
    (of_left, of_right), (batch_left, batch_right) = how.dims
    swapped = (of_right, of_left), (batch_right, batch_left)
    first = len(batch_left)
    rows = left.ndim - len(of_left) - first
    columns = right.ndim - len(of_right) - first
    free_left = range(first, first + rows)
    free_right = range(first + rows, first + rows + columns)
    return (
        _gradient(cotangent, left, right, how.dims, free_right, salt, how),
        _gradient(cotangent, right, left, swapped, free_left, salt + 1, how),
        None,
    )


product.defvjp(_forward, _backward)


def _gradient(
    cotangent: Any,
    own: Any,
    other: Any,
    dims: Dims,
    summed: Sequence[int],
    salt: Any,
    how: How,
) -> jax.Array:
    """Return the gradient by one operand.

    Args:
      cotangent: of the result.
      own: the operand.
      other: the other one.
      dims: of the product, the operand's own first.
      summed: dims of the cotangent that the other operand has and this has not.
      salt: of the rounding.
      how: the kind of the product.
    """
    (contracted, of_other), (batch, batch_other) = dims
    free_other = _others(other.ndim, of_other, batch_other)
    back = (tuple(summed), free_other), (tuple(range(len(batch))), tuple(batch_other))
    result = _product(cotangent, other, back, how, salt)

    # its dims: batch, what only this operand has, what was contracted
    ordered = sorted(range(len(of_other)), key=of_other.__getitem__)
    places = (*batch, *_others(own.ndim, contracted, batch))
    places = (*places, *(contracted[n] for n in ordered))
    order = sorted(range(own.ndim), key=places.__getitem__)
    return lax.transpose(result, order).astype(own.dtype)


def _product(
    left: Any,
    right: Any,
    dims: Dims,
    how: How,
    salt: Any = None,
) -> jax.Array:
    """Return a product of two arrays, the left of which is a gradient if salted."""
    (of_left, of_right), (batch_left, batch_right) = dims
    forward, backward = FORMATS[how.kind]
    form = forward if salt is None else backward
    by_row = how.kind == "int8"
    a = quantized(left, form, of_left if by_row else None, salt)
    b = quantized(right, forward, of_right if by_row else None)

    numbers = [a.numbers, b.numbers]
    sums = jnp.int32 if by_row else left.dtype
    if how.computed:
        numbers = [x.astype(how.computed) for x in numbers]
        sums = jnp.float32
    result = lax.dot_general(*numbers, dims, preferred_element_type=sums)

    batch = tuple(range(len(batch_left)))
    middle = left.ndim - len(of_left)
    rows = (*batch, *range(len(batch), middle))
    columns = (*batch, *range(middle, result.ndim))
    result = result.astype(jnp.float32)
    result *= _scale(a.scale, left.ndim, of_left, batch_left, result.shape, rows)
    result *= _scale(b.scale, right.ndim, of_right, batch_right, result.shape, columns)
    result = result.astype(left.dtype)
    is_projection = salt is None and not batch_left
    return checkpoint_name(result, RESULT) if is_projection else result


def _scale(
    scale: jax.Array,
    count: int,
    contracted: Sequence[int],
    batch: Sequence[int],
    shape: Sequence[int],
    places: Sequence[int],
) -> jax.Array:
    """Return an operand's scale for each number of a result.

    Args:
      scale: of the operand: one, or one for each place of the dims it has left.
      count: dims of the operand.
      contracted: those that are summed.
      batch: those that come first in the result.
      shape: of the result.
      places: dims of the result that the operand has.
    """
    if not scale.shape:
        return scale
    left = _others(count, contracted)
    order = [left.index(dim) for dim in (*batch, *_others(count, contracted, batch))]
    if order != sorted(order):
        scale = lax.transpose(scale, order)
    return lax.broadcast_in_dim(scale, shape, places)


def _others(count: int, *excluded: Sequence[int]) -> tuple[int, ...]:
    """Return the dims of an array that are in none of some groups of dims."""
    taken = {dim for dims in excluded for dim in dims}
    return tuple(dim for dim in range(count) if dim not in taken)

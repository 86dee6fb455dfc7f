"""Products of numbers of 8 bits, forward and backward, with scales of the moment.

`product` computes y = x w as `dot_general` does. Its operands, and in the backward pass
the gradient g, are divided by a scale and rounded to 8 bits first, to the nearest:

          y          dx          dw
    fp8   q(x) q(w)  q(g) q(w)'  q(x)' q(g)
    int8  q(x) q(w)  q(g) q(w)'  x' g

  fp8   q(x) and q(w) are e4m3, q(g) is e5m2; one scale an array (Micikevicius et al.
        2022, "FP8 formats for deep learning", arXiv 2209.05433)
  int8  whole numbers from -127 to 127; a scale for each row of x and g, and each column
        of w, over what the product sums. The gradient of the kernel sums over all
        tokens: it stays in the model's dtype (Wortsman et al. 2023, "Stable and
        low-precision training for large-scale vision-language models", SwitchBack,
        arXiv 2304.13013), for there rounding costs most, and from 133,000 tokens on the
        sum would not fit into int32

A scale is that of the array at hand ("current scaling"): the greatest absolute value
over all devices becomes the greatest number of the format. So a step depends on nothing
but its state and its batch. Histories of maxima ("delayed scaling") would spare one
pass over each array, and be one more thing to keep, resume and distrust.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0, 0.3], [100.0, 50.0]])
    >>> w = jnp.array([[1.0], [2.0]])
    >>> rounded = product(x, w, How("int8", (((1,), (0,)), ((), ()))))
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

# What the results of products are called: rematerialization may keep the first, and all
# are written at the end of a product, scaled already.
RESULT = "product of 8 bits"
GRADIENT = "gradient of a product of 8 bits"

Dims = tuple[tuple[Any, Any], tuple[Any, Any]]


class How(NamedTuple):
    """The kind of a product.

    Attributes:
      kind: "fp8" or "int8".
      dims: its `dimension_numbers`.
      computed: dtype to which the numbers of 8 bits are cast for a product on devices
        that can't multiply them; "": they are multiplied as they are.
      kernel: the number of the operand that is a kernel.
    """

    kind: str
    dims: Dims
    computed: str = ""
    kernel: int = 1


class Quantized(NamedTuple):
    """An array as numbers of 8 bits, times a scale; one for each place that is left."""

    numbers: jax.Array
    scale: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(left: jax.Array, right: jax.Array, how: How) -> jax.Array:
    """Return `lax.dot_general(left, right, how.dims)` from numbers of 8 bits.

    Args:
      left: of a floating-point dtype, which the result has, too.
      right: likewise.
      how: the kind of the product.
    """
    return _product(left, right, how.dims, how)


def quantized(
    x: jax.Array,
    form: Any,
    axes: Sequence[int] | None,
) -> Quantized:
    """Return an array as numbers of 8 bits.

    Args:
      x: of any floating-point dtype.
      form: the dtype of the numbers.
      axes: over which a scale is taken; None: all.
    """
    # Where the array is a stored kernel, this is where it is gathered, once for all
    # that follows. XLA drops the factor.
    x = x * jnp.ones((), x.dtype)
    axes = tuple(range(x.ndim)) if axes is None else tuple(axes)
    greatest = GREATEST[jnp.dtype(form).name]
    most = jnp.abs(x).max(axes).astype(jnp.float32)
    most = jnp.maximum(most, LEAST)
    factor = lax.broadcast_in_dim(greatest / most, x.shape, _others(x.ndim, axes))
    scaled = x.astype(jnp.float32) * factor
    if form == jnp.int8:
        scaled = scaled.round()
    numbers = jnp.clip(scaled, -greatest, greatest).astype(form)
    return Quantized(numbers, most / greatest)


# ---- internals: the gradient ----


def _forward(left: Any, right: Any, how: How) -> Any:
    return _product(left, right, how.dims, how), (left, right)


def _backward(how: How, kept: Any, cotangent: Any) -> Any:
    left, right = kept
    (of_left, of_right), (batch_left, batch_right) = how.dims
    swapped = (of_right, of_left), (batch_right, batch_left)
    first = len(batch_left)
    middle = left.ndim - len(of_left)
    rows = range(first, middle)
    columns = range(middle, cotangent.ndim)
    return (
        _gradient(cotangent, left, right, how.dims, columns, how, how.kernel == 0),
        _gradient(cotangent, right, left, swapped, rows, how, how.kernel == 1),
    )


product.defvjp(_forward, _backward)


def _gradient(
    cotangent: Any,
    own: Any,
    other: Any,
    dims: Dims,
    summed: Sequence[int],
    how: How,
    is_kernel: bool,
) -> jax.Array:
    """Return the gradient by one operand.

    Args:
      cotangent: of the result.
      own: the operand.
      other: the other one.
      dims: of the product, the operand's own first.
      summed: dims of the cotangent that the other operand has and this has not.
      how: the kind of the product.
      is_kernel: whether the operand is the kernel.
    """
    (contracted, of_other), (batch, batch_other) = dims
    free_other = _others(other.ndim, of_other, batch_other)
    back = (tuple(summed), free_other), (tuple(range(len(batch))), tuple(batch_other))
    if is_kernel and how.kind == "int8":
        result = lax.dot_general(cotangent, other, back)
    else:
        result = _product(cotangent, other, back, how, backward=True)

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
    backward: bool = False,
) -> jax.Array:
    """Return a product of two arrays; backward, the left one is a gradient."""
    (of_left, of_right), (batch_left, batch_right) = dims
    form, of_gradients = FORMATS[how.kind]
    by_row = how.kind == "int8"
    a = quantized(left, of_gradients if backward else form, of_left if by_row else None)
    b = quantized(right, form, of_right if by_row else None)

    numbers_a = a.numbers
    numbers_b = b.numbers
    sums: Any = jnp.int32 if by_row else left.dtype
    if how.computed:
        numbers_a = numbers_a.astype(how.computed)
        numbers_b = numbers_b.astype(how.computed)
        sums = jnp.float32
    result = lax.dot_general(numbers_a, numbers_b, dims, preferred_element_type=sums)

    batch = tuple(range(len(batch_left)))
    middle = left.ndim - len(of_left)
    rows = (*batch, *range(len(batch), middle))
    columns = (*batch, *range(middle, result.ndim))
    result = result.astype(jnp.float32)
    result *= _scale(a.scale, left.ndim, of_left, batch_left, result.shape, rows)
    result *= _scale(b.scale, right.ndim, of_right, batch_right, result.shape, columns)
    result = result.astype(left.dtype)
    return checkpoint_name(result, GRADIENT if backward else RESULT)


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

"""Operations in the words of others, for converters that lack or misread them.

Each rule takes an operation's operands and parameters, and returns its results, or None
where the operation is fine as it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Rule = Callable[[list[Any], Mapping[str, Any]], list[Any] | None]


def argmax(
    operands: list[Any],
    params: Mapping[str, Any],
) -> list[Any]:
    """Return the first position of the largest value, as `lax.argmax` does.

    XLA's own is a reduction of pairs, which the converter of TensorFlow 2.21 refuses.
    NaN counts as the largest.
    """
    (values,) = operands
    (axis,) = params["axes"]
    most = jnp.max(
        values,
        axis=axis,
        keepdims=True,
    )
    is_most = (values == most) | (values != values)
    size = values.shape[axis]
    positions = jax.lax.broadcasted_iota(
        jnp.int32,
        values.shape,
        axis,
    )
    first = jnp.min(
        jnp.where(is_most, positions, size),
        axis=axis,
    )
    return [first.astype(params["index_dtype"])]


def window_max(
    operands: list[Any],
    params: Mapping[str, Any],
) -> list[Any]:
    """Return the largest value of each window (max pooling)."""
    (values,) = operands
    least = -jnp.inf
    if not jnp.issubdtype(
        values.dtype,
        jnp.floating,
    ):
        least = jnp.iinfo(values.dtype).min
    return [
        _windows(
            values,
            params,
            least,
            jnp.maximum,
        )
    ]


def window_sum(
    operands: list[Any],
    params: Mapping[str, Any],
) -> list[Any]:
    """Return the sum of each window (average pooling divides it)."""
    return [
        _windows(
            operands[0],
            params,
            0,
            jnp.add,
        )
    ]


def select(
    operands: list[Any],
    params: Mapping[str, Any],
) -> list[Any] | None:
    """Choose between two arrays of truth values, or of unsigned integers.

    ONNX Runtime 1.32 has no `Where` for these types.
    """
    which, *cases = operands
    if len(cases) != 2:
        return None
    off, on = cases
    if off.dtype == jnp.bool_:
        return [(which & on) | (~which & off)]
    if off.dtype not in (jnp.uint16, jnp.uint32):
        return None
    chosen = jnp.where(
        which,
        on.astype(jnp.int32),
        off.astype(jnp.int32),
    )
    return [chosen.astype(off.dtype)]


def comparison(name: str) -> Rule:
    """Return the rule that compares unsigned integers as signed ones.

    TensorFlow Lite 2.21 compares no unsigned integers of 16 or 32 bits. Those of a
    model are numbers of rows in a table, far below 2^31.

    Args:
      name: of the operation: "lt", "le", "gt" or "ge".
    """

    def compare(
        operands: list[Any],
        params: Mapping[str, Any],
    ) -> list[Any] | None:
        left, right = operands
        if left.dtype not in (jnp.uint16, jnp.uint32):
            return None
        signed = [operand.astype(jnp.int32) for operand in (left, right)]
        return [COMPARISONS[name](*signed)]

    return compare


COMPARISONS = {
    "lt": jax.lax.lt,
    "le": jax.lax.le,
    "gt": jax.lax.gt,
    "ge": jax.lax.ge,
}


def batched_product(
    operands: list[Any],
    params: Mapping[str, Any],
) -> list[Any] | None:
    """Multiply a vector with a matrix for each row: as products that are summed up.

    IREE 3.13 gives wrong numbers for such a product of what was just looked up in a
    table: 53 for 0 in `einsum("bn,bnc->bc", present, jnp.take(table, ids, axis=0))`.
    """
    left, right = operands
    (left_sum, right_sum), (left_batch, right_batch) = params["dimension_numbers"]
    if not left_batch:
        return None
    left_free = _others(left, left_sum, left_batch)
    right_free = _others(right, right_sum, right_batch)
    if left_free and right_free:
        return None
    left = jnp.transpose(
        left,
        (*left_batch, *left_free, *left_sum),
    )
    right = jnp.transpose(
        right,
        (*right_batch, *right_free, *right_sum),
    )
    count = len(left_batch)
    left = jnp.expand_dims(
        left,
        range(count, count + len(right_free)),
    )
    right = jnp.expand_dims(
        right,
        range(count, count + len(left_free)),
    )
    summed = range(-len(left_sum), 0)
    product = jnp.sum(
        left * right,
        axis=tuple(summed),
    )
    kind = params["preferred_element_type"] or product.dtype
    return [product.astype(kind)]


# jax2onnx 0.17.1 makes of a window over (batch, height, width, channels) a MaxPool of
# four dims, and ONNX Runtime has them up to three.
POOLING: dict[str, Rule] = {
    "reduce_window_max": window_max,
    "reduce_window_sum": window_sum,
}
FOR_ONNX: dict[str, Rule] = {**POOLING, "select_n": select}
FOR_LITERT: dict[str, Rule] = {
    "argmax": argmax,
    **{name: comparison(name) for name in COMPARISONS},
}
FOR_IREE: dict[str, Rule] = {"dot_general": batched_product}


# ---- internals ----


def _others(values: Any, *taken: Any) -> tuple[int, ...]:
    """Return the dims of an array that are in none of some groups."""
    used = {dim for dims in taken for dim in dims}
    return tuple(dim for dim in range(values.ndim) if dim not in used)


def _windows(
    values: Any,
    params: Mapping[str, Any],
    filling: Any,
    join: Callable[[Any, Any], Any],
) -> Any:
    """Join the values of each window, a shifted copy for each place in it.

    A window of 2 by 2 with strides of 2 joins four copies of a quarter each.
    """
    padding = params["padding"]
    if any(low or high for low, high in padding):
        filling = jnp.asarray(filling, values.dtype)
        values = jax.lax.pad(
            values,
            filling,
            [(*pair, 0) for pair in padding],
        )
    window = params["window_dimensions"]
    dilation = params["window_dilation"]
    joined = None
    for place in itertools.product(
        *map(
            range,
            window,
        )
    ):
        part = values
        for dim, (number, size) in enumerate(
            zip(
                place,
                window,
                strict=True,
            )
        ):
            stride = params["window_strides"][dim]
            if size == 1 and stride == 1:
                continue  # such as the batch, whose extent may be symbolic
            start = number * dilation[dim]
            reach = (size - 1) * dilation[dim]
            end = values.shape[dim] - reach + start
            part = jax.lax.slice_in_dim(
                part,
                start,
                end,
                stride,
                dim,
            )
        joined = part if joined is None else join(joined, part)
    return joined

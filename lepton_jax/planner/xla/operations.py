"""The primitives that XLA fuses, and small questions about one operation."""

from __future__ import annotations

import math
from collections.abc import Set
from typing import TypeGuard

from lepton_jax.planner.program.graph import BARRIER, Operation, Value
from lepton_jax.planner.program.layout import itemsize
from lepton_jax.planner.program.rules import ELEMENTWISE
from lepton_jax.planner.xla.figures import LANES, SUBLANES

# Results are their operand's bytes under another name.
ALIASES = {
    "reshape",
    "squeeze",
    "expand_dims",
    BARRIER,
    "layout_constraint",
    "name",
    "copy",
    "copy_p",
    "stop_gradient",
    "sharding_constraint",
    "bitcast_convert_type",
    "random_wrap",
    "random_unwrap",
}

# Results need no memory: each reader computes them from nothing.
FREE = {"iota", "empty", "create_token", "axis_index"}

# Two equal ones are not merged into one.
UNMERGED = ALIASES | FREE | {"random_bits"}

# Each element of the result is computed alone, so they fuse into one loop.
LOOPED = {
    *ELEMENTWISE,
    "broadcast_in_dim",
    "concatenate",
    "dynamic_slice",
    "pad",
    "rev",
    "slice",
    "split",
    "transpose",
} - ALIASES

REDUCED = {
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "argmax",
    "argmin",
}

# Their operands may be computed inside their own kernel.
FUSES = LOOPED | REDUCED | ALIASES

DOTS = {"dot_general", "conv_general_dilated"}
SCATTERS = {"scatter-add", "scatter_add"}
ROWWISE = {"gather", "scatter", *SCATTERS}

# XLA computes these once where several readers, or a broadcast, would have them
# computed several times (cf. `IsExpensive` in `xla/service/instruction_fusion.cc`).
COSTLY = {
    "acos",
    "asin",
    "atan",
    "atan2",
    "cbrt",
    "cos",
    "cosh",
    "digamma",
    "div",
    "erf",
    "erf_inv",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "lgamma",
    "log",
    "log1p",
    "logistic",
    "pow",
    "random_bits",
    "rem",
    "rsqrt",
    "sin",
    "sinh",
    "sqrt",
    "tan",
    "tanh",
    "threefry2x32",
}


def operands(op: Operation) -> list[Value]:
    """Return the inputs of an operation that are values, and no literals."""
    return [value for value in op.inputs if value is not None]


def is_one_of(user: Operation | None, names: Set[str]) -> TypeGuard[Operation]:
    """Whether a reader is an operation of one of these names, and not the caller."""
    return user is not None and user.name in names


def size(value: Value) -> int:
    """Return the bytes of a whole value, before it is split over devices."""
    return math.prod(value.shape) * itemsize(value)


def sparse(op: Operation) -> bool:
    """Whether a lookup or a scatter moves fewer numbers than its table has.

    Then XLA moves the rows over the network, and not the table.
    """
    if op.name in SCATTERS and op.inputs[2] is not None:
        return _numbers(op.inputs[2]) < _numbers(op.outputs[0])

    if op.name == "gather" and op.inputs[0] is not None:
        return _numbers(op.outputs[0]) < _numbers(op.inputs[0])
    return False


def _numbers(value: Value) -> int:
    return math.prod(value.shape)


def large_inputs(
    inputs: list[Value],
    target: Value,
) -> list[Value]:
    """Return the inputs of at least the result's rank, dims of one left out.

    XLA's fusion guesses by rank which operands are small next to the result.
    """
    rank = _wide_dims(target)
    return [value for value in inputs if _wide_dims(value) >= rank]


def _wide_dims(value: Value) -> int:
    return sum(extent > 1 for extent in value.shape)


def convolves(op: Operation) -> bool:
    """Whether a matmul is compiled as a convolution along one of its kernel's dims.

    That is so where the kernel has several free dims. The operand is then written in
    the layout that the convolution needs.
    """
    if op.name != "dot_general" or op.inputs[1] is None:
        return False
    kernel = op.inputs[1]
    if kernel.stored is None:
        return False
    (_, contracted), (_, batch) = op.params["dimension_numbers"]
    return len(kernel.shape) - len(contracted) - len(batch) > 1


def rounds_operands(op: Operation | None) -> bool:
    """Whether an operation is a product that rounds its operands to bfloat16."""
    if op is None or op.name not in DOTS:
        return False
    return op.params.get("precision") is None


def strides(op: Operation | None) -> bool:
    """Whether an operation takes every n-th number, or puts them that far apart."""
    if op is None:
        return False
    if op.name == "slice":
        return any(stride > 1 for stride in op.params["strides"] or ())
    if op.name == "pad":
        return any(interior > 0 for _, _, interior in op.params["padding_config"])
    return False


def has_narrow_rows(op: Operation, value: Value) -> bool:
    """Whether an operation moves rows that don't fill whole registers.

    Only rows of a parameter, or of its gradient, count. Rows of up to `SUBLANES`
    numbers, and those of another dtype than the state's, are moved as they lie (libtpu
    of jax 0.10, v5e, v5p and v6e).
    """
    if op.name not in ROWWISE or value.stored is None or len(value.shape) < 2:
        return False
    width = value.shape[-1]
    is_narrow = width > SUBLANES and width % LANES > 0
    return is_narrow and str(value.dtype) == "float32"

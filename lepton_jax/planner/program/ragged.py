"""Grouped products (`jax.lax.ragged_dot`): what the planner knows of them.

Rows that are sorted by group meet the kernel of their group: (rows, k), (groups, k, n)
-> (rows, n). The gradient of the kernels sums over the rows of each group: (rows, k),
(rows, n) -> (groups, k, n). The rows and the groups are whole, since a device does not
know to which groups the rows of a part belong; k and n are as in a plain product.

What it computes depends on the backend (libtpu 0.0.42 and XLA of jax 0.10 and 0.12,
`jax.jit(...).lower(...).compile().as_text()`): TPUs have a kernel that multiplies each
row once; their gradient of the kernels, and all of them on CPUs, are dense products
over all rows for each group, of masked rows.
"""

from __future__ import annotations

import math
from typing import Any

RAGGED = "ragged_dot_general"


def join_ragged(graph: Any, op: Any) -> None:
    """Join the dims of a grouped product."""
    left, right, sizes = op.inputs[:3]
    if left is None or right is None:
        return
    if sizes is not None:
        op.whole += [(2, dim) for dim in range(len(sizes.shape))]
    numbers = op.params["ragged_dot_dimension_numbers"]
    (over_left, over_right), (batch_left, batch_right) = numbers.dot_dimension_numbers
    ragged = set(numbers.lhs_ragged_dimensions)
    groups = set(numbers.rhs_group_dimensions)
    op.whole += [(0, dim) for dim in ragged]
    op.whole += [(1, dim) for dim in groups]
    pairs = zip((*over_left, *batch_left), (*over_right, *batch_right), strict=True)
    for a, b in pairs:
        graph.join(left.nodes[a], right.nodes[b])
        if a in ragged:
            op.whole.append((1, b))
    if not ragged & set(over_left):
        op.reduced += [(0, dim) for dim in over_left]

    made = list(op.outputs[0].nodes)
    if not groups:  # the gradient of the kernels has a dim of groups, the first one
        made = made[1:]
    free = [left.nodes[d] for d in batch_left]
    free += _free(left, (*over_left, *batch_left))
    free += _free(right, (*over_right, *batch_right, *groups))
    for a, b in zip(free, made, strict=True):
        graph.join(a, b)


def ragged_flops(eqn: Any, dense: bool = False) -> float:
    """Return the FLOP of a grouped product, on whole arrays.

    Args:
      eqn: the equation.
      dense: whether each group multiplies all rows.
    """
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (over, _), _ = numbers.dot_dimension_numbers
    left = eqn.invars[0].aval.shape
    out = eqn.outvars[0].aval.shape
    groups = eqn.invars[2].aval.shape[-1]
    products = 2.0 * math.prod(out) * math.prod(left[dim] for dim in over)
    if not numbers.rhs_group_dimensions:  # a row counts for one of the groups
        products /= groups
    return products * groups if dense else products


def is_dense(eqn: Any, platform: str) -> bool:
    """Whether a backend multiplies all rows for each group."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    return platform != "tpu" or not numbers.rhs_group_dimensions


def _free(value: Any, taken: tuple[int, ...]) -> list[int]:
    return [node for dim, node in enumerate(value.nodes) if dim not in taken]

"""Operations that are kernels of their own: what the planner knows of them.

Attention is one operation forward and one backward (see `rewrite.attention`):

    fused_attention            query, key, value                    -> out, sums
    fused_attention_gradient   query, key, value, out, sums, d out  -> d query, ...

Arrays are (batch, length, heads, width), sums (batch, heads, length). A device computes
the samples and the heads that it has, each over its whole length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lepton_jax.planner.rewrite.attention import ATTENTION, ATTENTION_GRADIENT

KERNELS = (ATTENTION, ATTENTION_GRADIENT)

BATCH, LENGTH, HEADS, WIDTH = range(4)

# Products of a block of queries and keys: scores and result; and backward the scores,
# the slope of the shares, and the gradients of query, key and value. Splash attention
# computes the first two of the latter in both of its backward kernels.
FORWARD_PRODUCTS = 2
BACKWARD_PRODUCTS = 5
SPLASH_BACKWARD_PRODUCTS = 7


def join_attention(graph: Any, op: Any) -> None:
    """Join samples and heads of a kernel's arrays; length and width are whole."""
    first = op.inputs[0]
    for number, value in enumerate(op.inputs):
        dims = (
            (LENGTH, WIDTH) if len(value.shape) > WIDTH else (length_dim(value.shape),)
        )
        op.whole += [(number, dim) for dim in dims]
    for value in (*op.inputs, *op.outputs):
        shape = value.shape
        graph.join(value.nodes[BATCH], first.nodes[BATCH])
        graph.join(value.nodes[heads_dim(shape)], first.nodes[HEADS])
        length = length_dim(shape)
        if shape[length] == first.shape[LENGTH]:
            graph.join(value.nodes[length], first.nodes[LENGTH])
        if len(shape) > WIDTH:
            graph.join(value.nodes[WIDTH], first.nodes[WIDTH])


def heads_dim(shape: Sequence[int]) -> int:
    """Return the dim of the heads of one of a kernel's arrays."""
    return HEADS if len(shape) > WIDTH else 1


def length_dim(shape: Sequence[int]) -> int:
    """Return the dim of the length of one of a kernel's arrays."""
    return LENGTH if len(shape) > WIDTH else 2


def attention_flops(op: Any) -> float:
    """Return the FLOP of a kernel on whole arrays, as it computes them."""
    query, key = (value.shape for value in op.inputs[:2])
    how = op.params["how"]
    products = FORWARD_PRODUCTS
    if op.name == ATTENTION_GRADIENT:
        is_splash = how.kernel.startswith("splash")
        products = SPLASH_BACKWARD_PRODUCTS if is_splash else BACKWARD_PRODUCTS
    one = 2.0 * math.prod(query) * key[LENGTH]
    return products * one * seen_share(query[LENGTH], key[LENGTH], how)


def seen_share(queries: int, keys: int, how: Any) -> float:
    """Return the share of a score's blocks that a kernel computes."""
    if not how.causal:
        return 1.0
    rows = how.rows(queries)
    seen = sum(
        min(start + rows, queries) * min(rows, queries - start)
        for start in range(0, queries, rows)
    )
    return min(1.0, seen / (queries * keys))

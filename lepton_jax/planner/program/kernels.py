"""Operations that are kernels of their own: what the planner knows of them.

Attention is one operation forward and one backward (see `rewrite.attention`):

    fused_attention            query, key, value                    -> out, sums
    fused_attention_gradient   query, key, value, out, sums, d out  -> d query, ...

Arrays are (batch, length, heads, width), sums (batch, heads, length); where there are
segments, (batch, length), they are the last operand. A device computes the samples and
the heads that it has, each over its whole length.
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
        op.whole.append((number, length_dim(value.shape)))
        if len(value.shape) > WIDTH:
            op.whole.append((number, WIDTH))
    for value in (*op.inputs, *op.outputs):
        shape = value.shape
        graph.join(value.nodes[BATCH], first.nodes[BATCH])
        heads = heads_dim(shape)
        if heads is not None:
            graph.join(value.nodes[heads], first.nodes[HEADS])
        length = length_dim(shape)
        if shape[length] == first.shape[LENGTH]:
            graph.join(value.nodes[length], first.nodes[LENGTH])
        if len(shape) > WIDTH:
            graph.join(value.nodes[WIDTH], first.nodes[WIDTH])


def heads_dim(shape: Sequence[int]) -> int | None:
    """Return the dim of the heads of one of a kernel's arrays; segments have none."""
    return {4: HEADS, 3: 1}.get(len(shape))


def length_dim(shape: Sequence[int]) -> int:
    """Return the dim of the length of one of a kernel's arrays."""
    return 2 if len(shape) == WIDTH else LENGTH


def split(
    shape: Sequence[int],
    samples: int,
    heads: int,
) -> tuple[int, ...]:
    """Return the spec of a kernel's array whose samples and heads are split."""
    spec = [0] * len(shape)
    spec[BATCH] = samples
    place = heads_dim(shape)
    if place is not None:
        spec[place] = heads
    return tuple(spec)


def attention_flops(op: Any) -> float:
    """Return the FLOP of a kernel on whole arrays, as it computes them."""
    query, key = (value.shape for value in op.inputs[:2])
    return kernel_flops(op.name, query, key, op.params["how"])


def kernel_flops(
    name: str,
    query: Sequence[int],
    key: Sequence[int],
    how: Any,
) -> float:
    """Return the FLOP of a kernel on arrays of some shapes.

    Args:
      name: of the operation.
      query: shape.
      key: shape.
      how: the kind of attention.
    """
    products = FORWARD_PRODUCTS
    if name == ATTENTION_GRADIENT:
        is_splash = how.kernel.startswith("splash")
        products = SPLASH_BACKWARD_PRODUCTS if is_splash else BACKWARD_PRODUCTS
    one = 2.0 * math.prod(query) * key[LENGTH]
    return products * one * seen_share(query[LENGTH], key[LENGTH], how)


def seen_share(queries: int, keys: int, how: Any) -> float:
    """Return the share of all scores that a kernel computes."""
    seen = 0
    for block in how.blocks(queries, keys):
        seen += (block.stop - block.start) * (block.last - block.first)
    return min(1.0, seen / (queries * keys))

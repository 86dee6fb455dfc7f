"""Attention that never holds its scores, as two operations.

`attend` computes softmax(scale q k') v. The scores of all queries and keys are (batch,
heads, length, length); here a block of queries meets the keys that it sees, and the
backward pass computes the block's scores again, from what the forward pass keeps: the
result, and the logarithm of each query's sum (Dao et al. 2022, "FlashAttention",
algorithm 1 and appendix B.4). Queries that see no key beyond their own position skip
the blocks above the diagonal.

The planner sees one operation forward and one backward. What runs is a *kernel*:

  blocks    products and a softmax of one block after the other, on any backend
  splash    the kernel of JAX for TPUs (`splash`)

    >>> import jax, jax.numpy as jnp
    >>> q = k = v = jnp.ones((1, 6, 2, 4))
    >>> how = How(causal=True, scale=0.5, kernel="blocks")
    >>> attend(q, k, v, how).shape
    (1, 6, 2, 4)
    >>> program = jax.make_jaxpr(jax.grad(lambda q: attend(q, k, v, how).sum()))(q)
    >>> names = [eqn.primitive.name for eqn in program.eqns]
    >>> [name for name in names if "attention" in name]
    ['fused_attention', 'fused_attention_gradient']
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from lepton_jax.planner.rewrite import splash

# the two operations
ATTENTION = "fused_attention"
ATTENTION_GRADIENT = "fused_attention_gradient"

# operands of the gradient, segments apart
OPERANDS = 6

# Queries of a block. Of the time of plain attention, the 10M model with three layers
# takes with blocks of 64, 128 and 256 queries: 0.89, 0.91, 1 (256 tokens); 0.91, 0.91,
# 0.96 (512); of 128, 256 and 512: 0.74, 0.80, 0.86 (1,024). One core, AMD EPYC, seen
# once while `tools/attention.py` was written.
BLOCK_ROWS = 128
# Blocks at most: each is code of its own. Assumption.
MOST_BLOCKS = 32

HIDDEN = -1e30  # a score that counts for nothing


class Block(NamedTuple):
    """Queries from `start` to `stop`, which see keys from `first` to `last`."""

    start: int
    stop: int
    first: int
    last: int


class How(NamedTuple):
    """The kind of attention, and the kernel that computes it.

    Attributes:
      causal: whether a query sees the keys up to its own position only.
      scale: factor of the scores.
      kernel: "blocks", "splash", or "splash-interpreted", which runs on any backend.
      behind: if causal, how far behind its own position a query sees; None: to the
        first key.
      cap: c in c * tanh(score / c), which is applied to scaled scores before masks;
        None: there is no cap (Gemma 2, Riviere et al. 2024, section 2).
      ahead: positions by which the first query lies after the first key (a part of a
        sequence meets an earlier one).
    """

    causal: bool
    scale: float
    kernel: str
    behind: int | None = None
    cap: float | None = None
    ahead: int = 0

    def rows(self, queries: int) -> int:
        """Return the queries of a block."""
        if self.kernel != "blocks":
            return splash.block(splash.padded(queries))
        return max(BLOCK_ROWS, -(-queries // MOST_BLOCKS))

    def blocks(self, queries: int, keys: int) -> Iterator[Block]:
        """Iterate over the blocks of some queries.

        >>> how = How(causal=True, scale=1.0, kernel="blocks", behind=100)
        >>> [tuple(block) for block in how.blocks(300, 300)]
        [(0, 128, 0, 128), (128, 256, 28, 256), (256, 300, 156, 300)]
        """
        rows = self.rows(queries)
        for start in range(0, queries, rows):
            stop = min(start + rows, queries)
            if not self.causal:
                yield Block(start, stop, 0, keys)
                continue
            first = 0
            if self.behind is not None:
                first = max(0, start + self.ahead - self.behind)
            last = min(stop + self.ahead, keys)
            yield Block(start, stop, min(first, last - 1), last)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    how: How,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Return attention, like `jax.nn.dot_product_attention`.

    Args:
      query: (batch, length, heads, width).
      key: (batch, keys, key heads, width); a key head serves a group of query heads.
      value: likewise.
      how: the kind of attention.
      segments: whole numbers (batch, length): a query sees keys of its own segment
        only. None: all tokens are of one.

    Returns:
      An array of the query's shape and dtype.
    """
    more = [] if segments is None else [segments]
    return attention_p.bind(query, key, value, *more, how=how)[0]


# ---- internals: the gradient ----


def _forward(query: Any, key: Any, value: Any, how: How, segments: Any = None) -> Any:
    more = [] if segments is None else [segments]
    out, sums = attention_p.bind(query, key, value, *more, how=how)
    return out, ((query, key, value, out, sums), more)


def _backward(how: How, kept: Any, cotangent: Any) -> Any:
    arrays, more = kept
    return (*gradient_p.bind(*arrays, cotangent, *more, how=how), None)


attend.defvjp(_forward, _backward)


# ---- internals: blocks ----


def _by_key_head(x: jax.Array, key_heads: int) -> jax.Array:
    """Return (batch, key heads, group, length, width)."""
    batch, length, heads, width = x.shape
    x = x.reshape(batch, length, key_heads, heads // key_heads, width)
    return x.transpose(0, 2, 3, 1, 4)


def _by_length(x: jax.Array) -> jax.Array:
    """Return (batch, length, heads, width): undo `_by_key_head`."""
    batch, key_heads, group, length, width = x.shape
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, key_heads * group, width)


def _product(left: jax.Array, right: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Multiply matrices head by head, with sums in float32."""
    return lax.dot_general(
        left,
        right,
        (((over[0],), (over[1],)), ((0, 1), (0, 1))),
        preferred_element_type=jnp.promote_types(left.dtype, jnp.float32),
    )


def _rows(x: jax.Array, block: Block) -> jax.Array:
    """Return a block's queries, group by group: (batch, key heads, rows, ...)."""
    x = x[:, :, :, block.start : block.stop]
    batch, heads, group, rows, *rest = x.shape
    return x.reshape(batch, heads, group * rows, *rest)


def _grouped(x: jax.Array, block: Block) -> jax.Array:
    """Undo the reshape of `_rows`."""
    batch, heads, _, *rest = x.shape
    return x.reshape(batch, heads, -1, block.stop - block.start, *rest)


def _scores(
    query: jax.Array,
    key: jax.Array,
    block: Block,
    how: How,
    segments: Any,
) -> jax.Array:
    """Return a block's scores, (batch, key heads, rows, keys), low where not seen."""
    scores = how.scale * _product(query, key, (3, 3))
    if how.cap is not None:
        scores = how.cap * jnp.tanh(scores / how.cap)
    rows = block.stop - block.start
    shape = scores.shape[2:]
    if how.causal:
        own = lax.broadcasted_iota(jnp.int32, shape, 0) % rows
        own += block.start + how.ahead
        position = lax.broadcasted_iota(jnp.int32, shape, 1) + block.first
        seen = own >= position
        if how.behind is not None:
            seen &= own - position <= how.behind
        scores = jnp.where(seen, scores, HIDDEN)
    if segments is not None:
        mine = segments[0][:, block.start : block.stop]
        mine = jnp.tile(mine, (1, shape[0] // rows))
        theirs = segments[1][:, block.first : block.last]
        same = mine[:, None, :, None] == theirs[:, None, None, :]
        scores = jnp.where(same, scores, HIDDEN)
    return scores


def _in_blocks(
    query: Any,
    key: Any,
    value: Any,
    segments: Any,
    how: How,
) -> list[jax.Array]:
    """Return attention and the logarithms of its sums, (batch, heads, length)."""
    batch, length, heads, _ = query.shape
    key_heads = key.shape[2]
    grouped = _by_key_head(query, key_heads)
    keys = key.transpose(0, 2, 1, 3)
    values = value.transpose(0, 2, 1, 3)
    outs = []
    sums = []
    for block in how.blocks(length, key.shape[1]):
        seen = slice(block.first, block.last)
        own = _rows(grouped, block)
        scores = _scores(own, keys[:, :, seen], block, how, segments)
        highest = scores.max(-1, keepdims=True)
        shares = jnp.exp(scores - highest)
        total = shares.sum(-1, keepdims=True)
        shares = (shares / total).astype(value.dtype)
        out = _product(shares, values[:, :, seen], (3, 2))
        outs.append(_grouped(out.astype(query.dtype), block))
        sums.append(_grouped((highest + jnp.log(total))[..., 0], block))
    out = _by_length(jnp.concatenate(outs, 3))
    return [out, jnp.concatenate(sums, 3).reshape(batch, heads, length)]


def _gradient_in_blocks(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    sums: Any,
    cotangent: Any,
    segments: Any,
    how: How,
) -> list[jax.Array]:
    """Return the gradients by query, key and value."""
    batch, length, heads, _ = query.shape
    key_heads = key.shape[2]
    keys = key.transpose(0, 2, 1, 3)
    values = value.transpose(0, 2, 1, 3)
    wide = jnp.promote_types(query.dtype, jnp.float32)
    inner = (out.astype(wide) * cotangent.astype(wide)).sum(-1).transpose(0, 2, 1)
    shape = (batch, key_heads, heads // key_heads, length)
    arrays = (
        _by_key_head(query, key_heads),
        _by_key_head(cotangent, key_heads),
        sums.reshape(shape),
        inner.reshape(shape),
    )
    of_query = []
    of_key = jnp.zeros(keys.shape, wide)
    of_value = jnp.zeros(values.shape, wide)
    for block in how.blocks(length, key.shape[1]):
        own_query, own_cotangent, own_sums, own_inner = (
            _rows(x, block) for x in arrays
        )
        seen = slice(block.first, block.last)
        scores = _scores(own_query, keys[:, :, seen], block, how, segments)
        shares = jnp.exp(scores - own_sums[..., None])
        slope = _product(own_cotangent, values[:, :, seen], (3, 3))
        slope = how.scale * shares * (slope - own_inner[..., None])
        if how.cap is not None:
            # a hidden score has no share, and so no slope
            ratio = jnp.clip(scores / how.cap, -1, 1)
            slope = slope * (1 - ratio * ratio)
        slope = slope.astype(query.dtype)
        shares = shares.astype(query.dtype)
        of_value = of_value.at[:, :, seen].add(_product(shares, own_cotangent, (2, 2)))
        of_key = of_key.at[:, :, seen].add(_product(slope, own_query, (2, 2)))
        own = _product(slope, keys[:, :, seen], (3, 2))
        of_query.append(_grouped(own.astype(query.dtype), block))
    return [
        _by_length(jnp.concatenate(of_query, 3)),
        of_key.transpose(0, 2, 1, 3).astype(key.dtype),
        of_value.transpose(0, 2, 1, 3).astype(value.dtype),
    ]


# ---- internals: the two operations ----


def _attention(
    query: Any,
    key: Any,
    value: Any,
    *segments: Any,
    how: How,
) -> list[jax.Array]:
    run: Any = _in_blocks if how.kernel == "blocks" else splash.forward
    return run(query, key, value, _pair(segments), how)


def _gradient(*arrays: Any, how: How) -> list[jax.Array]:
    run: Any = _gradient_in_blocks if how.kernel == "blocks" else splash.backward
    return run(*arrays[:OPERANDS], _pair(arrays[OPERANDS:]), how)


def _pair(segments: Sequence[Any]) -> tuple[Any, Any] | None:
    """Return the segments of queries and of keys; None: there are none."""
    return (segments[0], segments[-1]) if segments else None


def _attention_shapes(query: Any, key: Any, *_: Any, how: How) -> list[Any]:
    batch, length, heads, _ = query.shape
    wide = jnp.promote_types(query.dtype, jnp.float32)
    sums = jax.core.ShapedArray((batch, heads, length), wide)
    return [jax.core.ShapedArray(query.shape, query.dtype), sums]


def _gradient_shapes(query: Any, key: Any, value: Any, *_: Any, how: How) -> list[Any]:
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in (query, key, value)]


def _operation(name: str, run: Callable, shapes: Callable) -> Primitive:
    """Return an operation that is compiled as a function says.

    The kernel for TPUs runs there alone: a plan that has it, replayed elsewhere,
    computes in blocks.
    """

    def run_anywhere(*arrays: Any, how: How) -> Any:
        if how.kernel == "splash":
            how = how._replace(kernel="blocks")
        return run(*arrays, how=how)

    def run_now(*arrays: Any, how: How) -> Any:
        return jax.jit(partial(primitive.bind, how=how))(*arrays)

    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(shapes)
    primitive.def_impl(run_now)
    anywhere = mlir.lower_fun(run_anywhere, multiple_results=True)
    on_tpu = mlir.lower_fun(run, multiple_results=True)
    mlir.register_lowering(primitive, anywhere)
    mlir.register_lowering(primitive, on_tpu, platform="tpu")
    return primitive


attention_p = _operation(ATTENTION, _attention, _attention_shapes)
gradient_p = _operation(ATTENTION_GRADIENT, _gradient, _gradient_shapes)

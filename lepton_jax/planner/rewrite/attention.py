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
            first = min(first, last - 1)
            yield Block(start, stop, first, last)


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
    out, _ = _bound(query, key, value, how, segments)
    return out


# ---- internals: the gradient ----


def _bound(query: Any, key: Any, value: Any, how: How, segments: Any) -> list[Any]:
    """Return attention and the logarithms of its sums."""
    operands = [query, key, value]
    if segments is not None:
        operands.append(segments)
    return attention_p.bind(*operands, how=how)


def _forward(query: Any, key: Any, value: Any, how: How, segments: Any = None) -> Any:
    out, sums = _bound(query, key, value, how, segments)
    more = [] if segments is None else [segments]
    kept = (query, key, value, out, sums)
    return out, (kept, more)


def _backward(how: How, kept: Any, cotangent: Any) -> Any:
    arrays, more = kept
    gradients = gradient_p.bind(*arrays, cotangent, *more, how=how)
    return (*gradients, None)


attend.defvjp(_forward, _backward)


# ---- internals: blocks ----


def _by_key_head(x: jax.Array, key_heads: int) -> jax.Array:
    """Return (batch, key heads, group, length, width)."""
    batch, length, heads, width = x.shape
    group = heads // key_heads
    x = x.reshape(batch, length, key_heads, group, width)
    return x.transpose(0, 2, 3, 1, 4)


def _by_length(x: jax.Array) -> jax.Array:
    """Return (batch, length, heads, width): undo `_by_key_head`."""
    batch, key_heads, group, length, width = x.shape
    x = x.transpose(0, 3, 1, 2, 4)
    return x.reshape(batch, length, key_heads * group, width)


def _wide(x: jax.Array) -> Any:
    """Return the dtype in which sums over an array's entries are taken."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _product(left: jax.Array, right: jax.Array, over: tuple[int, int]) -> jax.Array:
    """Multiply matrices head by head, with sums in float32.

    Args:
      left: (batch, heads, ...).
      right: likewise.
      over: the dims of either that are summed over.
    """
    contracted = ((over[0],), (over[1],))
    batched = ((0, 1), (0, 1))
    return lax.dot_general(
        left,
        right,
        (contracted, batched),
        preferred_element_type=_wide(left),
    )


def _seen(x: jax.Array, block: Block) -> jax.Array:
    """Return the keys or values, (batch, key heads, keys, width), that a block sees."""
    return x[:, :, block.first : block.last]


def _rows(x: jax.Array, block: Block) -> jax.Array:
    """Return a block's queries, group by group: (batch, key heads, rows, ...)."""
    x = x[:, :, :, block.start : block.stop]
    batch, heads, group, rows, *rest = x.shape
    return x.reshape(batch, heads, group * rows, *rest)


def _grouped(x: jax.Array, block: Block) -> jax.Array:
    """Undo the reshape of `_rows`."""
    batch, heads, _, *rest = x.shape
    rows = block.stop - block.start
    return x.reshape(batch, heads, -1, rows, *rest)


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
    shape = scores.shape[2:]
    if how.causal:
        seen = _by_position(shape, block, how)
        scores = jnp.where(seen, scores, HIDDEN)
    if segments is not None:
        same = _by_segment(shape, block, segments)
        scores = jnp.where(same, scores, HIDDEN)
    return scores


def _by_position(shape: tuple[int, ...], block: Block, how: How) -> jax.Array:
    """Return which keys a block's queries see for their position, (rows, keys)."""
    rows = block.stop - block.start
    own = lax.broadcasted_iota(jnp.int32, shape, 0) % rows
    own += block.start + how.ahead
    position = lax.broadcasted_iota(jnp.int32, shape, 1)
    position += block.first
    seen = own >= position
    if how.behind is not None:
        seen &= own - position <= how.behind
    return seen


def _by_segment(shape: tuple[int, ...], block: Block, segments: Any) -> jax.Array:
    """Return which keys are of the segment of a block's query, (batch, 1, ...)."""
    of_queries, of_keys = segments
    rows = block.stop - block.start
    groups = shape[0] // rows
    mine = of_queries[:, block.start : block.stop]
    mine = jnp.tile(mine, (1, groups))
    theirs = of_keys[:, block.first : block.last]

    by_query = mine[:, None, :, None]
    return by_query == theirs[:, None, None, :]


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
        own = _rows(grouped, block)
        out, logarithms = _attended(own, keys, values, block, how, segments)
        outs.append(out)
        sums.append(logarithms)
    out = _by_length(jnp.concatenate(outs, 3))
    logarithms = jnp.concatenate(sums, 3)
    return [out, logarithms.reshape(batch, heads, length)]


def _attended(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    block: Block,
    how: How,
    segments: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return a block's attention, and the logarithms of its sums, group by group."""
    scores = _scores(query, _seen(keys, block), block, how, segments)
    highest = scores.max(-1, keepdims=True)
    shares = jnp.exp(scores - highest)
    total = shares.sum(-1, keepdims=True)
    shares = (shares / total).astype(values.dtype)

    out = _product(shares, _seen(values, block), (3, 2))
    out = _grouped(out.astype(query.dtype), block)
    logarithms = highest + jnp.log(total)
    return out, _grouped(logarithms[..., 0], block)


class _Queries(NamedTuple):
    """Arrays that the gradient needs for each query; all but the last dims are equal.

    Attributes:
      query: (batch, key heads, group, length, width).
      cotangent: likewise.
      sums: the logarithm of each query's sum, (batch, key heads, group, length).
      inner: the products of its result and its cotangent, likewise.
    """

    query: jax.Array
    cotangent: jax.Array
    sums: jax.Array
    inner: jax.Array

    @classmethod
    def of(
        cls, query: Any, out: Any, sums: Any, cotangent: Any, key_heads: int
    ) -> _Queries:
        batch, length, heads, _ = query.shape
        wide = _wide(query)
        products = out.astype(wide) * cotangent.astype(wide)
        inner = products.sum(-1).transpose(0, 2, 1)
        shape = (batch, key_heads, heads // key_heads, length)
        return cls(
            _by_key_head(query, key_heads),
            _by_key_head(cotangent, key_heads),
            sums.reshape(shape),
            inner.reshape(shape),
        )

    def rows(self, block: Block) -> _Queries:
        """Return those of a block, group by group."""
        return _Queries(*(_rows(x, block) for x in self))


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
    keys = key.transpose(0, 2, 1, 3)
    values = value.transpose(0, 2, 1, 3)
    queries = _Queries.of(query, out, sums, cotangent, key.shape[2])
    of_query = []
    of_key = jnp.zeros(keys.shape, _wide(query))
    of_value = jnp.zeros(values.shape, _wide(query))
    for block in how.blocks(query.shape[1], key.shape[1]):
        own = queries.rows(block)
        shares, slopes = _slopes(own, keys, values, block, how, segments)

        seen = slice(block.first, block.last)
        more = _product(shares, own.cotangent, (2, 2))
        of_value = of_value.at[:, :, seen].add(more)
        more = _product(slopes, own.query, (2, 2))
        of_key = of_key.at[:, :, seen].add(more)
        mine = _product(slopes, _seen(keys, block), (3, 2))
        of_query.append(_grouped(mine.astype(query.dtype), block))
    by_query = _by_length(jnp.concatenate(of_query, 3))
    by_key = of_key.transpose(0, 2, 1, 3)
    by_key = by_key.astype(key.dtype)
    by_value = of_value.transpose(0, 2, 1, 3)
    return [by_query, by_key, by_value.astype(value.dtype)]


def _slopes(
    own: _Queries,
    keys: jax.Array,
    values: jax.Array,
    block: Block,
    how: How,
    segments: Any,
) -> tuple[jax.Array, jax.Array]:
    """Return the shares of a block, and the gradient by its products of query and key.

    Both are (batch, key heads, rows, keys), in the query's dtype.
    """
    scores = _scores(own.query, _seen(keys, block), block, how, segments)
    shares = jnp.exp(scores - own.sums[..., None])
    slopes = _product(own.cotangent, _seen(values, block), (3, 3))
    scaled = how.scale * shares
    slopes = scaled * (slopes - own.inner[..., None])
    if how.cap is not None:
        # a hidden score has no share, and so no slope
        ratio = scores / how.cap
        ratio = jnp.clip(ratio, -1, 1)
        slopes = slopes * (1 - ratio * ratio)
    slopes = slopes.astype(own.query.dtype)
    return shares.astype(own.query.dtype), slopes


# ---- internals: the two operations ----


def _attention(
    query: Any,
    key: Any,
    value: Any,
    *segments: Any,
    how: How,
) -> list[jax.Array]:
    run: Any = splash.forward
    if how.kernel == "blocks":
        run = _in_blocks
    return run(query, key, value, _pair(segments), how)


def _gradient(*arrays: Any, how: How) -> list[jax.Array]:
    run: Any = splash.backward
    if how.kernel == "blocks":
        run = _gradient_in_blocks
    segments = _pair(arrays[OPERANDS:])
    return run(*arrays[:OPERANDS], segments, how)


def _pair(segments: Sequence[Any]) -> tuple[Any, Any] | None:
    """Return the segments of queries and of keys; None: there are none."""
    if not segments:
        return None
    return segments[0], segments[-1]


def _attention_shapes(query: Any, key: Any, *_: Any, how: How) -> list[Any]:
    batch, length, heads, _ = query.shape
    sums = jax.core.ShapedArray((batch, heads, length), _wide(query))
    return [_shape(query), sums]


def _gradient_shapes(query: Any, key: Any, value: Any, *_: Any, how: How) -> list[Any]:
    return [_shape(x) for x in (query, key, value)]


def _shape(x: Any) -> Any:
    return jax.core.ShapedArray(x.shape, x.dtype)


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
        bound = partial(primitive.bind, how=how)
        return jax.jit(bound)(*arrays)

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

"""Splash attention: the kernel of JAX for TPUs, forward and backward.

It is `jax.experimental.pallas.ops.tpu.splash_attention`. Its own gradient would run the
forward pass again where rematerialization has kept its result, so here the forward and
the backward kernels are called apart.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.compat import splash_gradient

# Queries and keys of a block: the largest of these that divides the length. 512 is
# what MaxText trains with (its `base.yml`, sa_block_*); 128 is the least that the
# kernel takes.
BLOCKS = (512, 256, 128)


def takes(queries: int, keys: int, causal: bool) -> bool:
    """Whether the kernel computes attention of some lengths.

    Where queries see all keys, they would see those that fill the last block, too.
    """
    least = BLOCKS[-1]
    return causal or not (queries % least or keys % least)


def padded(length: int) -> int:
    """Return the length that the kernel computes: a multiple of its least block."""
    least = BLOCKS[-1]
    return -(-length // least) * least


def block(length: int) -> int:
    """Return the queries of a block for a length, padded already."""
    return next(size for size in BLOCKS if length % size == 0)


def forward(
    query: Any,
    key: Any,
    value: Any,
    segments: Any,
    how: Any,
) -> list[jax.Array]:
    """Return attention and the logarithms of its sums, (batch, heads, length)."""
    length = query.shape[1]
    kernel = _kernel(query.shape, key.shape, how, residuals=True)
    arrays = [_heads_first(x) for x in (how.scale * query, key, value)]
    arrays[0] = arrays[0].astype(query.dtype)
    out, (sums,) = jax.vmap(kernel)(*arrays, _segment_ids(segments))
    out = _length_first(out, length)
    sums = sums[..., :length]
    return [out, sums.astype(jnp.float32)]


def backward(
    query: Any,
    key: Any,
    value: Any,
    out: Any,
    sums: Any,
    cotangent: Any,
    segments: Any,
    how: Any,
) -> list[jax.Array]:
    """Return the gradients by query, key and value."""
    kernel = _kernel(query.shape, key.shape, how, False)
    scaled = (how.scale * query).astype(query.dtype)
    arrays = [_heads_first(x) for x in (scaled, key, value, out, cotangent)]
    sums = _to_whole_blocks(sums, 2)
    run: Any = functools.partial(splash_gradient, kernel)
    gradients = jax.vmap(run)(*arrays, sums, _segment_ids(segments))
    of_query, of_key, of_value = (
        _length_first(x, like.shape[1])
        for x, like in zip(gradients, (query, key, value), strict=True)
    )
    of_query = how.scale * of_query
    of_query = of_query.astype(query.dtype)
    of_key = of_key.astype(key.dtype)
    return [of_query, of_key, of_value.astype(value.dtype)]


# ---- internals ----


def _heads_first(x: jax.Array) -> jax.Array:
    """Return (batch, heads, length, width), padded with zeros to whole blocks.

    No query sees a key beyond its own position, and the cotangent of a query that is
    padding is zero.
    """
    x = _to_whole_blocks(x, 1)
    return x.transpose(0, 2, 1, 3)


def _to_whole_blocks(x: jax.Array, dim: int) -> jax.Array:
    """Return an array whose length, in a dim, is padded to whole blocks."""
    length = x.shape[dim]
    widths = [(0, 0)] * x.ndim
    widths[dim] = (0, padded(length) - length)
    return jnp.pad(x, widths)


def _segment_ids(segments: Any) -> Any:
    """Return segments as the kernel takes them; None: there are none."""
    if segments is None:
        return None
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    whole = []
    for own in segments:
        own = own.astype(jnp.int32)
        whole.append(_to_whole_blocks(own, 1))
    return SegmentIds(*whole)


def _length_first(x: jax.Array, length: int) -> jax.Array:
    x = x.transpose(0, 2, 1, 3)
    return x[:, :length]


def _kernel(queries: Any, keys: Any, how: Any, residuals: bool) -> Any:
    """Return the kernel for arrays of some shapes."""
    # only here: importing it takes 0.3 s, and a backend without TPUs needs it never
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    rows = padded(queries[1])
    columns = padded(keys[1])
    shape = (rows, columns)
    mask: Any = masks.FullMask(shape)
    if how.causal:
        mask = masks.CausalMask(shape, how.ahead)
        if how.behind is not None:
            mask = masks.LocalMask(shape, (how.behind, 0), how.ahead)
    own = block(rows)
    others = block(columns)
    sizes = kernels.BlockSizes(
        block_q=own,
        block_kv=others,
        block_q_dkv=own,
        block_kv_dkv=others,
        block_kv_dkv_compute=others,
        block_q_dq=own,
        block_kv_dq=others,
    )
    return kernels.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * queries[2]),
        block_sizes=sizes,
        save_residuals=residuals,
        attn_logits_soft_cap=how.cap,
        interpret=how.kernel.endswith("interpreted"),
    )

"""A decoder-only language model of the Llama shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-5  # of the norms, as in Llama
# Keys and values of one layer: "key" and "value" (batch, slots, kv_heads, head), and
# "filled" int32 (batch,), the slots of a row that hold a token.
Layer = dict[str, jax.Array]
Cache = tuple[Layer, ...]  # an entry a layer


class Attention(nnx.Module):
    """Causal self-attention with rotary positions.

    Groups of query heads share a key and value head.

    Args:
      dim: width of the inputs and outputs.
      heads: query heads.
      kv_heads: key and value heads, a divisor of `heads`.
      theta: base of the rotary frequencies.
      rngs: stream `params`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        theta: float,
        *,
        query_key_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.kv_heads = kv_heads
        self.theta = theta
        head = dim // heads
        self.head = head
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query = linear(dim, heads * head)
        self.key = linear(dim, kv_heads * head)
        self.value = linear(dim, kv_heads * head)
        self.out = linear(heads * head, dim)
        norm = partial(nnx.RMSNorm, head, epsilon=EPSILON, rngs=rngs)
        self.query_norm = norm() if query_key_norm else None
        self.key_norm = norm() if query_key_norm else None

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Layer | None = None,
    ) -> Any:
        """Map (batch, length, dim) to the same shape; the rest as in `Decoder`.

        Returns:
          The outputs; with a cache a pair of them and the cache.
        """
        batch, length, _ = x.shape
        if cache is not None and positions is None:
            positions = cache["filled"][:, None] + jnp.arange(length)

        query_shape = (batch, length, self.heads, -1)
        key_shape = (batch, length, self.kv_heads, -1)
        query = self.query(x).reshape(query_shape)
        key = self.key(x).reshape(key_shape)
        if self.query_norm is not None and self.key_norm is not None:
            query = self.query_norm(query)
            key = self.key_norm(key)
        query = rotary(query, self.theta, positions)
        key = rotary(key, self.theta, positions)
        value = self.value(x).reshape(key_shape)

        if cache is not None:
            mixed, cache = _attend_cached(query, key, value, cache)
            return self.out(mixed.reshape(batch, length, -1)), cache

        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if segments is None else same_segment(segments),
            is_causal=True,
        )
        return self.out(mixed.reshape(batch, length, -1))


class SwiGLU(nnx.Module):
    """Gated feed-forward layer (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate = linear(dim, hidden)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and a feed-forward layer, each on normalized inputs and added to them.

    Args:
      dim: width of the inputs and outputs.
      heads: query heads.
      kv_heads: key and value heads, a divisor of `heads`.
      theta: base of the rotary frequencies.
      feed_forward: the feed-forward layer, made from the rngs: (batch, length, dim) to
        the same.
      query_key_norm: as in `TransformerLM`.
      rngs: stream `params`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        theta: float,
        feed_forward: Callable[[nnx.Rngs], Callable[[jax.Array], jax.Array]],
        *,
        query_key_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.attention_norm = nnx.RMSNorm(
            dim,
            epsilon=EPSILON,
            rngs=rngs,
        )
        self.attention = Attention(
            dim,
            heads,
            kv_heads,
            theta,
            query_key_norm=query_key_norm,
            rngs=rngs,
        )
        self.feed_forward_norm = nnx.RMSNorm(
            dim,
            epsilon=EPSILON,
            rngs=rngs,
        )
        self.feed_forward = feed_forward(rngs)

    def __call__(
        self,
        x: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Layer | None = None,
    ) -> Any:
        """Map (batch, length, dim) to the same shape; the rest as in `Attention`."""
        mixed = self.attention(
            self.attention_norm(x),
            positions=positions,
            segments=segments,
            cache=cache,
        )
        if cache is None:
            x = x + mixed
            return x + self.feed_forward(self.feed_forward_norm(x))
        mixed, cache = mixed
        x = x + mixed
        return x + self.feed_forward(self.feed_forward_norm(x)), cache


class Decoder(nnx.Module):
    """Token embedding, blocks of one shape, norm and head.

    This is what the language models of the zoo have in common. The arguments that are
    not explained here are those of `TransformerLM`.

    Args:
      vocab: as in `TransformerLM`; also dim, layers, heads, kv_heads, tied, theta,
        loop, query_key_norm and rngs.
      feed_forward: a block's feed-forward layer, made from the rngs: (batch, length,
        dim) to the same.

    Raises:
      ValueError: the heads do not divide the width, or there is no such loop.
    """

    def __init__(
        self,
        vocab: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int | None,
        feed_forward: Callable[[nnx.Rngs], Callable[[jax.Array], jax.Array]],
        tied: bool,
        theta: float,
        loop: Literal["unrolled", "scan"],
        query_key_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        kv_heads = heads if kv_heads is None else kv_heads
        if dim % (2 * heads) or heads % kv_heads:
            raise ValueError(
                f"dim {dim} must be a multiple of 2 * {heads} heads, and heads one of"
                f" {kv_heads} kv_heads"
            )
        if loop not in ("unrolled", "scan") or layers < 1:
            raise ValueError(
                f"loop is {loop!r} over {layers} layers; it must be 'unrolled' or"
                " 'scan' over at least one"
            )

        def block(rngs: nnx.Rngs) -> Block:
            return Block(
                dim,
                heads,
                kv_heads,
                theta,
                feed_forward,
                query_key_norm=query_key_norm,
                rngs=rngs,
            )

        self.loop = loop
        self.layers = layers
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.blocks: Any
        if loop == "unrolled":
            self.blocks = nnx.List([block(rngs) for _ in range(layers)])
        else:
            keys = jax.random.split(rngs.params(), layers)
            self.blocks = nnx.vmap(lambda key: block(nnx.Rngs(key)))(keys)
        self.norm = nnx.RMSNorm(
            dim,
            epsilon=EPSILON,
            rngs=rngs,
        )
        self.head = None if tied else nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def empty_cache(
        self,
        batch: int,
        slots: int,
        dtype: Any = jnp.float32,
    ) -> Cache:
        """Return a cache that holds no token yet.

        Args:
          batch: rows.
          slots: tokens that a row can hold.
          dtype: of the keys and values.
        """
        one = self.blocks[0] if self.loop == "unrolled" else self.blocks
        attention = one.attention
        shape = (batch, slots, attention.kv_heads, attention.head)

        def layer() -> Layer:
            return {
                "key": jnp.zeros(shape, dtype),
                "value": jnp.zeros(shape, dtype),
                "filled": jnp.zeros(batch, jnp.int32),
            }

        return tuple(layer() for _ in range(self.layers))

    def __call__(
        self,
        tokens: jax.Array,
        *,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab).

        With a cache the tokens follow those that it holds: row by row they go to the
        slots from `filled` on, and each token sees the slots up to its own. The caller
        sees to it that there are enough. Where rows are of different lengths, fill them
        up at the end, and set `filled` back to the true lengths afterwards.

        Args:
          tokens: int32 (batch, length).
          positions: int32 (batch, length), for the rotary angles. None: each token's
            place in its row.
          segments: int32 (batch, length): tokens see those of their own segment alone,
            as packed documents need it. None: each row is one document.
          cache: from `empty_cache`, or from the call before.

        Returns:
          The logits; with a cache a pair of them and the cache, `filled` increased by
          length.

        Raises:
          ValueError: segments are given next to a cache.
        """
        if cache is not None and segments is not None:
            raise ValueError("a cache holds one document a row; give no segments")
        x = self.embed(tokens)
        if cache is None:
            x = self._blocks(x, positions, segments)
        else:
            x, cache = self._cached_blocks(x, positions, cache)

        x = self.norm(x)
        logits = self.embed.attend(x) if self.head is None else self.head(x)
        return logits if cache is None else (logits, cache)

    def _blocks(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        segments: jax.Array | None,
    ) -> jax.Array:
        places = {"positions": positions, "segments": segments}
        if self.loop == "unrolled":
            for block in self.blocks:
                x = block(x, **places)
            return x

        # not nnx.scan: it would carry the graph's state through the loop; here the
        # body sees a layer's arrays only
        graph, stacked = nnx.split(self.blocks)

        def apply(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
            return nnx.merge(graph, layer)(x, **places), None

        return jax.lax.scan(apply, x, stacked)[0]

    def _cached_blocks(
        self,
        x: jax.Array,
        positions: jax.Array | None,
        cache: Cache,
    ) -> tuple[jax.Array, Cache]:
        if self.loop == "unrolled":
            filled = []
            for block, layer in zip(self.blocks, cache, strict=True):
                x, layer = block(x, positions=positions, cache=layer)
                filled.append(layer)
            return x, tuple(filled)

        graph, stacked = nnx.split(self.blocks)

        def apply(x: jax.Array, item: Any) -> tuple[jax.Array, Layer]:
            params, layer = item
            block = nnx.merge(graph, params)
            return block(x, positions=positions, cache=layer)

        layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *cache)
        x, layers = jax.lax.scan(apply, x, (stacked, layers))

        def taken(index: int) -> Layer:
            return jax.tree.map(lambda leaf: leaf[index], layers)

        return x, tuple(taken(index) for index in range(len(cache)))


class TransformerLM(Decoder):
    """Llama (Touvron et al. 2023).

    It has RMSNorm, rotary positions, SwiGLU, grouped heads, and no biases.

    Args:
      vocab: number of tokens.
      dim: width of the residual stream.
      layers: number of blocks.
      heads: query heads; dim / heads must be even.
      kv_heads: key and value heads, a divisor of `heads`. None: `heads`.
      hidden: width of the feed-forward layers. None: 8/3 of dim, rounded up to a
        multiple of 64.
      tied: use the token embedding as the head.
      theta: base of the rotary frequencies.
      loop: over the layers: "unrolled" has a block of its own for each; "scan" has one
        block, whose parameters have a leading dim of `layers`, and compiles in a time
        that doesn't grow with them.
      query_key_norm: RMSNorm of each head's queries and keys before the rotary
        positions, so that scores can't grow without bound (Dehghani et al. 2023,
        "Scaling Vision Transformers to 22 Billion Parameters", section 2).
      rngs: stream `params`.
    """

    def __init__(
        self,
        vocab: int,
        *,
        dim: int,
        layers: int,
        heads: int,
        kv_heads: int | None = None,
        hidden: int | None = None,
        tied: bool = False,
        theta: float = 10_000.0,
        loop: Literal["unrolled", "scan"] = "unrolled",
        query_key_norm: bool = False,
        rngs: nnx.Rngs,
    ):
        width = usual_hidden(dim) if hidden is None else hidden
        super().__init__(
            vocab,
            dim=dim,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            tied=tied,
            theta=theta,
            loop=loop,
            query_key_norm=query_key_norm,
            feed_forward=lambda rngs: SwiGLU(dim, width, rngs=rngs),
            rngs=rngs,
        )


def usual_hidden(dim: int) -> int:
    """Return 8/3 of a width, rounded up to a multiple of 64."""
    return -(-8 * dim // 192) * 64


class _Size(NamedTuple):
    vocab: int
    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    theta: float
    tied: bool


_SIZES = {
    "1m": _Size(
        256,
        160,
        3,
        4,
        4,
        448,
        10_000.0,
        True,
    ),
    "10m": _Size(
        256,
        384,
        6,
        6,
        6,
        1024,
        10_000.0,
        True,
    ),
    "124m": _Size(
        50_304,
        768,
        12,
        12,
        12,
        2048,
        10_000.0,
        True,
    ),
    "1b": _Size(
        128_256,
        2048,
        16,
        32,
        8,
        8192,
        500_000.0,
        True,
    ),
    "8b": _Size(
        128_256,
        4096,
        32,
        32,
        8,
        14_336,
        500_000.0,
        False,
    ),
    "70b": _Size(
        128_256,
        8192,
        80,
        64,
        8,
        28_672,
        500_000.0,
        False,
    ),
    "405b": _Size(
        128_256,
        16_384,
        126,
        128,
        8,
        53_248,
        500_000.0,
        False,
    ),
}


def transformer_size(name: str) -> dict[str, Any]:
    """Return arguments of `TransformerLM` by about how many parameters it has.

    The names are 1m, 10m, 124m, 1b, 8b, 70b and 405b. 124m has the dims of GPT-2's
    smallest model (Radford et al. 2019), its vocabulary rounded up to a multiple of
    128; 1b those of Llama 3.2 1B; 8b, 70b and 405b those of Llama 3 (Dubey et al. 2024,
    "The Llama 3 Herd of Models", table 3).

    Raises:
      ValueError: the name is none of these.
    """
    if name not in _SIZES:
        raise ValueError(f"size {name!r} is none of {', '.join(_SIZES)}")
    return _SIZES[name]._asdict()


def same_segment(segments: jax.Array) -> jax.Array:
    """Return which tokens are of one segment, bool (batch, 1, length, length)."""
    return segments[:, None, :, None] == segments[:, None, None, :]


def visible_slots(cache: Layer, length: int) -> jax.Array:
    """Return which slots the next tokens see, bool (batch, 1, length, slots)."""
    own = cache["filled"][:, None] + jnp.arange(length)
    slots = jnp.arange(cache["key"].shape[1])
    return slots <= own[:, None, :, None]


def _attend_cached(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    cache: Layer,
) -> tuple[jax.Array, Layer]:
    """Return what tokens gather from the cache and each other, and the new cache."""
    mask = visible_slots(cache, query.shape[1])
    cache = appended(cache, key, value)
    mixed = jax.nn.dot_product_attention(
        query,
        cache["key"].astype(query.dtype),
        cache["value"].astype(query.dtype),
        mask=mask,
    )
    return mixed, cache


def appended(
    cache: Layer,
    key: jax.Array,
    value: jax.Array,
) -> Layer:
    """Return a layer's cache with more keys and values (batch, length, heads, head)."""

    def row(slots: jax.Array, more: jax.Array, start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(
            slots, more.astype(slots.dtype), start, axis=0
        )

    filled = cache["filled"]
    put = jax.vmap(row)
    return {
        "key": put(cache["key"], key, filled),
        "value": put(cache["value"], value, filled),
        "filled": filled + key.shape[1],
    }


def rotary(
    x: jax.Array,
    theta: float,
    positions: jax.Array | None = None,
) -> jax.Array:
    """Turn the pairs (x[i], x[i + d/2]) by the angles position * theta^(-2i/d).

    These are rotary positions (Su et al. 2021, "RoFormer", section 3.2.2).

    Args:
      x: (batch, length, heads, d), d even.
      theta: base of the frequencies.
      positions: (batch, length). None: 0, 1, 2 and so on in each row.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # The angles are float32 whatever x is: in bfloat16, positions above 256 would fall
    # together.
    if positions is None:
        positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    places = positions.astype(jnp.float32)[..., None, None]
    angles = places * frequencies
    cos = jnp.cos(angles).astype(x.dtype)
    sin = jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    turned_left = left * cos - right * sin
    turned_right = right * cos + left * sin
    return jnp.concatenate([turned_left, turned_right], axis=-1)

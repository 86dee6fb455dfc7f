"""A decoder-only language model of the Llama shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-5  # of the norms, as in Llama


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
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.kv_heads = kv_heads
        self.theta = theta
        head = dim // heads
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.query = linear(dim, heads * head)
        self.key = linear(dim, kv_heads * head)
        self.value = linear(dim, kv_heads * head)
        self.out = linear(heads * head, dim)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        batch, length, _ = x.shape
        query_shape = (batch, length, self.heads, -1)
        key_shape = (batch, length, self.kv_heads, -1)
        query = rotary(self.query(x).reshape(query_shape), self.theta)
        key = rotary(self.key(x).reshape(key_shape), self.theta)
        value = self.value(x).reshape(key_shape)

        mixed = jax.nn.dot_product_attention(
            query,
            key,
            value,
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
            rngs=rngs,
        )
        self.feed_forward_norm = nnx.RMSNorm(
            dim,
            epsilon=EPSILON,
            rngs=rngs,
        )
        self.feed_forward = feed_forward(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """Token embedding, blocks of one shape, norm and head.

    This is what the language models of the zoo have in common. The arguments that are
    not explained here are those of `TransformerLM`.

    Args:
      vocab: as in `TransformerLM`; also dim, layers, heads, kv_heads, tied, theta, loop
        and rngs.
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
                rngs=rngs,
            )

        self.loop = loop
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

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        if self.loop == "unrolled":
            for block in self.blocks:
                x = block(x)
        else:
            # not nnx.scan: it would carry the graph's state through the loop; here the
            # body sees a layer's arrays only
            graph, stacked = nnx.split(self.blocks)

            def apply(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
                return nnx.merge(graph, layer)(x), None

            x, _ = jax.lax.scan(apply, x, stacked)

        x = self.norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)


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


def rotary(x: jax.Array, theta: float) -> jax.Array:
    """Turn the pairs (x[i], x[i + d/2]) by the angles position * theta^(-2i/d).

    These are rotary positions (Su et al. 2021, "RoFormer", section 3.2.2).

    Args:
      x: (batch, length, heads, d), d even.
      theta: base of the frequencies.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    # The angles are float32 whatever x is: in bfloat16, positions above 256 would fall
    # together.
    positions = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = positions[:, None, None] * frequencies
    cos = jnp.cos(angles).astype(x.dtype)
    sin = jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    turned_left = left * cos - right * sin
    turned_right = right * cos + left * sin
    return jnp.concatenate([turned_left, turned_right], axis=-1)

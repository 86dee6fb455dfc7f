"""A decoder-only language model of the Llama shape."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; groups of query heads share a key and value head."""

    def __init__(self, dim: int, heads: int, kv_heads: int, theta: float, *, rngs: nnx.Rngs):
        self.heads, self.kv_heads, self.theta, head = heads, kv_heads, theta, dim // heads
        self.query = nnx.Linear(dim, heads * head, use_bias=False, rngs=rngs)
        self.key = nnx.Linear(dim, kv_heads * head, use_bias=False, rngs=rngs)
        self.value = nnx.Linear(dim, kv_heads * head, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(heads * head, dim, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        query = rotary(self.query(x).reshape(batch, length, self.heads, -1), self.theta)
        key = rotary(self.key(x).reshape(batch, length, self.kv_heads, -1), self.theta)
        value = self.value(x).reshape(batch, length, self.kv_heads, -1)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.reshape(batch, length, -1))


class SwiGLU(nnx.Module):
    """Gated feed-forward layer (Shazeer 2020, "GLU Variants Improve Transformer")."""

    def __init__(self, dim: int, hidden: int, *, rngs: nnx.Rngs):
        self.gate = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(dim, hidden, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward layer, each on normalized inputs and added to them."""

    def __init__(self, dim: int, heads: int, kv_heads: int, hidden: int, theta: float, *, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(dim, epsilon=1e-5, rngs=rngs)
        self.attention = Attention(dim, heads, kv_heads, theta, rngs=rngs)
        self.feed_forward_norm = nnx.RMSNorm(dim, epsilon=1e-5, rngs=rngs)
        self.feed_forward = SwiGLU(dim, hidden, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class TransformerLM(nnx.Module):
    """Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, grouped heads, no biases.

    Args:
      vocab: number of tokens.
      dim: width of the residual stream.
      layers: number of blocks.
      heads: query heads; dim / heads must be even.
      kv_heads: key and value heads, a divisor of `heads`. None: as many.
      hidden: width of the feed-forward layers. None: 8/3 of dim, rounded up to a multiple of 64.
      tied: use the token embedding as the head.
      theta: base of the rotary frequencies.
      rngs: stream `params`.
    """

    def __init__(self, vocab: int, *, dim: int, layers: int, heads: int, kv_heads: int | None = None,
                 hidden: int | None = None, tied: bool = False, theta: float = 10_000.0, rngs: nnx.Rngs):
        kv_heads = heads if kv_heads is None else kv_heads
        hidden = -(-8 * dim // 192) * 64 if hidden is None else hidden
        if dim % (2 * heads) or heads % kv_heads:
            raise ValueError(f"dim {dim} must be a multiple of 2 * {heads} heads, and heads one of {kv_heads} kv_heads")
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        self.blocks = nnx.List([Block(dim, heads, kv_heads, hidden, theta, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(dim, epsilon=1e-5, rngs=rngs)
        self.head = None if tied else nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)


def rotary(x: jax.Array, theta: float) -> jax.Array:
    """Turns the pairs (x[i], x[i + d/2]) by position * theta^(-2i/d) (Su et al. 2021, "RoFormer", section 3.2.2).

    Args:
      x: (batch, length, heads, d), d even.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    # The angles are float32 whatever x is: in bfloat16, positions above 256 would fall together.
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

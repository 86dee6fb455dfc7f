"""A decoder-only language model of the Llama shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Causal self-attention with rotary positions; groups of query heads share a key
    and value head.
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
        self.query = nnx.Linear(
            dim,
            heads * head,
            use_bias=False,
            rngs=rngs,
        )
        self.key = nnx.Linear(
            dim,
            kv_heads * head,
            use_bias=False,
            rngs=rngs,
        )
        self.value = nnx.Linear(
            dim,
            kv_heads * head,
            use_bias=False,
            rngs=rngs,
        )
        self.out = nnx.Linear(
            heads * head,
            dim,
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        query = rotary(self.query(x).reshape(batch, length, self.heads, -1), self.theta)
        key = rotary(self.key(x).reshape(batch, length, self.kv_heads, -1), self.theta)
        value = self.value(x).reshape(
            batch,
            length,
            self.kv_heads,
            -1,
        )
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
        self.gate = nnx.Linear(
            dim,
            hidden,
            use_bias=False,
            rngs=rngs,
        )
        self.up = nnx.Linear(
            dim,
            hidden,
            use_bias=False,
            rngs=rngs,
        )
        self.down = nnx.Linear(
            hidden,
            dim,
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and feed-forward layer, each on normalized inputs and added to them."""

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
            epsilon=1e-5,
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
            epsilon=1e-5,
            rngs=rngs,
        )
        self.feed_forward = feed_forward(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nnx.Module):
    """Token embedding, blocks of one shape, norm and head: what the language models of
    the zoo have in common.

    Args:
      vocab, dim, layers, heads, kv_heads, tied, theta, loop, rngs: as of
      `TransformerLM`.
      feed_forward: a block's feed-forward layer, made from the rngs: (batch, length,
        dim) to the same.
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
        self.blocks: Any = (
            nnx.List([block(rngs) for _ in range(layers)])
            if loop == "unrolled"
            else nnx.vmap(lambda key: block(nnx.Rngs(key)))(
                jax.random.split(rngs.params(), layers)
            )
        )
        self.norm = nnx.RMSNorm(
            dim,
            epsilon=1e-5,
            rngs=rngs,
        )
        self.head = None if tied else nnx.Linear(dim, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        if self.loop == "unrolled":
            for block in self.blocks:
                x = block(x)
        else:
            # not nnx.scan: it would carry the graph's state through the loop; here the
            # body sees a layer's arrays only
            graph, stacked = nnx.split(self.blocks)
            x, _ = jax.lax.scan(
                lambda x, layer: (nnx.merge(graph, layer)(x), None),
                x,
                stacked,
            )
        x = self.norm(x)
        return self.embed.attend(x) if self.head is None else self.head(x)


class TransformerLM(Decoder):
    """Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, grouped heads, no
    biases.

    Args:
      vocab: number of tokens.
      dim: width of the residual stream.
      layers: number of blocks.
      heads: query heads; dim / heads must be even.
      kv_heads: key and value heads, a divisor of `heads`. None: as many.
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
        width = -(-8 * dim // 192) * 64 if hidden is None else hidden
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


_COLUMNS = ("vocab", "dim", "layers", "heads", "kv_heads", "hidden", "theta", "tied")
_SIZES: dict[str, tuple[Any, ...]] = {
    "1m": (256, 160, 3, 4, 4, 448, 10_000.0, True),
    "10m": (256, 384, 6, 6, 6, 1024, 10_000.0, True),
    "124m": (50_304, 768, 12, 12, 12, 2048, 10_000.0, True),
    "1b": (128_256, 2048, 16, 32, 8, 8192, 500_000.0, True),
    "8b": (128_256, 4096, 32, 32, 8, 14_336, 500_000.0, False),
    "70b": (128_256, 8192, 80, 64, 8, 28_672, 500_000.0, False),
    "405b": (128_256, 16_384, 126, 128, 8, 53_248, 500_000.0, False),
}


def transformer_size(name: str) -> dict[str, Any]:
    """Arguments of `TransformerLM` by about how many parameters it has: 1m, 10m, 124m,
    1b, 8b, 70b or 405b.

    124m has the dims of GPT-2's smallest model (Radford et al. 2019), its vocabulary
    rounded up to a multiple of 128; 1b those of Llama 3.2 1B; 8b, 70b and 405b those of
    Llama 3 (Dubey et al. 2024, "The Llama 3 Herd of Models", table 3).

    Raises:
      ValueError: the name is none of these.
    """
    if name not in _SIZES:
        raise ValueError(f"size {name!r} is none of {', '.join(_SIZES)}")
    return dict(
        zip(
            _COLUMNS,
            _SIZES[name],
            strict=True,
        )
    )


def rotary(x: jax.Array, theta: float) -> jax.Array:
    """Turns the pairs (x[i], x[i + d/2]) by position * theta^(-2i/d) (Su et al. 2021,
    "RoFormer", section 3.2.2).

    Args:
      x: (batch, length, heads, d), d even.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None, None] * frequencies
    # The angles are float32 whatever x is: in bfloat16, positions above 256 would fall
    # together.
    cos = jnp.cos(angles).astype(x.dtype)
    sin = jnp.sin(angles).astype(x.dtype)
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [left * cos - right * sin, right * cos + left * sin],
        axis=-1,
    )

"""Gemma-like language model: tied scaled embedding, one key head, GeGLU, soft caps."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import scan, stack

CAP = 30.0  # of the logits, as in Gemma 2


class Block(nnx.Module):
    """Attention with shared keys, and a gated layer; norms before and after each."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
    ):
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.heads = heads
        self.query = linear(dim, heads * head)
        self.key_value = linear(dim, 2 * head)
        self.out = linear(heads * head, dim)
        self.gate_up = linear(dim, 2 * hidden)
        self.down = linear(hidden, dim)
        self.norms = nnx.List([nnx.RMSNorm(dim, rngs=rngs) for _ in range(4)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        before, after, inner, last = self.norms
        x = x + after(self._attend(before(x)))
        gate, up = jnp.split(
            self.gate_up(inner(x)),
            2,
            axis=-1,
        )
        return x + last(self.down(nnx.gelu(gate) * up))

    def _attend(self, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        query = self.query(x).reshape(
            batch,
            length,
            self.heads,
            -1,
        )
        key, value = jnp.split(
            self.key_value(x),
            2,
            axis=-1,
        )
        scores = jnp.einsum("bqhd,bkd->bhqk", query, key) / query.shape[-1] ** 0.5
        scores = 50 * jnp.tanh(scores.astype(jnp.float32) / 50)
        positions = jnp.arange(length)
        earlier = positions[:, None] >= positions
        weights = jax.nn.softmax(jnp.where(earlier, scores, -1e30)).astype(x.dtype)
        mixed = jnp.einsum("bhqk,bkd->bqhd", weights, value)
        return self.out(mixed.reshape(batch, length, -1))


class Gemma(nnx.Module):
    """The decoder."""

    def __init__(
        self,
        vocab: int,
        block: tuple[int, int, int, int],
        layers: int,
        loop: bool,
        *,
        rngs: nnx.Rngs,
    ):
        dim = block[0]
        self.loop = loop
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        if loop:
            self.blocks = stack(
                lambda r: Block(*block, rngs=r),
                layers,
                rngs,
            )
        else:
            made = [Block(*block, rngs=rngs) for _ in range(layers)]
            self.blocks = nnx.List(made)
        self.norm = nnx.RMSNorm(dim, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        x = x * x.shape[-1] ** 0.5
        if self.loop:
            x = scan(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        logits = self.embed.attend(self.norm(x))
        return CAP * jnp.tanh(logits / CAP)


def case(draw: Draw) -> Case:
    """Draw heads, widths, layers, and whether they are a loop."""
    head = draw.choice((64, 128, 256))
    heads = draw.choice((1, 2, 3, 4, 6, 8))
    dim = draw.width(256, 2048)
    block = (
        dim,
        heads,
        head,
        draw.width(
            2 * dim,
            6 * dim,
        ),
    )
    loop = draw.random() < 0.5
    layers = draw.randint(4, 18) if loop else draw.randint(2, 4)
    length = draw.length(128, 2048)
    model = partial(
        Gemma,
        draw.vocabulary(),
        block,
        layers,
        loop,
    )
    return Case(
        model,
        shape(length),
        shape(length),
        ids=model.args[0],
        **draw.rest(),
    )

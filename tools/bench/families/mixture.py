"""A language model whose feed-forward layers are a mixture of experts."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Attention, scan, stack


class Experts(nnx.Module):
    """Each token's best experts, chosen by weights; all experts see all tokens.

    Dispatch by one-hot combination with a capacity (Lepikhin et al. 2020).
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        experts: int,
        *,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.experts = experts
        self.router = nnx.Linear(
            dim,
            experts,
            use_bias=False,
            rngs=rngs,
        )
        self.up = nnx.Param(
            init(
                rngs.params(),
                (experts, dim, hidden),
            )
        )
        self.down = nnx.Param(
            init(
                rngs.params(),
                (experts, hidden, dim),
            )
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape; each row routes on its own."""
        length = x.shape[1]
        capacity = max(1, 2 * length // self.experts)
        chances = jax.nn.softmax(self.router(x).astype(jnp.float32))
        best = jnp.argmax(chances, axis=-1)
        chosen = jax.nn.one_hot(
            best,
            self.experts,
            dtype=jnp.float32,
        )
        place = jnp.cumsum(chosen, axis=1) * chosen - 1
        slots = jax.nn.one_hot(
            place.astype(jnp.int32),
            capacity,
            dtype=x.dtype,
        )
        weight = (chances * chosen).astype(x.dtype)
        queues = jnp.einsum("blec,bld->becd", slots, x)
        hidden = jnp.einsum(
            "becd,edh->bech",
            queues,
            self.up[...].astype(x.dtype),
        )
        down = self.down[...].astype(x.dtype)
        results = jnp.einsum(
            "bech,ehd->becd",
            nnx.gelu(hidden),
            down,
        )
        return jnp.einsum("blec,becd,ble->bld", slots, results, weight)


class Block(nnx.Module):
    """Attention, and the experts."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        experts: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = Attention(
            dim,
            heads,
            causal=True,
            rngs=rngs,
        )
        self.second = nnx.LayerNorm(dim, rngs=rngs)
        self.experts = Experts(dim, hidden, experts, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.attention(self.first(x))
        return x + self.experts(self.second(x))


class Mixture(nnx.Module):
    """The language model."""

    def __init__(
        self,
        vocab: int,
        block: tuple[int, int, int, int],
        layers: int,
        loop: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.loop = loop
        self.embed = nnx.Embed(
            vocab,
            block[0],
            rngs=rngs,
        )
        if loop:
            self.blocks = stack(
                lambda r: Block(*block, rngs=r),
                layers,
                rngs,
            )
        else:
            made = [Block(*block, rngs=rngs) for _ in range(layers)]
            self.blocks = nnx.List(made)
        self.out = nnx.Linear(
            block[0],
            vocab,
            use_bias=False,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        if self.loop:
            x = scan(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw experts, widths, heads, length, and whether layers are a loop."""
    dim = draw.width(128, 1024)
    experts = draw.choice((4, 6, 8, 16))
    block = (dim, draw.heads(dim), draw.width(dim, 4 * dim), experts)
    loop = draw.random() < 0.5
    layers = draw.randint(2, 10) if loop else draw.randint(1, 3)
    length = draw.length(64, 1024)
    model = partial(
        Mixture,
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

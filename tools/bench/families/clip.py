"""CLIP-like: an image tower and a text tower, contrasted over the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Attention, FeedForward

MOST = 32_768  # samples that are contrasted with each other, as in CLIP


class Block(nnx.Module):
    """Attention and a feed-forward layer."""

    def __init__(
        self,
        dim: int,
        heads: int,
        causal: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = Attention(
            dim,
            heads,
            causal=causal,
            fused=True,
            rngs=rngs,
        )
        self.second = nnx.LayerNorm(dim, rngs=rngs)
        self.feed_forward = FeedForward(dim, 4 * dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        x = x + self.attention(self.first(x))
        return x + self.feed_forward(self.second(x))


class Clip(nnx.Module):
    """Both towers and the temperature."""

    def __init__(
        self,
        vocab: int,
        patch: int,
        images: tuple[int, int, int],
        texts: tuple[int, int, int],
        joint: int,
        *,
        rngs: nnx.Rngs,
    ):
        sides = (patch, patch)
        dim, heads, layers = images
        self.patches = nnx.Conv(
            3,
            dim,
            sides,
            strides=sides,
            rngs=rngs,
        )
        made = [
            Block(
                dim,
                heads,
                False,
                rngs=rngs,
            )
            for _ in range(layers)
        ]
        self.images = nnx.List(made)
        self.image_out = nnx.Linear(
            dim,
            joint,
            use_bias=False,
            rngs=rngs,
        )

        dim, heads, layers = texts
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        made = [
            Block(
                dim,
                heads,
                True,
                rngs=rngs,
            )
            for _ in range(layers)
        ]
        self.texts = nnx.List(made)
        self.text_out = nnx.Linear(
            dim,
            joint,
            use_bias=False,
            rngs=rngs,
        )
        self.temperature = nnx.Param(jnp.zeros(()))

    def __call__(
        self,
        images: jax.Array,
        tokens: jax.Array,
    ) -> dict[str, Any]:
        """Map images and int32 tokens to a vector each, and a temperature."""
        x = self.patches(images)
        x = x.reshape(
            x.shape[0],
            -1,
            x.shape[-1],
        )
        for block in self.images:
            x = block(x)
        y = self.embed(tokens)
        for block in self.texts:
            y = block(y)
        return {
            "image": self.image_out(x.mean(axis=1)),
            "text": self.text_out(y[:, -1]),
            "temperature": jnp.exp(self.temperature[...]),
        }


def contrast(
    outputs: dict[str, Any],
    targets: jax.Array,
) -> jax.Array:
    """Return the mean of both cross-entropies; the targets play no part."""
    image, text = (
        outputs[name]
        / (
            1e-6
            + jnp.linalg.norm(
                outputs[name],
                axis=1,
                keepdims=True,
            )
        )
        for name in ("image", "text")
    )
    logits = image @ text.T * outputs["temperature"]
    logits = logits.astype(jnp.float32)
    own = jnp.diagonal(logits)
    over_texts = jax.nn.logsumexp(logits, axis=1)
    over_images = jax.nn.logsumexp(logits, axis=0)
    return jnp.mean((over_texts + over_images) / 2 - own) + 0.0 * targets.mean()


def case(draw: Draw) -> Case:
    """Draw both towers."""
    patch = draw.choice((8, 16))
    side = patch * draw.choice((4, 7, 10))
    length = draw.length(16, 77)
    towers = []
    for _ in range(2):
        heads = draw.choice((2, 4, 6, 8))
        dim = heads * max(
            4,
            int(64 * draw.scale),
        )
        towers.append((dim, heads, draw.randint(1, 2)))
    joint = draw.width(64, 512)
    model = partial(
        Clip,
        draw.vocabulary(),
        patch,
        *towers,
        joint,
    )
    inputs = {
        "images": shape(
            side,
            side,
            3,
            dtype=jnp.float32,
        ),
        "tokens": shape(length),
    }
    return Case(
        model,
        inputs,
        shape(dtype=jnp.float32),
        loss=contrast,
        most=MOST,
        **draw.rest(),
    )

"""Perceiver (Jaegle et al. 2021): a few latents attend to many inputs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Attention, FeedForward, scan, stack


class Tower(nnx.Module):
    """Self-attention among latents."""

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = Attention(dim, heads, rngs=rngs)
        self.second = nnx.LayerNorm(dim, rngs=rngs)
        self.feed_forward = FeedForward(dim, 2 * dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, latents, dim) to the same shape."""
        x = x + self.attention(self.first(x))
        return x + self.feed_forward(self.second(x))


class Perceiver(nnx.Module):
    """Cross attention from latents, towers in a loop, once or twice; the logits."""

    def __init__(
        self,
        classes: int,
        features: int,
        latents: int,
        dim: int,
        heads: int,
        depth: tuple[int, int],
        *,
        rngs: nnx.Rngs,
    ):
        turns, layers = depth
        init = nnx.initializers.normal(0.02)
        self.latents = nnx.Param(
            init(
                rngs.params(),
                (latents, dim),
            )
        )
        self.norm = nnx.LayerNorm(features, rngs=rngs)
        self.cross = nnx.List(
            [
                Attention(
                    dim,
                    1,
                    source=features,
                    rngs=rngs,
                )
                for _ in range(turns)
            ]
        )
        make = partial(Tower, dim, heads)
        self.towers = nnx.List(
            [
                stack(
                    lambda r: make(rngs=r),
                    layers,
                    rngs,
                )
                for _ in range(turns)
            ]
        )
        self.out = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Map (batch, n, features) to logits (batch, classes)."""
        memory = self.norm(inputs)
        latents = self.latents[...].astype(memory.dtype)
        x = jnp.broadcast_to(
            latents,
            (inputs.shape[0], *latents.shape),
        )
        for cross, tower in zip(
            self.cross,
            self.towers,
            strict=True,
        ):
            x = x + cross(x, memory)
            x = scan(tower, x)
        return self.out(x.mean(axis=1))


def case(draw: Draw) -> Case:
    """Draw the inputs, the latents and the depth."""
    features = draw.width(16, 256)
    count = draw.length(256, 4096)
    dim = draw.width(128, 512)
    depth = (draw.randint(1, 2), draw.randint(2, 6))
    model = partial(
        Perceiver,
        draw.classes(),
        features,
        draw.length(32, 256),
        dim,
        draw.heads(dim),
        depth,
    )
    return Case(
        model,
        shape(count, features, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

"""Layers that several families share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    """Multi-head attention with softmax over all keys, or over earlier ones.

    Args:
      dim: width of queries and outputs.
      heads: number of heads, a divisor of `dim`.
      source: width of keys and values; None: `dim`.
      causal: whether a query sees earlier keys alone.
      fused: call `jax.nn.dot_product_attention` rather than three operations.
      rngs: stream `params`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        source: int | None = None,
        causal: bool = False,
        fused: bool = False,
        rngs: nnx.Rngs,
    ):
        source = source or dim
        self.heads = heads
        self.causal = causal
        self.fused = fused
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(source, dim, rngs=rngs)
        self.value = nnx.Linear(source, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        memory: jax.Array | None = None,
    ) -> jax.Array:
        """Map (batch, length, dim), over (batch, keys, source), to the same shape."""
        memory = x if memory is None else memory
        query = self._split(self.query(x))
        key = self._split(self.key(memory))
        value = self._split(self.value(memory))
        if self.fused:
            mixed = jax.nn.dot_product_attention(
                query,
                key,
                value,
                is_causal=self.causal,
            )
        else:
            mixed = self._mixed(query, key, value)
        return self.out(mixed.reshape(x.shape))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(
            *x.shape[:2],
            self.heads,
            -1,
        )

    def _mixed(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
    ) -> jax.Array:
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores * query.shape[-1] ** -0.5
        if self.causal:
            mask = jnp.tril(
                jnp.ones(
                    scores.shape[-2:],
                    bool,
                )
            )
            scores = jnp.where(mask, scores, -1e9)
        weights = jax.nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class FeedForward(nnx.Module):
    """Two dense layers with an activation between them."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: Callable[[jax.Array], jax.Array] = nnx.gelu,
        *,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., dim) to the same shape."""
        return self.down(self.activation(self.up(x)))


class Dense(nnx.Module):
    """Dense layers, each but the last followed by an activation."""

    def __init__(
        self,
        widths: tuple[int, ...],
        activation: Callable[[jax.Array], jax.Array] = nnx.relu,
        *,
        rngs: nnx.Rngs,
    ):
        pairs = itertools.pairwise(widths)
        self.activation = activation
        self.layers = nnx.List(
            [
                nnx.Linear(
                    a,
                    b,
                    rngs=rngs,
                )
                for a, b in pairs
            ]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (..., widths[0]) to (..., widths[-1])."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def stack(
    make: Callable[[nnx.Rngs], Any],
    count: int,
    rngs: nnx.Rngs,
) -> Any:
    """Return one module whose arrays have a leading dim of `count` layers."""
    keys = jax.random.split(rngs.params(), count)
    return nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)


def scan(stacked: Any, x: Any) -> Any:
    """Apply the layers of a stacked module one after the other, in a loop."""
    graph, arrays = nnx.split(stacked)

    def apply(
        x: Any,
        layer: Any,
    ) -> tuple[Any, None]:
        return nnx.merge(graph, layer)(x), None

    return jax.lax.scan(apply, x, arrays)[0]

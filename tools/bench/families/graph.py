"""A graph network: messages along edges, summed at nodes."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Dense


class Round(nnx.Module):
    """One round of messages, by edge lists or by a dense adjacency."""

    def __init__(
        self,
        dim: int,
        dense: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.dense = dense
        self.message = Dense(
            (dim if dense else 2 * dim, dim, dim),
            rngs=rngs,
        )
        self.update = Dense(
            (2 * dim, dim),
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        edges: jax.Array,
    ) -> jax.Array:
        """Map (batch, nodes, dim) to the same shape."""
        if self.dense:
            received = edges.astype(x.dtype) @ self.message(x)
        else:
            received = self._along(x, edges)
        both = jnp.concatenate(
            [x, received],
            axis=-1,
        )
        return self.norm(x + self.update(both))

    def _along(
        self,
        x: jax.Array,
        edges: jax.Array,
    ) -> jax.Array:
        """Sum messages from edges[..., 0] at edges[..., 1]."""
        sender, receiver = edges[..., 0], edges[..., 1]
        pairs = [
            jnp.take_along_axis(
                x,
                ends[..., None],
                axis=1,
            )
            for ends in (sender, receiver)
        ]
        messages = self.message(jnp.concatenate(pairs, axis=-1))
        add = partial(
            jax.ops.segment_sum,
            num_segments=x.shape[1],
        )
        return jax.vmap(add)(messages, receiver)


class GraphNet(nnx.Module):
    """Features of nodes to one number a graph."""

    def __init__(
        self,
        features: int,
        dim: int,
        rounds: int,
        dense: bool,
        *,
        rngs: nnx.Rngs,
    ):
        self.enter = nnx.Linear(features, dim, rngs=rngs)
        self.rounds = nnx.List(
            [
                Round(
                    dim,
                    dense,
                    rngs=rngs,
                )
                for _ in range(rounds)
            ]
        )
        self.out = Dense(
            (dim, dim, 1),
            rngs=rngs,
        )

    def __call__(
        self,
        nodes: jax.Array,
        edges: jax.Array,
    ) -> jax.Array:
        """Map nodes (batch, n, features) and edges to numbers (batch,)."""
        x = self.enter(nodes)
        for turn in self.rounds:
            x = turn(x, edges)
        return self.out(x.mean(axis=1))[:, 0]


def case(draw: Draw) -> Case:
    """Draw nodes, edges, widths, rounds, and the kind of adjacency."""
    nodes = draw.length(16, 256)
    features = draw.width(8, 64)
    dense = draw.random() < 0.5
    if dense:
        edges = shape(nodes, nodes, dtype=jnp.float32)
    else:
        edges = shape(
            nodes * draw.randint(2, 6),
            2,
        )
    inputs = {
        "nodes": shape(
            nodes,
            features,
            dtype=jnp.float32,
        ),
        "edges": edges,
    }
    return Case(
        partial(
            GraphNet,
            features,
            draw.width(64, 512),
            draw.randint(1, 4),
            dense,
        ),
        inputs,
        shape(dtype=jnp.float32),
        loss=lepton.losses.squared_error,
        **draw.rest(),
    )

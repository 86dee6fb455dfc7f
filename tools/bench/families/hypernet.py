"""A hypernetwork (Ha et al. 2017): one net makes another's kernels for each sample."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Dense


class HyperNet(nnx.Module):
    """A context of each sample becomes low-rank kernels that map its points."""

    def __init__(
        self,
        context: int,
        points: int,
        hidden: int,
        rank: int,
        turns: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.enter = nnx.Linear(points, hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, points, rngs=rngs)
        self.shape = (2, hidden, rank)
        widths = (context, hidden, 2 * hidden * rank)
        self.makers = nnx.List([Dense(widths, rngs=rngs) for _ in range(turns)])

    def __call__(
        self,
        context: jax.Array,
        points: jax.Array,
    ) -> jax.Array:
        """Map (batch, context) and (batch, n, points) to (batch, n, points)."""
        x = self.enter(points)
        for make in self.makers:
            kernels = make(context).reshape(
                -1,
                *self.shape,
            )
            inner = jnp.einsum(
                "bnh,bhr->bnr",
                x,
                kernels[:, 0],
            )
            x = x + jnp.einsum(
                "bnr,bhr->bnh",
                nnx.silu(inner),
                kernels[:, 1],
            )
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw widths, rank, points and turns."""
    context = draw.width(32, 512)
    points = draw.width(8, 128)
    count = draw.length(16, 512)
    model = partial(
        HyperNet,
        context,
        points,
        draw.width(64, 512),
        draw.choice((4, 8, 16, 24)),
        draw.randint(1, 4),
    )
    inputs = {
        "context": shape(context, dtype=jnp.float32),
        "points": shape(count, points, dtype=jnp.float32),
    }
    return Case(
        model,
        inputs,
        shape(count, points, dtype=jnp.float32),
        loss=lepton.losses.squared_error,
        **draw.rest(),
    )

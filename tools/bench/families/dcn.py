"""DCN-v2 (Wang et al. 2021): cross layers next to dense ones, for clicks."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Dense


class DCN(nnx.Module):
    """One table for all fields; crosses of the concatenated embeddings; a tower."""

    def __init__(
        self,
        rows: int,
        dim: int,
        fields: int,
        crosses: int,
        hidden: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
    ):
        width = dim * fields
        self.table = nnx.Embed(rows, dim, rngs=rngs)
        self.crosses = nnx.List(
            [
                nnx.Linear(
                    width,
                    width,
                    rngs=rngs,
                )
                for _ in range(crosses)
            ]
        )
        self.tower = Dense(
            (width, *hidden),
            rngs=rngs,
        )
        self.out = nnx.Linear(
            width + hidden[-1],
            1,
            rngs=rngs,
        )

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Map ids int32 (batch, fields) to logits (batch,)."""
        first = self.table(ids).reshape(
            ids.shape[0],
            -1,
        )
        crossed = first
        for cross in self.crosses:
            crossed = first * cross(crossed) + crossed
        both = jnp.concatenate(
            [crossed, self.tower(first)],
            axis=-1,
        )
        return self.out(both)[:, 0]


def case(draw: Draw) -> Case:
    """Draw rows, fields, crosses and a tower."""
    fields = draw.randint(8, 40)
    hidden = [draw.width(256, 1536) for _ in range(draw.randint(1, 3))]
    model = partial(
        DCN,
        draw.width(100_000, 3_000_000),
        draw.choice((8, 16, 32, 40)),
        fields,
        draw.randint(1, 4),
        tuple(hidden),
    )
    return Case(
        model,
        shape(fields),
        shape(dtype=jnp.float32),
        loss=lepton.losses.binary_cross_entropy,
        ids=model.args[0],
        **draw.rest(),
    )

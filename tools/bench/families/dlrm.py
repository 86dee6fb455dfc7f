"""DLRM (Naumov et al. 2019): a table for each field, dot products of all pairs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Dense


class DLRM(nnx.Module):
    """Dense features and ids to the chance of a click."""

    def __init__(
        self,
        rows: tuple[int, ...],
        dim: int,
        numbers: int,
        bottom: tuple[int, ...],
        top: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
    ):
        pairs = (len(rows) + 1) * len(rows) // 2
        self.tables = nnx.List(
            [
                nnx.Embed(
                    n,
                    dim,
                    rngs=rngs,
                )
                for n in rows
            ]
        )
        self.bottom = Dense(
            (numbers, *bottom, dim),
            rngs=rngs,
        )
        self.top = Dense(
            (pairs + dim, *top, 1),
            rngs=rngs,
        )

    def __call__(
        self,
        numbers: jax.Array,
        ids: jax.Array,
    ) -> jax.Array:
        """Map float32 (batch, n) and int32 (batch, fields) to logits (batch,)."""
        dense = self.bottom(numbers)
        vectors = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        vectors = [vector.astype(dense.dtype) for vector in vectors]
        every = jnp.stack(
            [dense, *vectors],
            axis=1,
        )
        products = jnp.einsum("bid,bjd->bij", every, every)
        left, right = np.triu_indices(
            every.shape[1],
            1,
        )
        crossed = products[:, left, right]
        return self.top(
            jnp.concatenate(
                [dense, crossed],
                axis=-1,
            )
        )[:, 0]


def case(draw: Draw) -> Case:
    """Draw the fields, their rows and both towers."""
    fields = draw.randint(3, 10)
    numbers = draw.randint(4, 40)
    rows = tuple(draw.width(1_000, 2_000_000) for _ in range(fields))
    bottom = tuple(draw.width(64, 1024) for _ in range(draw.randint(1, 2)))
    top = tuple(draw.width(128, 2048) for _ in range(draw.randint(1, 3)))
    inputs = {
        "numbers": shape(numbers, dtype=jnp.float32),
        "ids": shape(fields),
    }
    return Case(
        partial(
            DLRM,
            rows,
            draw.choice((16, 32, 64, 100)),
            numbers,
            bottom,
            top,
        ),
        inputs,
        shape(dtype=jnp.float32),
        loss=lepton.losses.binary_cross_entropy,
        ids=min(rows),
        **draw.rest(),
    )

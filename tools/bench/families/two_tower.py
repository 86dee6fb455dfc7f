"""Matrix factorization with towers: users and items to one rating."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Dense


class TwoTower(nnx.Module):
    """An embedding and dense layers for each side; the rating is a dot product."""

    def __init__(
        self,
        users: int,
        items: int,
        dim: int,
        hidden: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
    ):
        self.users = nnx.Embed(users, dim, rngs=rngs)
        self.items = nnx.Embed(items, dim, rngs=rngs)
        self.user_bias = nnx.Embed(users, 1, rngs=rngs)
        self.user_tower = Dense(
            (dim, *hidden),
            rngs=rngs,
        )
        self.item_tower = Dense(
            (dim, *hidden),
            rngs=rngs,
        )

    def __call__(
        self,
        user: jax.Array,
        item: jax.Array,
    ) -> jax.Array:
        """Map ids int32 (batch,) and (batch,) to ratings (batch,)."""
        left = self.user_tower(self.users(user))
        right = self.item_tower(self.items(item))
        return (left * right).sum(axis=-1) + self.user_bias(user)[:, 0]


def case(draw: Draw) -> Case:
    """Draw rows, the dim and the towers."""
    hidden = [draw.width(64, 1024) for _ in range(draw.randint(1, 3))]
    model = partial(
        TwoTower,
        draw.width(50_000, 5_000_000),
        draw.width(10_000, 1_000_000),
        draw.choice((16, 32, 50, 64, 128)),
        tuple(hidden),
    )
    return Case(
        model,
        {"user": shape(), "item": shape()},
        shape(dtype=jnp.float32),
        loss=lepton.losses.squared_error,
        ids=min(model.args[:2]),
        **draw.rest(),
    )

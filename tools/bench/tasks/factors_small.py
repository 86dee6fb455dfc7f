"""MovieLens ratings: matrix factors from N(0, 0.01), with biases."""

from functools import partial
from pathlib import Path

import jax
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks


class Factors(nnx.Module):
    """Biases of user and item plus the product of their factors."""

    def __init__(self, users: int, items: int, dim: int, *, rngs: nnx.Rngs):
        drawn = nnx.initializers.normal(0.01)
        zeros = nnx.initializers.zeros
        self.users = nnx.Embed(users, dim, embedding_init=drawn, rngs=rngs)
        self.items = nnx.Embed(items, dim, embedding_init=drawn, rngs=rngs)
        self.user_bias = nnx.Embed(users, 1, embedding_init=zeros, rngs=rngs)
        self.item_bias = nnx.Embed(items, 1, embedding_init=zeros, rngs=rngs)

    def __call__(self, user: jax.Array, item: jax.Array) -> jax.Array:
        """Map users and items, int32 (batch,) each, to scores (batch,)."""
        bias = self.user_bias(user) + self.item_bias(item)
        return bias[:, 0] + (self.users(user) * self.items(item)).sum(-1)


def task(data: Path) -> tasks.Task:
    """Return the task; the mean of all ratings is taken off beforehand."""
    users, items, stars = tasks.ratings(data)
    samples = Arrays({"user": users, "item": items}, stars - stars.mean())
    model = partial(Factors, int(users.max()) + 1, int(items.max()) + 1, 8)
    return tasks.task_of(
        model,
        tasks.three(samples, 0.1, 0.1),
        600,
        256,
        loss=losses.squared_error,
    )

"""MovieLens: which of two films a user has rated, by factors and a pairwise loss.

Rendle et al. 2009, "BPR: Bayesian Personalized Ranking from Implicit Feedback".
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

SAMPLES = 40000


class Ranker(nnx.Module):
    """Factors of users and films, and a bias of each film."""

    def __init__(self, users: int, items: int, dim: int, *, rngs: nnx.Rngs):
        drawn = nnx.initializers.normal(0.1)
        zeros = nnx.initializers.zeros
        self.users = nnx.Embed(users, dim, embedding_init=drawn, rngs=rngs)
        self.items = nnx.Embed(items, dim, embedding_init=drawn, rngs=rngs)
        self.biases = nnx.Embed(items, 1, embedding_init=zeros, rngs=rngs)

    def __call__(
        self, user: jax.Array, rated: jax.Array, other: jax.Array
    ) -> jax.Array:
        """Map three int32 (batch,) to the logit of the rated film, (batch,)."""
        away = self.items(rated) - self.items(other)
        bias = self.biases(rated) - self.biases(other)
        return (self.users(user) * away).sum(-1) + bias[:, 0]


def preferred(logits: jax.Array, ones: jax.Array) -> jax.Array:
    """Return the loss of each pair."""
    return optax.sigmoid_binary_cross_entropy(logits, ones)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    users, items, _ = tasks.ratings(data)
    random = np.random.default_rng(14)
    few = random.permutation(len(users))[:SAMPLES]
    other = random.integers(0, items.max() + 1, SAMPLES).astype(np.int32)
    inputs = {"user": users[few], "rated": items[few], "other": other}
    model = partial(Ranker, int(users.max()) + 1, int(items.max()) + 1, 8)
    samples = Arrays(inputs, np.ones(SAMPLES, np.float32))
    parts = tasks.three(samples, 0.05, 0.1)
    return tasks.task_of(model, parts, 480, 128, loss=preferred)

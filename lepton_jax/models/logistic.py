"""Logistic regression."""

from __future__ import annotations

import jax
from flax import nnx


class Logistic(nnx.Module):
    """One linear layer to one logit; its sigmoid is the probability of class 1."""

    def __init__(
        self,
        features: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.linear = nnx.Linear(features, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Inputs (batch, features) to logits (batch,)."""
        return self.linear(x)[:, 0]

"""Logistic regression."""

from __future__ import annotations

import jax
from flax import nnx


class Logistic(nnx.Module):
    """One linear layer to one logit, whose sigmoid is the probability of class 1.

    Args:
      features: numbers of a sample.
      rngs: stream `params`.
    """

    def __init__(
        self,
        features: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.linear = nnx.Linear(features, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map inputs (batch, features) to logits (batch,)."""
        return self.linear(x)[:, 0]

"""A factorization machine."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.fields import Fields


class FactorizationMachine(nnx.Module):
    """A logit: a weight for each feature, and a product of vectors for each two.

    Rendle 2010, "Factorization Machines", equation 1. The sum of the products of all
    pairs takes linear time (lemma 3.1): it is half of the square of the sum less the
    sum of the squares. For vectors 1, 2 and 3 of width one: ((1 + 2 + 3)^2 - (1 + 4 +
    9)) / 2 = 11 = 1 * 2 + 1 * 3 + 2 * 3.

    Args:
      numbers: how many numbers a row has.
      sizes: how many indices each category has.
      dim: width of the vectors; 0 for a linear model, which is a logistic regression
        with the loss `binary_cross_entropy`.
      scale: standard deviation of the vectors' entries at the start.
      rngs: stream `params`.
    """

    def __init__(
        self,
        numbers: int,
        sizes: Sequence[int],
        *,
        dim: int = 8,
        scale: float = 0.01,
        rngs: nnx.Rngs,
    ):
        self.linear = Fields(numbers, sizes, dim=1, scale=0.0, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(()))
        width = self.linear.width
        self.weights = nnx.Param(jnp.zeros(width)) if width else None

        def fields() -> Fields:
            return Fields(numbers, sizes, dim=dim, scale=scale, rngs=rngs)

        def vectors() -> nnx.Param:
            drawn = jax.random.normal(rngs.params(), (width, dim))
            return nnx.Param(scale * drawn)

        self.fields = fields() if dim else None
        self.vectors = vectors() if dim and width else None

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Map rows to logits (batch,).

        Args:
          numbers: float32 (batch, a), NaN where missing.
          categories: int32 (batch, c).
        """
        marked, weights = self.linear(numbers, categories)
        logits = self.bias[...]
        if weights is not None:
            logits = logits + weights.sum((1, 2))
        if marked is not None and self.weights is not None:
            logits = logits + marked @ self.weights[...]
        if self.fields is None:
            return logits

        _, vectors = self.fields(numbers, categories)
        parts = [] if vectors is None else [vectors]
        if marked is not None and self.vectors is not None:
            parts.append(marked[..., None] * self.vectors[...])
        features = jnp.concatenate(parts, axis=1)
        sums = jnp.square(features.sum(1)) - jnp.square(features).sum(1)
        return logits + sums.sum(-1) / 2

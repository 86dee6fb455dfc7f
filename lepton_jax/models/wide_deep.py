"""A linear model and a small network whose logits are added."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.fields import Fields
from lepton_jax.models.fm import FactorizationMachine


class WideDeep(nnx.Module):
    """A logit: a weight for each feature, plus a network of vectors of them.

    Cheng et al. 2016, "Wide & Deep Learning for Recommender Systems", section 3,
    without products of features made by hand. Both parts start at zero, so that with
    few rows, and a penalty on its weights, the network adds only what the linear model
    misses.

    Args:
      numbers: how many numbers a row has.
      sizes: how many indices each category has.
      dim: width of a category's vector.
      hidden: units of the network's hidden layer.
      dropout: share of the hidden units, and of the inputs, dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        numbers: int,
        sizes: Sequence[int],
        *,
        dim: int = 8,
        hidden: int = 64,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.wide = FactorizationMachine(
            numbers,
            sizes,
            dim=0,
            rngs=rngs,
        )
        self.fields = Fields(numbers, sizes, dim=dim, rngs=rngs)
        width = self.fields.width + dim * len(sizes)
        self.hidden = nnx.Linear(width, hidden, rngs=rngs)
        self.out = nnx.Linear(
            hidden,
            1,
            use_bias=False,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.dropout = dropout_layer(dropout, rngs)

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
        marked, vectors = self.fields(numbers, categories)
        parts = [] if marked is None else [marked]
        if vectors is not None:
            parts.append(vectors.reshape(vectors.shape[0], -1))
        x = self._dropped(jnp.concatenate(parts, axis=-1))
        x = self._dropped(nnx.relu(self.hidden(x)))
        return self.wide(numbers, categories) + self.out(x)[:, 0]

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.dropout is None:
            return x
        return self.dropout(x)

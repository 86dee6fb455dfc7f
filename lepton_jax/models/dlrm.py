"""A deep learning recommendation model."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models.fields import Fields
from lepton_jax.models.mlp import MLP


class DLRM(nnx.Module):
    """A logit from numbers and categories, of which each two interact by a product.

    Naumov et al. 2019, "Deep Learning Recommendation Model for Personalization and
    Recommendation Systems", section 2: an MLP makes a vector of the numbers; the
    products of each two vectors, that one among them, go with it into a second MLP.

    Args:
      numbers: how many numbers a row has.
      sizes: how many indices each category has.
      dim: width of the vectors.
      bottom: widths of the hidden layers of the numbers' MLP.
      top: widths of the hidden layers of the last MLP.
      dropout: share of the hidden units that are dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        numbers: int,
        sizes: Sequence[int],
        *,
        dim: int = 16,
        bottom: Sequence[int] = (64,),
        top: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.fields = Fields(numbers, sizes, dim=dim, rngs=rngs)
        widths = (self.fields.width, *bottom, dim)
        self.bottom = MLP(widths, dropout=dropout, rngs=rngs) if numbers else None

        vectors = len(sizes) + bool(numbers)
        self.pairs = tuple(itertools.combinations(range(vectors), 2))
        # of a single category there are no products, and its vector is fed itself
        inputs = len(self.pairs) + dim * bool(numbers) or dim
        self.top = MLP((inputs, *top, 1), dropout=dropout, rngs=rngs)

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
        parts = []
        if marked is not None and self.bottom is not None:
            dense = nnx.relu(self.bottom(marked))
            parts.append(dense)
            first = dense[:, None]
            vectors = (
                first if vectors is None else jnp.concatenate([first, vectors], axis=1)
            )
        if vectors is None:
            raise ValueError("a row needs numbers or categories")

        if self.pairs:
            rows, columns = np.array(self.pairs).T
            products = jnp.einsum("bid,bjd->bij", vectors, vectors)
            parts.append(products[:, rows, columns])
        x = jnp.concatenate(parts or [vectors[:, 0]], axis=-1)
        return self.top(x)[:, 0]

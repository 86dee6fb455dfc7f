"""A deep and cross network of the second kind."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.fields import Fields
from lepton_jax.models.mlp import MLP


class DCN(nnx.Module):
    """A logit from numbers and categories by cross layers, then an MLP.

    Wang et al. 2021, "DCN V2: Improved Deep & Cross Network and Practical Lessons for
    Web-scale Learning to Rank Systems", equations 1 and 2, stacked: with the inputs x0,
    a cross layer makes x0 * (W x + b) + x of x, so that L of them hold all products of
    up to L + 1 inputs. With a rank, W is the product of two thin kernels (equation 3).

    Args:
      numbers: how many numbers a row has.
      sizes: how many indices each category has.
      dim: width of a category's vector.
      crosses: how many cross layers.
      rank: of their kernels; None: the full one.
      hidden: widths of the hidden layers of the MLP.
      dropout: share of the hidden units, and of the inputs, dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        numbers: int,
        sizes: Sequence[int],
        *,
        dim: int = 16,
        crosses: int = 2,
        rank: int | None = None,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.fields = Fields(numbers, sizes, dim=dim, rngs=rngs)
        width = self.fields.width + dim * len(sizes)
        layers = [_Cross(width, rank, rngs=rngs) for _ in range(crosses)]
        self.crosses = nnx.List(layers)
        self.mlp = MLP((width, *hidden, 1), dropout=dropout, rngs=rngs)
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
        inputs = jnp.concatenate(parts, axis=-1)
        if self.dropout is not None:
            inputs = self.dropout(inputs)
        x = inputs
        for cross in self.crosses:
            x = inputs * cross(x) + x
        return self.mlp(x)[:, 0]


class _Cross(nnx.Module):
    """The linear part of a cross layer."""

    def __init__(self, width: int, rank: int | None, *, rngs: nnx.Rngs):
        inner = rank or width
        down = nnx.Linear(width, inner, use_bias=False, rngs=rngs) if rank else None
        self.down = down
        self.up = nnx.Linear(inner, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.up(x if self.down is None else self.down(x))

"""A multi-layer perceptron."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
from flax import nnx

from lepton_jax.models.dropping import dropout_layer


class MLP(nnx.Module):
    """Linear layers with ReLU, and dropout if asked for, between them.

    Args:
      features: widths from the inputs to the outputs, e.g. (784, 128, 10).
      dropout: share of the hidden units that are dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: there are fewer than two widths, or the dropout is no share.
    """

    def __init__(
        self,
        features: Sequence[int],
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if len(features) < 2:
            raise ValueError(
                f"features {tuple(features)} need an input and an output width"
            )
        self.layers = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(features)]
        )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        self.dropout = dropout_layer(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map inputs (batch, ...), flattened, to outputs (batch, features[-1])."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
            if self.dropout is not None:
                x = self.dropout(x)
        return self.layers[-1](x)

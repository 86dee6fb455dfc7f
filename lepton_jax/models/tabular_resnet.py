"""A residual network for tables of numbers and categories."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from lepton_jax.models.tabular_front import Scaled, TabularFront, dropout_of


class TabularResNet(nnx.Module):
    """Residual blocks of two layers, with batch norm before them.

    Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data", section
    3.2:

        block(x) = x + Dropout(Linear(Dropout(ReLU(Linear(BatchNorm(x))))))
        outputs  = Linear(ReLU(BatchNorm(blocks(Linear(features)))))

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      width: of the blocks' inputs and outputs.
      inner: width inside of a block.
      blocks: count of blocks.
      dropout: share of the units inside of a block that are dropped in training.
      residual_dropout: share of a block's outputs that are dropped.
      center: the outputs are center + spread * the last layer's, so that a quantity far
        from 0 and 1 can be learned in its own unit; a number, or one for each output.
      spread: see `center`.
      front: arguments of `TabularFront`: edges, sizes, and kind of numbers.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: there are neither numbers nor categories, edges do not ascend, or a
        dropout is no share.
    """

    def __init__(
        self,
        outputs: int | None,
        *,
        width: int = 192,
        inner: int = 256,
        blocks: int = 2,
        dropout: float = 0.15,
        residual_dropout: float = 0.0,
        center: float | Sequence[float] = 0.0,
        spread: float | Sequence[float] = 1.0,
        front: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        self.front = TabularFront(**front, rngs=rngs)
        linear = partial(nnx.Linear, rngs=rngs)
        self.first = linear(self.front.width, width)
        self.blocks = nnx.List(
            [
                _Block(width, inner, dropout, residual_dropout, rngs)
                for _ in range(blocks)
            ]
        )
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.scaled = Scaled(outputs, center, spread)
        self.last = linear(width, self.scaled.width)

    def __call__(
        self,
        numbers: jax.Array | None = None,
        categories: jax.Array | None = None,
    ) -> jax.Array:
        """Map rows of a table to outputs (batch, outputs), or (batch,).

        Args:
          numbers: float32 (batch, a), NaN where missing.
          categories: int32 (batch, c).
        """
        x = self.first(self.front(numbers, categories))
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x))
        return self.scaled(self.last(x))


class _Block(nnx.Module):
    def __init__(
        self,
        width: int,
        inner: int,
        dropout: float,
        residual_dropout: float,
        rngs: nnx.Rngs,
    ):
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        linear = partial(nnx.Linear, rngs=rngs)
        self.widen = linear(width, inner)
        self.narrow = linear(inner, width)
        self.dropout = dropout_of(dropout, rngs)
        self.residual_dropout = dropout_of(residual_dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, width) to (batch, width)."""
        y = nnx.relu(self.widen(self.norm(x)))
        if self.dropout is not None:
            y = self.dropout(y)
        y = self.narrow(y)
        if self.residual_dropout is not None:
            y = self.residual_dropout(y)
        return x + y

"""FT-Transformer: a Transformer over the columns of a table."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.tabular_front import Scaled, TabularFront, dropout_of

INNER = 4 / 3  # width of the feed-forward part over that of a token (paper, table 14)


class FTTransformer(nnx.Module):
    """Attention over one token a column, and one more whose end is the output.

    Gorishniy et al. 2021, "Revisiting Deep Learning Models for Tabular Data", section
    3.3 and appendix E: norms before attention and feed-forward part (but not before
    the first attention), ReGLU, and a head on the normalized first token.

    Args:
      outputs: number of outputs; None for one without a dim of its own.
      width: of a token.
      heads: of the attention.
      blocks: count of blocks.
      attention_dropout: share of the attention's weights dropped in training.
      dropout: share of the feed-forward part's units dropped.
      center: the outputs are center + spread * the last layer's, so that a quantity far
        from 0 and 1 can be learned in its own unit; a number, or one for each output.
      spread: see `center`.
      front: arguments of `TabularFront`: edges, sizes, and a kind of numbers other than
        "codes"; "linear" is the paper's.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: there are neither numbers nor categories, edges do not ascend, heads
        do not divide the width, the kind of numbers is "codes", or a dropout is no
        share.
    """

    def __init__(
        self,
        outputs: int | None,
        *,
        width: int = 64,
        heads: int = 8,
        blocks: int = 3,
        attention_dropout: float = 0.2,
        dropout: float = 0.1,
        center: float | Sequence[float] = 0.0,
        spread: float | Sequence[float] = 1.0,
        front: dict[str, Any],
        rngs: nnx.Rngs,
    ):
        if front.get("kind", "linear") == "codes":
            raise ValueError("the code of a number is no token; use another kind")
        widths = {"embedding": width, "number_width": width}
        self.front = TabularFront(
            **{"kind": "linear", **front, **widths},
            rngs=rngs,
        )
        columns = len(self.front.widths)
        limit = width**-0.5
        drawn = jax.random.uniform(
            rngs.params(),
            (columns + 1, width),
            minval=-limit,
            maxval=limit,
        )
        # the first is the token of the output, the others are added to the columns'
        self.own = nnx.Param(drawn)
        self.blocks = nnx.List(
            [
                _Block(
                    width,
                    heads,
                    attention_dropout,
                    dropout,
                    number > 0,
                    rngs,
                )
                for number in range(blocks)
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.scaled = Scaled(outputs, center, spread)
        self.last = nnx.Linear(width, self.scaled.width, rngs=rngs)

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
        columns = jnp.concatenate(
            self.front.blocks(numbers, categories),
            axis=1,
        )
        tokens = jnp.pad(columns, ((0, 0), (1, 0), (0, 0)))
        x = tokens + self.own[...]
        for block in self.blocks:
            x = block(x)
        x = nnx.relu(self.norm(x[:, 0]))
        return self.scaled(self.last(x))


class _Block(nnx.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        attention_dropout: float,
        dropout: float,
        has_first_norm: bool,
        rngs: nnx.Rngs,
    ):
        inner = round(width * INNER)
        norm = partial(nnx.LayerNorm, width, rngs=rngs)
        self.first_norm = norm() if has_first_norm else None
        self.attention = nnx.MultiHeadAttention(
            num_heads=heads,
            in_features=width,
            dropout_rate=attention_dropout,
            decode=False,
            deterministic=False,
            rngs=rngs,
        )
        self.norm = norm()
        linear = partial(nnx.Linear, rngs=rngs)
        self.widen = linear(width, 2 * inner)
        self.narrow = linear(inner, width)
        self.dropout = dropout_of(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map tokens (batch, columns, width) to tokens."""
        y = x if self.first_norm is None else self.first_norm(x)
        x = x + self.attention(y)
        both = self.widen(self.norm(x))
        value, gate = jnp.split(both, 2, axis=-1)
        y = value * nnx.relu(gate)
        if self.dropout is not None:
            y = self.dropout(y)
        return x + self.narrow(y)

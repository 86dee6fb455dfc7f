"""A language model of stacked LSTM layers, as Flax has them."""

from __future__ import annotations

from functools import partial

import jax
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class LSTM(nnx.Module):
    """Embedding, LSTM layers over the length, and a head for each token."""

    def __init__(
        self,
        vocab: int,
        dim: int,
        hidden: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        widths = (dim, *(hidden,) * (layers - 1))
        cells = [
            nnx.OptimizedLSTMCell(
                width,
                hidden,
                rngs=rngs,
            )
            for width in widths
        ]
        self.layers = nnx.List([nnx.RNN(cell) for cell in cells])
        self.out = nnx.Linear(hidden, vocab, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, length, vocab)."""
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw vocabulary, widths, layers and length."""
    length = draw.length(32, 512)
    model = partial(
        LSTM,
        draw.vocabulary(),
        draw.width(128, 1024),
        draw.width(256, 2048),
        draw.randint(1, 3),
    )
    return Case(
        model,
        shape(length),
        shape(length),
        ids=model.args[0],
        **draw.rest(),
    )

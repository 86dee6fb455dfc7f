"""GRU encoder and decoder with attention after the recurrence (Luong et al. 2015)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class Seq2Seq(nnx.Module):
    """Source tokens to target tokens."""

    def __init__(
        self,
        vocab: int,
        dim: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.source = nnx.Embed(vocab, dim, rngs=rngs)
        self.target = nnx.Embed(vocab, dim, rngs=rngs)
        self.encoder = nnx.RNN(
            nnx.GRUCell(
                dim,
                hidden,
                rngs=rngs,
            )
        )
        self.decoder = nnx.RNN(
            nnx.GRUCell(
                dim,
                hidden,
                rngs=rngs,
            )
        )
        self.bridge = nnx.Linear(hidden, hidden, rngs=rngs)
        self.join = nnx.Linear(
            2 * hidden,
            dim,
            rngs=rngs,
        )
        self.out = nnx.Linear(
            dim,
            vocab,
            use_bias=False,
            rngs=rngs,
        )

    def __call__(
        self,
        source: jax.Array,
        target: jax.Array,
    ) -> jax.Array:
        """Map int32 (batch, n) and (batch, m) to logits (batch, m, vocab)."""
        memory = self.encoder(self.source(source))
        first = nnx.tanh(self.bridge(memory[:, -1]))
        states = self.decoder(
            self.target(target),
            initial_carry=first,
        )
        scores = jnp.einsum("bmh,bnh->bmn", states, memory)
        weights = jax.nn.softmax(scores, axis=-1)
        context = jnp.einsum("bmn,bnh->bmh", weights, memory)
        both = jnp.concatenate(
            [states, context],
            axis=-1,
        )
        return self.out(nnx.tanh(self.join(both)))


def case(draw: Draw) -> Case:
    """Draw vocabulary, widths and lengths."""
    source = draw.length(16, 256)
    target = draw.length(16, 256)
    model = partial(
        Seq2Seq,
        draw.vocabulary(),
        draw.width(128, 512),
        draw.width(128, 1024),
    )
    return Case(
        model,
        {"source": shape(source), "target": shape(target)},
        shape(target),
        ids=model.args[0],
        **draw.rest(),
    )

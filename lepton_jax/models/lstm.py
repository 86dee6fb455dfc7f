"""A recurrent classifier of texts."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx


class LSTM(nnx.Module):
    """Embedding, one LSTM layer (Hochreiter & Schmidhuber 1997; with the forget gate of
    Gers et al. 2000), logits.

    The forget gate's bias starts at 1 (Jozefowicz et al. 2015, section 2.2).

    Args:
      vocab: number of tokens.
      classes: number of logits.
      dim: width of the embedding.
      hidden: width of the state.
      pool: what the logits are computed from: the "mean" of the states, or the "last".
      padding: token that counts as absent: it leaves the state as it is and has no part
        in the mean. None: no token.
      rngs: stream `params`.
    """

    def __init__(
        self,
        vocab: int,
        classes: int,
        *,
        dim: int = 64,
        hidden: int = 128,
        pool: Literal["mean", "last"] = "mean",
        padding: int | None = 0,
        rngs: nnx.Rngs,
    ):
        if pool not in ("mean", "last"):
            raise ValueError(f"pool is {pool!r}; it must be 'mean' or 'last'")
        self.pool = pool
        self.padding = padding
        self.hidden = hidden
        self.embed = nnx.Embed(vocab, dim, rngs=rngs)
        # The gates (input, forget, cell, output) have a dim of their own, so that
        # either dim can be sharded alone. An initializer sees them flattened.
        self.inputs = nnx.LinearGeneral(
            dim,
            (4, hidden),
            rngs=rngs,
            bias_init=lambda _, shape, dtype: (
                jnp.zeros(shape, dtype).at[hidden : 2 * hidden].set(1)
            ),
        )
        self.recurrent = nnx.LinearGeneral(
            hidden, (4, hidden), use_bias=False, rngs=rngs
        )
        self.out = nnx.Linear(
            hidden,
            classes,
            rngs=rngs,
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Tokens int32 (batch, length) to logits (batch, classes)."""
        present = (
            jnp.ones(tokens.shape, bool)
            if self.padding is None
            else tokens != self.padding
        )
        gates = self.inputs(self.embed(tokens))

        def step(carry: Any, now: Any) -> tuple[Any, None]:
            (state, cell, total), (gates, present) = carry, now
            gates = gates + self.recurrent(state)
            into, forget, new, out = (gates[:, i] for i in range(4))
            after = nnx.sigmoid(forget) * cell + nnx.sigmoid(into) * jnp.tanh(new)
            after_state = nnx.sigmoid(out) * jnp.tanh(after)
            total = total + jnp.where(present, after_state, 0.0)
            return (
                jnp.where(present, after_state, state),
                jnp.where(present, after, cell),
                total,
            ), None

        zeros = jnp.zeros((tokens.shape[0], self.hidden), gates.dtype)
        times = jnp.swapaxes(gates, 0, 1), jnp.swapaxes(present, 0, 1)[..., None]
        (state, _, total), _ = jax.lax.scan(
            step,
            (zeros, zeros, zeros),
            times,
        )
        if self.pool == "mean":
            state = total / jnp.maximum(present.sum(1, keepdims=True), 1).astype(
                total.dtype
            )
        return self.out(state)

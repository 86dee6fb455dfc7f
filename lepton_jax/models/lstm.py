"""A recurrent classifier of texts."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx


class LSTM(nnx.Module):
    """Embedding, one LSTM layer, and logits.

    The layer is that of Hochreiter & Schmidhuber 1997 with the forget gate of Gers et
    al. 2000, whose bias starts at 1 (Jozefowicz et al. 2015, section 2.2).

    Args:
      vocab: number of tokens.
      classes: number of logits.
      dim: width of the embedding.
      hidden: width of the state.
      pool: the logits are computed from the "mean" of the states, or from the "last".
      padding: token that counts as absent: it leaves the state as it is, and the mean
        leaves it out. None: no token.
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
        def open_forget_gate(
            _: Any,
            shape: Any,
            dtype: Any,
        ) -> jax.Array:
            return jnp.zeros(shape, dtype).at[hidden : 2 * hidden].set(1)

        self.inputs = nnx.LinearGeneral(
            dim,
            (4, hidden),
            rngs=rngs,
            bias_init=open_forget_gate,
        )
        self.recurrent = nnx.LinearGeneral(
            hidden,
            (4, hidden),
            use_bias=False,
            rngs=rngs,
        )
        self.out = nnx.Linear(hidden, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, classes)."""
        if self.padding is None:
            present = jnp.ones(tokens.shape, bool)
        else:
            present = tokens != self.padding
        gates = self.inputs(self.embed(tokens))

        zeros = jnp.zeros((tokens.shape[0], self.hidden), gates.dtype)
        # the scan goes over the leading dim, so time comes first
        gates_by_time = jnp.swapaxes(gates, 0, 1)
        present_by_time = jnp.swapaxes(present, 0, 1)[..., None]
        (state, _, total), _ = jax.lax.scan(
            self._step,
            (zeros, zeros, zeros),
            (gates_by_time, present_by_time),
        )
        if self.pool == "mean":
            count = jnp.maximum(present.sum(1, keepdims=True), 1)
            state = total / count.astype(total.dtype)
        return self.out(state)

    def _step(
        self,
        carry: Any,
        inputs: Any,
    ) -> tuple[Any, None]:
        """Go on by one token.

        Args:
          carry: state, cell and the sum of all states, (batch, hidden) each.
          inputs: the token's part of the gates, (batch, 4, hidden), and whether it is
            present, (batch, 1).
        """
        state, cell, total = carry
        gates, present = inputs
        gates = gates + self.recurrent(state)
        into, forget, candidate, out = (gates[:, i] for i in range(4))

        remembered = nnx.sigmoid(forget) * cell
        next_cell = remembered + nnx.sigmoid(into) * jnp.tanh(candidate)
        next_state = nnx.sigmoid(out) * jnp.tanh(next_cell)

        total = total + jnp.where(present, next_state, 0.0)
        state = jnp.where(present, next_state, state)
        cell = jnp.where(present, next_cell, cell)
        return (state, cell, total), None

"""A recurrent classifier of texts."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer


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
      bidirectional: whether a second layer reads the text from its end (Graves &
        Schmidhuber 2005); the logits see both.
      dropout: share of the embeddings and of the pooled states dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.
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
        bidirectional: bool = False,
        dropout: float = 0.0,
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

        project = partial(
            nnx.LinearGeneral,
            dim,
            (4, hidden),
            rngs=rngs,
            bias_init=open_forget_gate,
        )
        recur = partial(
            nnx.LinearGeneral,
            hidden,
            (4, hidden),
            use_bias=False,
            rngs=rngs,
        )
        self.inputs = project()
        self.recurrent = recur()
        self.backward_inputs = project() if bidirectional else None
        self.backward_recurrent = recur() if bidirectional else None
        self.dropout = dropout_layer(dropout, rngs)
        width = 2 * hidden if bidirectional else hidden
        self.out = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map tokens int32 (batch, length) to logits (batch, classes)."""
        if self.padding is None:
            present = jnp.ones(tokens.shape, bool)
        else:
            present = tokens != self.padding
        # the scan goes over the leading dim, so time comes first
        x = jnp.swapaxes(self._dropped(self.embed(tokens)), 0, 1)

        pooled = self._read(self.inputs(x), self.recurrent, present, False)
        if self.backward_inputs is not None:
            gates = self.backward_inputs(x)
            back = self._read(gates, self.backward_recurrent, present, True)
            pooled = jnp.concatenate([pooled, back], axis=-1)
        return self.out(self._dropped(pooled))

    def _read(
        self,
        gates: jax.Array,
        recurrent: Any,
        present: jax.Array,
        from_end: bool,
    ) -> jax.Array:
        """Return the pooled states of one direction, (batch, hidden).

        Args:
          gates: the inputs' part of them, (length, batch, 4, hidden).
          recurrent: the state's part: (batch, hidden) to (batch, 4, hidden).
          present: which tokens count, bool (batch, length).
          from_end: whether the text is read from its end.
        """
        zeros = jnp.zeros((gates.shape[1], self.hidden), gates.dtype)
        present_by_time = jnp.swapaxes(present, 0, 1)[..., None]
        (state, _, total), _ = jax.lax.scan(
            partial(_step, recurrent),
            (zeros, zeros, zeros),
            (gates, present_by_time),
            reverse=from_end,
        )
        if self.pool == "last":
            return state
        count = jnp.maximum(present.sum(1, keepdims=True), 1)
        return total / count.astype(total.dtype)

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.dropout is None:
            return x
        return self.dropout(x)


def _step(
    recurrent: Any,
    carry: Any,
    inputs: Any,
) -> tuple[Any, None]:
    """Go on by one token.

    Args:
      recurrent: the state's part of the gates.
      carry: state, cell and the sum of all states, (batch, hidden) each.
      inputs: the token's part of the gates, (batch, 4, hidden), and whether it is
        present, (batch, 1).
    """
    state, cell, total = carry
    gates, present = inputs
    gates = gates + recurrent(state)
    into, forget, candidate, out = (gates[:, i] for i in range(4))

    remembered = nnx.sigmoid(forget) * cell
    next_cell = remembered + nnx.sigmoid(into) * jnp.tanh(candidate)
    next_state = nnx.sigmoid(out) * jnp.tanh(next_cell)

    total = total + jnp.where(present, next_state, 0.0)
    state = jnp.where(present, next_state, state)
    cell = jnp.where(present, next_cell, cell)
    return (state, cell, total), None

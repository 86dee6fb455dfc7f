"""A classifier of texts with gated recurrent units."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer


class GRU(nnx.Module):
    """Embedding, one GRU layer, and logits.

    The layer is that of Cho et al. 2014, with the reset gate behind the recurrent
    product, so that a step has one product (the form of cuDNN; Chung et al. 2014 have
    the gate before it):

        reset, update = sigmoid(x W + h U)
        candidate = tanh(x W + reset * (h U + b))
        h = (1 - update) * candidate + update * h

    Args:
      vocab: number of tokens.
      classes: number of logits.
      dim: width of the embedding.
      hidden: width of the state.
      pool: the logits are computed from the "mean" of the states, or from the "last".
      padding: token that counts as absent: it leaves the state as it is, and the mean
        leaves it out. None: no token.
      bidirectional: whether a second layer reads the text from its end; the logits see
        both.
      dropout: share of the embeddings and of the pooled states dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: there is no such pooling.
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

        # reset, update and candidate have a dim of their own, so that either dim can be
        # sharded alone
        project = partial(nnx.LinearGeneral, dim, (3, hidden), rngs=rngs)
        recur = partial(nnx.LinearGeneral, hidden, (3, hidden), rngs=rngs)
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
          gates: the inputs' part of them, (length, batch, 3, hidden).
          recurrent: the state's part: (batch, hidden) to (batch, 3, hidden).
          present: which tokens count, bool (batch, length).
          from_end: whether the text is read from its end.
        """
        zeros = jnp.zeros((gates.shape[1], self.hidden), gates.dtype)
        present_by_time = jnp.swapaxes(present, 0, 1)[..., None]
        (state, total), _ = jax.lax.scan(
            partial(_step, recurrent),
            (zeros, zeros),
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
      carry: state and the sum of all states, (batch, hidden) each.
      inputs: the token's part of the gates, (batch, 3, hidden), and whether it is
        present, (batch, 1).
    """
    state, total = carry
    gates, present = inputs
    past = recurrent(state)
    reset = nnx.sigmoid(gates[:, 0] + past[:, 0])
    update = nnx.sigmoid(gates[:, 1] + past[:, 1])
    candidate = jnp.tanh(gates[:, 2] + reset * past[:, 2])
    next_state = (1 - update) * candidate + update * state

    total = total + jnp.where(present, next_state, 0.0)
    state = jnp.where(present, next_state, state)
    return (state, total), None

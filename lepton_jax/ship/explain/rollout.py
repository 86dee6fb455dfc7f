"""Attention roll-out: how much of each token reaches each token of the last layer.

The weights of a layer's heads are averaged, half of each token is added for the
residual connection, and the layers are multiplied (Abnar and Zuidema 2020, "Quantifying
Attention Flow in Transformers", section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.errors import ModelError
from lepton_jax.ship.explain.subject import subject_of
from lepton_jax.ship.explain.watching import is_attention, seeing

METHOD = "attention_rollout"


@dataclass(frozen=True)
class Rollout:
    """Flow of attention from tokens to tokens.

    Attributes:
      layers: weights of each layer, the mean over its heads, (rows, length, length).
      flow: share of token j that is in token i after the last layer,
        (rows, length i, length j); those of an i add up to 1.
    """

    layers: list[np.ndarray]
    flow: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """Mean over the tokens of the last layer, (rows, length): add up to 1."""
        return self.flow.mean(axis=1)

    def to_fields(self) -> dict[str, Any]:
        """Return the shares of the tokens as plain data."""
        return {"method": METHOD, "tokens": self.tokens.tolist()}


def attention_rollout(
    model: Any,
    inputs: Any,
) -> Rollout:
    """Return the flow of attention through a model's layers.

    Args:
      model: a `Trainer` whose model has self-attention, outside of loops.
      inputs: rows: an array, a dict of arrays by name, or raw rows.

    Raises:
      ModelError: the model is an artifact, or has no attention that can be seen.
      DataError: the rows are not the model's inputs.
    """
    subject = subject_of(model)
    if not subject.is_open:
        raise ModelError(
            "the program of an artifact can't be looked into",
            where=METHOD,
            remedy='explain it by "occlusion", or the trainer that it was made of',
        )
    rows = subject.inputs_of(inputs)
    look = seeing(subject.run, is_attention)
    # One row at a time: then what lies before the tokens are heads, in whatever order
    # an attention has them.
    by_row = [
        [_over_heads(one.value) for one in look(_row(rows, at))]
        for at in range(len(next(iter(rows.values()))))
    ]
    found = [np.stack(layer) for layer in zip(*by_row, strict=True)]
    if not found or len({weights.shape for weights in found}) > 1:
        raise ModelError(
            "the model has no self-attention that can be seen, of one length",
            where=METHOD,
            remedy='explain it by "integrated_gradients"',
        )
    length = found[0].shape[-1]
    identity = np.eye(length, dtype=np.float32)
    flow: np.ndarray = np.broadcast_to(identity, found[0].shape)
    for weights in found:
        flow = (weights + identity) / 2 @ flow
    return Rollout(found, flow)


def _row(
    rows: dict[str, np.ndarray],
    at: int,
) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array[at : at + 1]) for name, array in rows.items()}


def _over_heads(weights: jax.Array) -> np.ndarray:
    """Return the mean over all dims but the last two, (length, length)."""
    array = np.asarray(weights, np.float32)
    return array.reshape(-1, *array.shape[-2:]).mean(axis=0)

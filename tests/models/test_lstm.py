from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")


def by_hand(model: models.LSTM, tokens: np.ndarray) -> np.ndarray:
    """One text after the other, padding left out."""
    table, kernel, bias, recurrent = (
        np.asarray(x[...], np.float64)
        for x in (
            model.embed.embedding,
            model.inputs.kernel,
            model.inputs.bias,
            model.recurrent.kernel,
        )
    )

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    pooled = []
    for text in tokens:
        state = cell = np.zeros(model.hidden)
        states = []
        for token in text[text != model.padding]:
            into, forget, new, out = (
                np.einsum("d,dgh->gh", table[token], kernel)
                + bias
                + np.einsum("d,dgh->gh", state, recurrent)
            )
            cell = sigmoid(forget) * cell + sigmoid(into) * np.tanh(new)
            state = sigmoid(out) * np.tanh(cell)
            states.append(state)
        pooled.append(
            state
            if model.pool == "last"
            else np.sum(states, axis=0) / max(1, len(states)) * np.ones(model.hidden)
        )
    return np.stack(pooled) @ np.asarray(model.out.kernel[...]) + np.asarray(
        model.out.bias[...]
    )


@pytest.mark.parametrize("pool", ["mean", "last"])
@pytest.mark.parametrize("padding", [0, None])
def test_it_computes_the_recurrence(pool, padding):
    model = models.LSTM(
        9,
        3,
        dim=4,
        hidden=6,
        pool=pool,
        padding=padding,
        rngs=nnx.Rngs(0),
    )
    tokens = np.array(
        [
            [3, 1, 4, 1, 5],
            [2, 7, 0, 0, 0],
            [0, 8, 0, 2, 8],
            [0, 0, 0, 0, 0],
        ]
    )
    np.testing.assert_allclose(
        model(jnp.asarray(tokens)),
        by_hand(model, tokens),
        atol=1e-5,
    )
    np.testing.assert_array_equal(
        model.inputs.bias[...],
        [
            [0] * 6,
            [1] * 6,
            [0] * 6,
            [0] * 6,
        ],
    )


def test_gradients_reach_every_parameter_through_all_steps():
    model = models.LSTM(
        9,
        3,
        dim=4,
        hidden=6,
        rngs=nnx.Rngs(0),
    )
    tokens = jax.random.randint(
        jax.random.key(0),
        (4, 7),
        1,
        9,
    )
    for path, leaf in nnx.to_flat_state(
        nnx.grad(lambda m: jnp.square(m(tokens)).sum())(model)
    ):
        assert (leaf[...] != 0).any(), path


def test_an_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'max'"):
        models.LSTM(
            9,
            3,
            pool="max",
            rngs=nnx.Rngs(0),
        )

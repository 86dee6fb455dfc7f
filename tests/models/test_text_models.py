from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax import models

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = np.array([[3, 1, 4, 1, 5, 2], [2, 7, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
SMALL = {"dim": 8}
MODELS = {
    "bag": lambda rngs, **more: models.BagOfWords(3, 9, **SMALL, **more, rngs=rngs),
    "conv": lambda rngs, **more: models.TextCNN(
        3, 9, **SMALL, filters=5, **more, rngs=rngs
    ),
    "gru": lambda rngs, **more: models.GRU(
        9, 3, **SMALL, hidden=6, bidirectional=True, **more, rngs=rngs
    ),
    "lstm": lambda rngs, **more: models.LSTM(
        9, 3, **SMALL, hidden=6, bidirectional=True, **more, rngs=rngs
    ),
    "encoder": lambda rngs, **more: models.TextEncoder(
        3, 9, **SMALL, heads=2, **more, rngs=rngs
    ),
}


# one compilation for each model, in place of one for each of its operations
applied = nnx.jit(lambda model, tokens: model(tokens))
sensitivities = nnx.jit(nnx.grad(lambda model, tokens: jnp.square(model(tokens)).sum()))


def value(x) -> np.ndarray:
    return np.asarray(x[...], np.float64)


@pytest.mark.parametrize("name", MODELS)
def test_padding_at_the_end_changes_nothing(name):
    model = MODELS[name](nnx.Rngs(0))
    model.eval()
    tokens = jnp.asarray(TOKENS)
    longer = jnp.pad(tokens, ((0, 0), (0, 3)))
    logits = applied(model, tokens)
    assert logits.shape == (3, 3)
    assert jnp.isfinite(logits).all()
    np.testing.assert_allclose(applied(model, longer), logits, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_dropout_acts_in_training_alone_and_gradients_reach_everything(name):
    model = MODELS[name](nnx.Rngs(0), dropout=0.5)
    tokens = jnp.asarray(TOKENS[:2])
    model.train()
    assert not np.allclose(applied(model, tokens), applied(model, tokens))
    model.eval()
    np.testing.assert_array_equal(applied(model, tokens), applied(model, tokens))
    gradients = sensitivities(model, tokens)
    for path, leaf in nnx.to_flat_state(gradients):
        # a key's bias moves all scores of a query alike, and the softmax not at all
        if path[-2:] != ("key", "bias"):
            assert (leaf[...] != 0).any(), path


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_second_direction_reads_the_text_from_its_end(name):
    model = MODELS[name](nnx.Rngs(0))
    text = jnp.asarray([[3, 1, 4, 1]])
    logits = model(text)
    model.inputs, model.backward_inputs = model.backward_inputs, model.inputs
    model.recurrent, model.backward_recurrent = (
        model.backward_recurrent,
        model.recurrent,
    )
    kernel = model.out.kernel[...]
    model.out.kernel[...] = jnp.concatenate([kernel[6:], kernel[:6]])
    np.testing.assert_allclose(model(text[:, ::-1]), logits, atol=1e-5)


def test_a_gru_computes_the_recurrence():
    model = models.GRU(9, 3, dim=4, hidden=5, rngs=nnx.Rngs(0))
    model.recurrent.bias[...] = jax.random.normal(jax.random.key(1), (3, 5))

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    table = value(model.embed.embedding)
    kernel = value(model.inputs.kernel)
    bias = value(model.inputs.bias)
    recurrent = value(model.recurrent.kernel)
    recurrent_bias = value(model.recurrent.bias)
    pooled = []
    for text in TOKENS[:2]:
        state = np.zeros(5)
        states = []
        for token in text[text != 0]:
            x = np.einsum("d,dgh->gh", table[token], kernel) + bias
            h = np.einsum("d,dgh->gh", state, recurrent) + recurrent_bias
            reset = sigmoid(x[0] + h[0])
            update = sigmoid(x[1] + h[1])
            new = np.tanh(x[2] + reset * h[2])
            state = (1 - update) * new + update * state
            states.append(state)
        pooled.append(np.mean(states, axis=0))
    expected = np.stack(pooled) @ value(model.out.kernel) + value(model.out.bias)
    np.testing.assert_allclose(model(jnp.asarray(TOKENS[:2])), expected, atol=1e-5)


def test_a_convolution_sees_each_window_of_a_text():
    model = models.TextCNN(3, 9, dim=4, filters=5, dropout=0, rngs=nnx.Rngs(0))
    table = value(model.embed.embedding)
    features = []
    for text in TOKENS:
        vectors = np.where((text != 0)[:, None], table[text], 0)
        maxima = []
        for width, layer in zip((3, 4, 5), model.convolutions, strict=True):
            long = np.concatenate([vectors, np.zeros((width - 1, 4))])
            starts = np.flatnonzero(text)
            windows = [long[i : i + width] for i in starts] or [np.zeros((width, 4))]
            values = np.einsum("nwd,wdf->nf", np.stack(windows), value(layer.kernel))
            maxima.append(np.maximum(values + value(layer.bias), 0).max(0))
        features.append(np.concatenate(maxima))
    expected = np.stack(features) @ value(model.out.kernel) + value(model.out.bias)
    np.testing.assert_allclose(model(jnp.asarray(TOKENS)), expected, atol=1e-5)
    assert model(jnp.asarray([[3, 1]])).shape == (1, 3)  # shorter than the filters


def test_ngrams_are_summed_with_their_ratios_which_are_not_trained():
    ratios = np.arange(12.0).reshape(6, 2)
    model = models.NgramLinear(2, 6, ratios=ratios, start=0.5, rngs=nnx.Rngs(0))
    ngrams = jnp.asarray([[1, 5, 0], [0, 0, 0], [2, 0, 0]])
    expected = 0.5 * np.stack([ratios[1] + ratios[5], [0, 0], ratios[2]])
    np.testing.assert_allclose(model(ngrams), expected)
    assert set(dict(nnx.to_flat_state(nnx.state(model, nnx.Param)))) == {
        ("bias",),
        ("weights",),
    }
    with pytest.raises(ValueError, match=r"not \(6, 3\)"):
        models.NgramLinear(3, 6, ratios=ratios, rngs=nnx.Rngs(0))


def test_a_network_and_ngrams_are_an_ensemble():
    def network(rngs):
        return models.BagOfWords(2, 9, dim=4, rngs=rngs)

    def linear(rngs):
        return models.NgramLinear(2, 6, start=1.0, rngs=rngs)

    both = models.WithNgrams(network, linear, linear, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(TOKENS)
    words = jnp.asarray([[1, 5], [0, 0], [2, 0]])
    characters = jnp.asarray([[1], [3], [0]])
    parts = [
        network(nnx.Rngs(0))(tokens),
        linear(nnx.Rngs(0))(words),
        linear(nnx.Rngs(0))(characters),
    ]
    both.train()
    trained = both(tokens=tokens, words=words, characters=characters)
    np.testing.assert_allclose(trained, np.stack(parts, axis=1), atol=1e-6)
    both.eval()
    merged = both(tokens=tokens, words=words, characters=characters)
    np.testing.assert_allclose(merged, np.mean(parts, axis=0), atol=1e-6)
    shares = models.mean_by_shares(trained, (2.0, 1.0, 1.0))
    expected = np.average(parts, axis=0, weights=(2, 1, 1))
    np.testing.assert_allclose(shares, expected, atol=1e-6)


def test_learned_positions_tell_the_order_of_words():
    model = models.TextEncoder(
        3, 9, dim=8, heads=2, positions="learned", length=6, rngs=nnx.Rngs(0)
    )
    model.eval()
    text = jnp.asarray(TOKENS[:1])
    assert not np.allclose(model(text), model(text[:, ::-1]), atol=1e-4)


def test_encoders_that_cannot_be_are_errors():
    for arguments in ({"dim": 6, "heads": 2}, {"positions": "learned"}):
        with pytest.raises(ValueError, match=r"dim|length"):
            models.TextEncoder(3, 9, **arguments, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="'max'"):
        models.GRU(9, 3, pool="max", rngs=nnx.Rngs(0))

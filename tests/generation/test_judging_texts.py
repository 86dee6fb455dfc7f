"""Perplexity and multiple choice, against sums by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.generation import Characters, multiple_choice, perplexity

pytestmark = pytest.mark.usefixtures("quick_compilation")

ALPHABET = "abcdefgh"


@pytest.fixture(scope="module")
def model():
    return lepton.models.TransformerLM(8, dim=16, layers=1, heads=2, rngs=nnx.Rngs(1))


def logs_by_hand(model, row):
    """Log p of each token of a row but the first."""
    whole = nnx.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))
    logs = np.asarray(whole(model, jnp.array([row])))[0]
    return logs[np.arange(len(row) - 1), row[1:]]


def test_perplexity_is_of_every_token_but_a_texts_first(model):
    rows = [[1, 2, 3, 4, 5], [7, 0, 7]]
    logs = np.concatenate([logs_by_hand(model, row) for row in rows])
    judged = perplexity(model, rows)
    assert judged.tokens == 6
    assert judged.loss == pytest.approx(-logs.mean(), rel=1e-5)
    assert judged.perplexity == pytest.approx(np.exp(-logs.mean()), rel=1e-5)


def test_windows_count_each_token_once_with_the_context_that_they_say(model):
    row = np.random.default_rng(0).integers(0, 8, 11).tolist()
    judged = perplexity(model, row, length=4, stride=2)
    assert judged.tokens == 10
    # windows begin at 0, 2, 4, 6 and 8; the last holds three tokens
    sums = logs_by_hand(model, row[:4]).sum()
    for begin in (2, 4, 6):
        sums += logs_by_hand(model, row[begin : begin + 4])[1:].sum()
    sums += logs_by_hand(model, row[8:])[1:].sum()
    assert judged.loss == pytest.approx(-sums / 10, rel=1e-5)


def test_the_most_probable_answer_is_chosen_as_texts_or_as_tokens(model):
    texts = ("abc", ["d", "eff", "gh"])
    tokens = ([0, 1, 2], [[3], [4, 5, 5], [6, 7]])
    by_hand = [logs_by_hand(model, [0, 1, 2, *more])[2:] for more in tokens[1]]
    sums = np.array([logs.sum() for logs in by_hand])
    means = np.array([logs.mean() for logs in by_hand])

    whole = multiple_choice(model, [tokens], [int(sums.argmax())])
    np.testing.assert_allclose(whole.scores[0], sums, rtol=1e-5)
    assert whole.accuracy == 1.0
    codec = Characters(ALPHABET)
    each = multiple_choice(model, [texts, texts], [0, 1], per="token", tokenizer=codec)
    np.testing.assert_allclose(each.scores[1], means, rtol=1e-5)
    assert each.chosen.tolist() == [means.argmax()] * 2
    assert each.accuracy == np.mean(means.argmax() == np.array([0, 1]))


@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda m: perplexity(m, [[1]]), "no token to predict"),
        (lambda m: perplexity(m, [1, 2], length=4, stride=4), "begin 4 apart"),
        (lambda m: multiple_choice(m, [([1], [])]), "no answers"),
        (lambda m: multiple_choice(m, [([1], [[2]])], [0, 0]), "2 right answers"),
        (lambda m: multiple_choice(m, [([1], [[2]])], per="word"), "per is 'word'"),
    ],
)
def test_a_mistake_is_an_error_that_says_which(model, call, what):
    with pytest.raises(lepton.LeptonError, match=what):
        call(model)

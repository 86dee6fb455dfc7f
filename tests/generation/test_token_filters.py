"""Which tokens the filters leave, and how often each is drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.errors import SettingError
from lepton_jax.generation import Sampling, candidates
from lepton_jax.generation.filters import draw

pytestmark = pytest.mark.usefixtures("quick_compilation")

VOCAB = 12
UNSURE = 1e-5  # a float32 sum may lie on either side of a limit that is this near


def shares(logits, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    exps = np.exp(scaled - scaled.max())
    return exps / exps.sum()


def reference(logits, sampling):
    """Tokens that are left, and those on the verge, in float64."""
    order = np.argsort(-np.asarray(logits), kind="stable")
    kept = order[: sampling.top_k or len(order)]
    left = shares(logits, sampling.temperature)[kept]
    left = left / left.sum()
    before = np.cumsum(left) - left
    least = (sampling.min_p or 0.0) * left[0]
    top_p = 1.0 if sampling.top_p is None else sampling.top_p
    is_left = (before < top_p) & (left >= least)
    if top_p == 1:
        is_left = left >= least
    is_left[0] = True
    verge = (abs(before - top_p) < UNSURE) | (abs(left - least) < UNSURE * left[0])
    return set(kept[is_left].tolist()), set(kept[verge].tolist())


def left_by(logits, sampling):
    scores, tokens = candidates(
        jnp.asarray(logits, jnp.float32)[None], sampling, sampling.knobs()
    )
    tokens = np.arange(VOCAB)[None] if tokens is None else np.asarray(tokens)
    return set(tokens[np.isfinite(scores)].tolist())


# eighths are exact in float32, so ties are ties in float64, too
eighths = st.integers(-80, 80).map(lambda n: n / 8)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(eighths, min_size=VOCAB, max_size=VOCAB),
    temperature=st.sampled_from([0.25, 0.5, 1.0, 2.0, 1e-30]),
    top_k=st.sampled_from([None, 1, 3, VOCAB, 500]),
    top_p=st.none() | st.floats(0.01, 1.0),
    min_p=st.none() | st.floats(0.0, 1.0),
)
def test_the_filters_leave_what_float64_does(logits, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    with np.errstate(over="ignore", under="ignore"):
        expected, verge = reference(logits, sampling)
    left = left_by(logits, sampling)
    assert left ^ expected <= verge
    assert int(np.argmax(logits)) in left


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = jnp.log(jnp.array([0.5, 0.0, 0.3, 0.15, 0.05]))
    sampling = Sampling(0.5, top_p=0.98)
    count = 4000
    keys = jax.random.split(jax.random.key(0), count)
    rows = jnp.broadcast_to(logits, (count, 5))
    drawn = np.asarray(draw(keys, rows, sampling, sampling.knobs()))
    expected = np.array([0.25, 0.0, 0.09, 0.0225, 0.0])
    expected /= expected.sum()
    seen = np.bincount(drawn, minlength=5) / count
    error = 5 * np.sqrt(expected * (1 - expected) / count)
    assert (abs(seen - expected) <= error).all()


def test_greedy_takes_the_lowest_of_several_equal_tokens():
    logits = jnp.array([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]])
    assert draw(None, logits, Sampling(), {}).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", 0),
        ("top_k", True),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
    ],
)
def test_a_setting_out_of_range_is_an_error_that_names_it(name, value):
    with pytest.raises(SettingError, match=name):
        Sampling(**{name: value})

"""Scalars of a step as one kernel, and as words that a loop carries."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from lepton_jax.train import one_kernel
from lepton_jax.train.one_kernel import InWords, as_one_kernel, from_words, to_words


def many(state, x):
    """Make a few hundred operations on scalars and small arrays, of every type."""
    mean, count, on, three = state
    for _ in range(20):
        mean = jnp.where(on & (x > mean), 0.9 * mean + 0.1 * x, mean - jnp.sqrt(abs(x)))
        count = jnp.where(mean > 0, count + 1, count)
        on = on | (count > 30)
        three = jnp.maximum(three * 0.5, jnp.stack([mean, x, three[0]]))
    return {"mean": mean, "state": (count, on), "three": three, "same": x}


STATE = (jnp.float32(0.5), jnp.int32(3), jnp.bool_(True), jnp.arange(3.0))


def test_same_results_as_the_function_itself():
    x = jnp.float32(0.7)
    expected = jax.jit(many)(STATE, x)
    got = jax.jit(lambda s, x: as_one_kernel(many, s, x))(STATE, x)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected
    )


def test_it_is_one_kernel():
    def kernels(function):
        text = jax.jit(function).lower(STATE, jnp.float32(1)).compile().as_text()
        entry = text[text.index("ENTRY") :]
        return entry.count(" fusion(") + entry.count(" call(")

    assert kernels(many) > 20
    assert kernels(lambda s, x: as_one_kernel(many, s, x)) < 4


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, y: jnp.where(x > 0, x, x) + jnp.int32(0), id="unread"),
        pytest.param(lambda x, y: jnp.where(y != y, y, x) * 2, id="not a number"),
        pytest.param(lambda x, y: jnp.clip(y, 1.0, 1.0) + x, id="constant"),
        pytest.param(lambda x, y: (x, y, jnp.float32(3)), id="nothing to do"),
        pytest.param(lambda x, y: {"a": -x, "b": -x, "c": y}, id="twice"),
    ],
)
@pytest.mark.parametrize("uses", [True, False], ids=["used", "unused"])
def test_what_nothing_reads_ends_no_process(function, uses):
    def step(x, y):
        out = as_one_kernel(function, x, y)
        return jax.tree.leaves(out) if uses else x + y

    x, y = jnp.float32(2), jnp.float32(3)
    expected = jax.tree.leaves(function(x, y)) if uses else x + y
    jax.tree.map(np.testing.assert_allclose, jax.jit(step)(x, y), expected)


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: jnp.sort(jnp.stack([x, 2 - x])), id="sort"),
        pytest.param(lambda x: jax.random.uniform(jax.random.key(0)) + x, id="random"),
        pytest.param(lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x), id="cond"),
        pytest.param(lambda x: jnp.full(1000, x) * 2, id="large"),
        pytest.param(
            lambda x: jax.lax.fori_loop(0, 3, lambda _, y: 2 * y, x), id="loop"
        ),
    ],
)
def test_other_functions_run_as_they_are(function, monkeypatch):
    def refuse(function):
        raise AssertionError("it was made one kernel")

    monkeypatch.setattr(one_kernel, "marked_as_one_kernel", refuse)
    x = jnp.float32(0.5)
    got = jax.jit(lambda x: as_one_kernel(function, x))(x)
    np.testing.assert_allclose(got, function(x), rtol=1e-6)


shapes = st.sampled_from([(), (1,), (3,), (2, 2)])
dtypes = st.sampled_from(one_kernel.IN_WORDS)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(shapes, dtypes), max_size=6), st.integers(0, 2**16))
def test_words_hold_every_bit(kinds, seed):
    random = np.random.default_rng(seed)
    values = []
    for shape, dtype in kinds:
        bits = random.integers(0, 2**32, shape, np.uint32)
        value = bits % 2 == 1 if dtype == "bool" else np.asarray(bits).view(dtype)
        values.append(jnp.asarray(value))
    for got, value in zip(from_words(to_words(values), values), values, strict=True):
        assert (got.dtype, got.shape) == (value.dtype, value.shape)
        assert np.asarray(got).tobytes() == np.asarray(value).tobytes()


def test_a_tree_in_words():
    tree = {"a": jnp.float32(jnp.nan), "b": jnp.ones(100), "c": (jnp.bool_(False),)}
    carried = InWords(tree)
    words, others = jax.jit(carried.packed)(tree)
    assert words.shape == (2,)
    assert [x.shape for x in others] == [(100,)]
    got = jax.jit(carried.unpacked)((words, others))
    jax.tree.map(np.testing.assert_array_equal, got, tree)

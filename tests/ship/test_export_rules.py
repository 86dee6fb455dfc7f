"""Operations in other words give what JAX's own give, to the bit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.ship.export import inlined, rules

pytestmark = pytest.mark.usefixtures("quick_compilation")


def both(function, *args, by):
    program = jax.make_jaxpr(function)(*args)
    replaced = jax.jit(lambda *given: inlined.run(program, given, rules=by)[0])
    return jax.jit(function)(*args), replaced(*args)


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(
        st.lists(
            st.sampled_from([0.0, 1.0, -1.0, np.nan, np.inf]), min_size=3, max_size=3
        ),
        min_size=1,
        max_size=4,
    ),
    axis=st.sampled_from([0, 1]),
)
def test_argmax_takes_the_first_of_the_largest_and_nan_before_all(values, axis):
    array = jnp.asarray(values, jnp.float32)
    expected, found = both(lambda x: jnp.argmax(x, axis), array, by=rules.FOR_LITERT)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("pool", [linen.max_pool, linen.avg_pool])
@pytest.mark.parametrize(
    ("window", "strides", "padding"),
    [
        ((2, 2), (2, 2), "VALID"),
        ((3, 2), (1, 2), "SAME"),
        ((2, 3), (2, 1), ((1, 0), (0, 2))),
    ],
)
def test_pooling_by_shifted_copies_is_pooling(pool, window, strides, padding):
    images = jnp.asarray(
        np.random.default_rng(0).normal(size=(2, 7, 6, 3)), jnp.float32
    )

    def run(x):
        return pool(x, window, strides, padding)

    expected, found = both(run, images, by=rules.FOR_ONNX)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["bool", "uint32", "uint16", "float32", "int32"])
def test_a_choice_is_the_same_for_every_type(kind):
    draw = np.random.default_rng(0)
    off = jnp.asarray(draw.integers(0, 2**32 - 1, (3, 4)).astype(kind))
    on = jnp.asarray(draw.integers(0, 2, (3, 4)).astype(kind))
    which = jnp.asarray(draw.integers(0, 2, (3, 4)) > 0)
    expected, found = both(jnp.where, which, on, off, by=rules.FOR_ONNX)
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == expected.dtype


@pytest.mark.parametrize(
    ("spec", "left", "right"),
    [
        ("bn,bnc->bc", (3, 5), (3, 5, 2)),
        ("bnc,bn->bc", (3, 5, 2), (3, 5)),
        ("bn,bn->b", (3, 5), (3, 5)),
        ("bhk,bkhd->bhd", (2, 3, 4), (2, 4, 3, 5)),
        ("bik,bjk->bij", (2, 3, 4), (2, 5, 4)),
        ("bnm,bmnc->bc", (2, 3, 4), (2, 4, 3, 2)),
        ("ik,kj->ij", (2, 3), (3, 4)),
    ],
)
def test_a_product_for_each_row_is_a_sum_of_products(spec, left, right):
    draw = np.random.default_rng(0)
    arrays = [jnp.asarray(draw.normal(size=s), jnp.float32) for s in (left, right)]

    def run(*given):
        return jnp.einsum(spec, *given)

    expected, found = both(run, *arrays, by=rules.FOR_IREE)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge"])
@pytest.mark.parametrize("kind", ["uint16", "uint32", "int32", "float32"])
def test_a_comparison_is_the_same_for_every_type(name, kind):
    draw = np.random.default_rng(0)
    left, right = (jnp.asarray(draw.integers(0, 3, (5, 4)).astype(kind)) for _ in "ab")
    compare = getattr(jax.lax, name)
    expected, found = both(compare, left, right, by=rules.FOR_LITERT)
    np.testing.assert_array_equal(found, expected)

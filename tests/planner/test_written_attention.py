"""Attention written by hand: found in a program, and computed by a kernel."""

from __future__ import annotations

import doctest
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lepton_jax.models import decoder
from lepton_jax.planner.rewrite import attention, forms, masks, softmax, written

RTOL = 1e-5
FILLS = (-1e9, -math.inf, float(jnp.finfo(jnp.float32).min), -1e30)


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (masks, written), ids=lambda m: m.__name__)
def test_the_examples_of_attention_by_hand_hold(module):
    assert doctest.testmod(module).failed == 0


# ---- the ways in which people write it ----


def tril(length):
    return jnp.tril(jnp.ones((length, length), bool))


def compared(length):
    place = jnp.arange(length)
    return place[:, None] >= place[None, :]


def not_after(length):
    rows = jax.lax.broadcasted_iota(jnp.int32, (length, length), 0)
    columns = jax.lax.broadcasted_iota(jnp.int32, (length, length), 1)
    return jnp.logical_not(columns > rows)


def constant(length):
    return np.tril(np.ones((1, 1, length, length), bool))


def float_mask(length):
    return jnp.tril(jnp.ones((length, length))) > 0


MASKS = (tril, compared, not_after, constant, float_mask)


def by_jax(scores):
    return jax.nn.softmax(scores, axis=-1)


def by_hand(scores):
    shifted = jnp.exp(scores - scores.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def stopped(scores):
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    shifted = jnp.exp(scores - highest)
    return shifted / jnp.sum(shifted, axis=-1)[..., None]


def hidden_by_where(scores, seen, fill):
    return jnp.where(seen, scores, fill)


def hidden_otherwise(scores, seen, fill):
    return jnp.where(~jnp.asarray(seen), jnp.asarray(fill, scores.dtype), scores)


def hidden_by_a_bias(scores, seen, fill):
    return scores + jnp.where(seen, 0.0, fill).astype(scores.dtype)


WAYS = st.fixed_dictionaries(
    {
        "heads_first": st.booleans(),
        "keys_first": st.booleans(),
        "groups": st.sampled_from(["none", "repeat", "five dims", "broadcast"]),
        "scale": st.sampled_from(["before", "after", "divided"]),
        "cap": st.sampled_from([None, 5.0]),
        "mask": st.sampled_from([None, *MASKS]),
        "hide": st.sampled_from([hidden_by_where, hidden_otherwise, hidden_by_a_bias]),
        "fill": st.sampled_from(FILLS),
        "softmax": st.sampled_from([by_jax, by_hand, stopped]),
        "wide": st.booleans(),
        "value_first": st.booleans(),
    }
)


def product(text, left, right, swapped):
    """Return an einsum, its operands in either order."""
    if not swapped:
        return jnp.einsum(text, left, right)
    inputs, out = text.split("->")
    first, second = inputs.split(",")
    return jnp.einsum(f"{second},{first}->{out}", right, left)


def changed(way, scores, width):
    if way["scale"] == "after":
        scores = scores * width**-0.5
    elif way["scale"] == "divided":
        scores = scores / jnp.sqrt(width)
    if way["cap"] is not None:
        scores = way["cap"] * jnp.tanh(scores / way["cap"])
    if way["wide"]:
        scores = scores.astype(jnp.float32)
    if way["mask"] is not None:
        scores = way["hide"](scores, way["mask"](scores.shape[-1]), way["fill"])
    return scores


def attends(way, query, key, value):
    """Return attention (batch, length, heads, width), written in some way."""
    batch, length, heads, width = query.shape
    group = heads // key.shape[2]
    if way["scale"] == "before":
        query = query * width**-0.5
    q, k, out = "bqhd", "bkhd", "bqhd"
    scores_dims = "bhqk"
    if way["groups"] == "five dims":
        query = query.reshape(batch, length, -1, group, width)
        q, out, scores_dims = "bqhgd", "bqhgd", "bhgqk"
    elif way["groups"] == "repeat":
        key, value = (jnp.repeat(x, group, axis=2) for x in (key, value))
    else:
        wide = (batch, length, key.shape[2], group, width)
        key, value = (
            jnp.broadcast_to(x[:, :, :, None], wide).reshape(batch, length, -1, width)
            for x in (key, value)
        )
    if way["heads_first"] and way["groups"] != "five dims":
        query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
        q, k, out = "bhqd", "bhkd", "bhqd"
    scores = product(f"{q},{k}->{scores_dims}", query, key, way["keys_first"])
    scores = changed(way, scores, width)
    shares = way["softmax"](scores).astype(value.dtype)
    mixed = product(f"{scores_dims},{k}->{out}", shares, value, way["value_first"])
    if way["heads_first"] and way["groups"] != "five dims":
        mixed = mixed.swapaxes(1, 2)
    return mixed.reshape(batch, length, heads, width)


def arrays(length=7, heads=4, key_heads=2, width=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, n, width) for n in (heads, key_heads, key_heads, heads)]
    pairs = zip(keys, shapes, strict=True)
    return [2 * jax.random.normal(key, shape, dtype) for key, shape in pairs]


def found_in(function, *args):
    return softmax.find_all(softmax.opened(jax.make_jaxpr(function)(*args)))


@settings(max_examples=40, deadline=None)
@given(way=WAYS)
def test_each_way_to_write_attention_is_found(way):
    query, key, value, _ = arrays()

    [found] = found_in(partial(attends, way), query, key, value)

    assert found.shape == (2, 7, 4, 4)
    assert found.causal == (way["mask"] is not None)
    assert found.scale == pytest.approx(1.0 if way["scale"] == "before" else 0.5)
    assert found.cap == (way["cap"] and pytest.approx(way["cap"]))
    heads = found.key.extents()[2]
    assert heads == 2


@settings(max_examples=5, deadline=None)
@given(way=WAYS, length=st.integers(1, 13))
def test_values_and_gradients_are_those_of_what_was_written(way, length):
    *given_, slope = arrays(length)
    plain = partial(attends, way)
    fused = softmax.fused(plain, "blocks")

    def both(function):
        @jax.jit
        def run(*arrays):
            out, pull = jax.vjp(function, *arrays)
            return [out, *pull(slope)]

        return run(*given_)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK_ROWS", 5)
        for known, found in zip(both(plain), both(fused), strict=True):
            limit = RTOL * max(1.0, float(jnp.abs(known).max()))
            np.testing.assert_allclose(found, known, rtol=0, atol=limit)


def test_bfloat16_differs_within_its_rounding():
    *given_, slope = arrays(13, dtype=jnp.bfloat16)
    way = dict.fromkeys(("heads_first", "keys_first", "value_first"), False)
    way |= {"groups": "five dims", "scale": "after", "cap": 5.0, "mask": tril}
    way |= {"hide": hidden_by_where, "fill": -1e9, "softmax": by_jax, "wide": True}
    plain = partial(attends, way)

    [found] = found_in(plain, *given_)
    assert found.dtype == jnp.bfloat16

    for known, new in zip(
        jax.vjp(plain, *given_)[1](slope),
        jax.vjp(softmax.fused(plain, "blocks"), *given_)[1](slope),
        strict=True,
    ):
        known, new = (np.asarray(x, np.float32) for x in (known, new))
        np.testing.assert_allclose(new, known, rtol=0, atol=2**-5 * np.abs(known).max())


def test_a_window_and_segments_are_found():
    query, key, value, _ = arrays()
    segments = jnp.arange(14).reshape(2, 7) // 3

    def packed(q, k, v, segments):
        place = jnp.arange(7)
        back = place[:, None] - place[None, :]
        seen = (back >= 0) & (back < 3)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, jnp.repeat(k, 2, 2))
        scores = jnp.where(seen & same, scores, -1e9)
        return jnp.einsum("bhqk,bkhd->bqhd", by_jax(scores), jnp.repeat(v, 2, 2))

    [found] = found_in(packed, query, key, value, segments)
    given_ = (query, key, value, segments)

    assert (found.causal, found.behind) == (True, 2)
    assert found.segments is not None
    fused = softmax.fused(packed, "blocks")
    np.testing.assert_allclose(fused(*given_), packed(*given_), rtol=RTOL, atol=RTOL)


def test_one_head_and_mapped_heads_are_found():
    query, key, value, _ = arrays(heads=2)

    def one(q, k, v):
        scores = jnp.where(tril(7), q @ k.T, -jnp.inf)
        return by_jax(scores) @ v

    mapped = jax.vmap(jax.vmap(one, in_axes=1, out_axes=1))
    for function, args in (
        (one, [x[0, :, 0] for x in (query, key, value)]),
        (mapped, [query, key, value]),
    ):
        [found] = found_in(function, *args)
        fused = softmax.fused(function, "blocks")

        assert found.causal
        np.testing.assert_allclose(fused(*args), function(*args), rtol=RTOL, atol=RTOL)


# ---- near misses ----


def near_miss(change):
    """Return attention with a change to its scores or its shares."""

    def attend(query, key, value, more):
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores, shares_of = change(scores, more)
        return jnp.einsum("bhqk,bkhd->bqhd", shares_of(scores), value)

    return attend


def dropped(shares):
    kept = jax.random.bernoulli(jax.random.key(0), 0.5, shares.shape)
    return jnp.where(kept, shares / 0.5, 0.0)


PLACE = np.arange(7)
NEAR_MISSES = {
    "a bias": lambda s, more: (s + more, by_jax),
    "slopes of positions": lambda s, _: (s - jnp.abs(PLACE[:, None] - PLACE), by_jax),
    "dropout": lambda s, _: (jnp.where(tril(7), s, -1e9), lambda x: dropped(by_jax(x))),
    "a mask from outside": lambda s, more: (jnp.where(more > 0, s, -1e9), by_jax),
    "a mask that sees ahead": lambda s, _: (jnp.where(tril(7).T, s, -1e9), by_jax),
    "every second key": lambda s, _: (jnp.where(PLACE % 2 == 0, s, -1e9), by_jax),
    "a fill that is not low": lambda s, _: (jnp.where(tril(7), s, -10.0), by_jax),
    "a mask before the cap": lambda s, _: (
        9 * jnp.tanh(jnp.where(tril(7), s, -1e9) / 9),
        by_jax,
    ),
    "two caps": lambda s, _: (jnp.tanh(jnp.tanh(s)), by_jax),
    "a softmax over queries": lambda s, _: (s, partial(jax.nn.softmax, axis=-2)),
    "a sigmoid": lambda s, _: (s, jax.nn.sigmoid),
    "a temperature that is learned": lambda s, more: (s * more[0, 0, 0, 0], by_jax),
    "positions that are rounded": lambda s, _: (
        jnp.where(
            jnp.arange(7, dtype=jnp.bfloat16)[:, None]
            >= jnp.arange(7, dtype=jnp.bfloat16),
            s,
            -1e9,
        ),
        by_jax,
    ),
}


@pytest.mark.parametrize("change", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_what_is_not_surely_attention_stays_as_it_is(change):
    query, key, value, _ = arrays(key_heads=4)
    more = jnp.ones((1, 1, 7, 7))

    function = near_miss(change)
    fused = softmax.fused(function, "blocks")

    assert found_in(function, query, key, value, more) == []
    assert "fused" not in str(jax.make_jaxpr(fused)(query, key, value, more))


def test_queries_of_a_wider_dtype_are_not_rounded():
    query, key, value, _ = arrays(key_heads=4)

    def attend(q, k, v):
        shares = by_jax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return jnp.einsum("bhqk,bkhd->bqhd", shares.astype(v.dtype), v)

    assert found_in(attend, query, key, value.astype(jnp.bfloat16)) == []


# ---- models and kernels ----


@pytest.mark.parametrize("cap", (None, 3.0))
def test_the_kernel_for_tpus_has_a_cap(cap):
    query, key, value, slope = arrays(150, 2, 1, 16)

    def known(q, k, v):
        k, v = (jnp.repeat(x, 2, 2) for x in (k, v))
        scores = 0.25 * jnp.einsum("bqhd,bkhd->bhqk", q, k)
        scores = scores if cap is None else cap * jnp.tanh(scores / cap)
        scores = jnp.where(tril(150), scores, -1e30)
        return jnp.einsum("bhqk,bkhd->bqhd", by_jax(scores), v)

    how = attention.How(True, 0.25, "splash-interpreted", cap=cap)
    kernel = partial(attention.attend, how=how)
    for left, right in zip(
        jax.vjp(known, query, key, value)[1](slope),
        jax.vjp(lambda *x: kernel(*x), query, key, value)[1](slope),
        strict=True,
    ):
        limit = RTOL * float(jnp.abs(left).max())
        np.testing.assert_allclose(right, left, rtol=0, atol=limit)


def test_the_capped_attention_of_gemma_is_found():
    from flax import nnx

    shape = decoder.DecoderShape(
        16, dim=8, layers=2, heads=2, hidden=12, kv_heads=1, attention_cap=5.0
    )
    model = decoder.DecoderLM(shape, rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)

    def logits(params, tokens):
        return nnx.merge(graph, params)(tokens)

    tokens = jnp.arange(12).reshape(2, 6)
    found = found_in(logits, params, tokens)

    assert [own.cap for own in found] == [5.0, 5.0]
    assert [own.shape for own in found] == [(2, 6, 2, 4)] * 2
    known, fused = (
        jax.jit(function)(params, tokens)
        for function in (logits, softmax.fused(logits, "blocks"))
    )
    np.testing.assert_allclose(fused, known, rtol=RTOL, atol=RTOL)


def test_long_attention_by_hand_gets_a_kernel():
    def loss(q, k, v):
        way = {"groups": "repeat", "scale": "after", "cap": None, "mask": tril}
        way |= dict.fromkeys(("heads_first", "keys_first", "value_first"), False)
        way |= {"hide": hidden_by_where, "fill": -1e9, "softmax": by_jax, "wide": True}
        return attends(way, q, k, v).sum()

    query, key, value, _ = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays(length=1024)
    )
    program = jax.make_jaxpr(loss)(query, key, value)

    for platform, kernel in (("cpu", "blocks"), ("tpu", "splash")):
        chosen = forms.forms_for(program, lambda: program, platform, 1, 1)
        assert chosen.attention == kernel

"""The general decoder: caches, windows, packed documents, layers in a loop."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lepton_jax.models import DecoderLM, DecoderShape, Rotary

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = DecoderShape(24, dim=16, layers=2, heads=4, kv_heads=2, head=6, hidden=20)
SHAPES = {
    "rotary": dataclasses.replace(SMALL, windows=(None, 3)),
    "capped": dataclasses.replace(SMALL, layers=1, windows=(4,), attention_cap=2.0),
    "learned": dataclasses.replace(
        SMALL, layers=1, rotary=None, positions=16, norm="layer", gated=False, tied=True
    ),
}
TOLERANCE = 2e-5


@nnx.jit
def run(model, tokens, **more):
    return model(tokens, **more)


@cache
def made(name):
    return DecoderLM(SHAPES[name], rngs=nnx.Rngs(0))


def tokens(length=11, rows=2):
    return jax.random.randint(jax.random.key(3), (rows, length), 0, SMALL.vocab)


@pytest.mark.parametrize("name", SHAPES)
def test_with_a_cache_the_logits_are_those_without(name):
    model = made(name)
    whole = run(model, tokens())
    logits, held = run(model, tokens()[:, :6], cache=model.empty_cache(2, 14))
    parts = [logits]
    for place in range(6, 11):
        logits, held = run(model, tokens()[:, place : place + 1], cache=held)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=TOLERANCE)
    assert [entry["filled"].tolist() for entry in held] == [[11, 11]] * len(held)


def test_rows_of_different_lengths_share_a_cache():
    model = made("rotary")
    _, held = run(model, tokens(6), cache=model.empty_cache(2, 14))
    lengths = jnp.asarray([6, 3])
    held = tuple({**entry, "filled": lengths} for entry in held)
    logits, _ = run(model, tokens(7)[:, 6:], cache=held)
    short = jnp.concatenate([tokens(6)[1:, :3], tokens(7)[1:, 6:]], axis=1)
    np.testing.assert_allclose(logits[1, 0], run(model, short)[0, -1], atol=TOLERANCE)


@pytest.mark.parametrize("name", ["rotary", "capped"])
def test_packed_documents_do_not_see_each_other(name):
    model = made(name)
    left = tokens(4)
    right = tokens(7)
    packed = jnp.concatenate([left, right], axis=1)
    positions = jnp.asarray([[*range(4), *range(7)]] * 2)
    segments = jnp.asarray([[1] * 4 + [2] * 7] * 2)
    logits = run(model, packed, positions=positions, segments=segments)
    np.testing.assert_allclose(logits[:, :4], run(model, left), atol=TOLERANCE)
    np.testing.assert_allclose(logits[:, 4:], run(model, right), atol=TOLERANCE)
    with pytest.raises(ValueError, match="give no segments"):
        model(packed, segments=segments, cache=model.empty_cache(2, 12))


def test_a_scan_over_pairs_of_layers_computes_what_the_layers_do():
    shape = dataclasses.replace(SMALL, layers=4, windows=(None, 3) * 2)
    assert shape.period == 2
    plain = DecoderLM(shape, rngs=nnx.Rngs(0))
    scanned = DecoderLM(dataclasses.replace(shape, loop="scan"), rngs=nnx.Rngs(1))
    stacked = [
        jax.tree.map(
            lambda *leaves: jnp.stack(leaves),
            *(nnx.state(plain.blocks[layer]) for layer in (member, member + 2)),
        )
        for member in range(2)
    ]
    for member, state in enumerate(stacked):
        nnx.update(scanned.blocks[member], state)
    for name in ("embed", "norm", "head"):
        nnx.update(getattr(scanned, name), nnx.state(getattr(plain, name)))
    right = run(plain, tokens())
    np.testing.assert_allclose(run(scanned, tokens()), right, atol=TOLERANCE)
    cached, _ = run(scanned, tokens(), cache=scanned.empty_cache(2, 11))
    np.testing.assert_allclose(cached, right, atol=TOLERANCE)


def test_a_window_counts_the_token_itself():
    shape = dataclasses.replace(SMALL, layers=1, windows=(3,))
    model = DecoderLM(shape, rngs=nnx.Rngs(0))
    text = tokens(8, rows=1)
    before = run(model, text)
    changed = run(model, text.at[0, 2].set((text[0, 2] + 1) % shape.vocab))
    differs = np.abs(changed - before).max(axis=(0, 2)) > 0
    assert differs.tolist() == [False, False, True, True, True, False, False, False]


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": 3},
        {"head": 5},
        {"windows": (2,)},
        {"windows": (0, 1)},
        {"activation": "tanh"},
        {"scale_by_layer": True, "loop": "scan"},
        {"layers": 0},
    ],
    ids=str,
)
def test_a_shape_that_does_not_fit_together_is_refused(changes):
    with pytest.raises(ValueError):
        dataclasses.replace(SMALL, **changes)


def test_frequencies_of_unknown_length_are_those_of_the_known_length():
    rotary = Rotary(kind="dynamic", factor=3.0, original=4)
    shape = dataclasses.replace(SMALL, layers=1, rotary=rotary)
    model = DecoderLM(shape, rngs=nnx.Rngs(0))
    positions = jnp.arange(11)[None].repeat(2, axis=0)
    said = run(model, tokens(), positions=positions)
    np.testing.assert_allclose(said, run(model, tokens()), atol=TOLERANCE)

"""Products of 8 bits, against the same rounding in float64 NumPy."""

from __future__ import annotations

import doctest
import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import hardware, losses, models
from lepton_jax.errors import PlanError, RecipeError
from lepton_jax.planner import Plan
from lepton_jax.planner.program import named, products
from lepton_jax.planner.rewrite import eight_bits, narrow
from lepton_jax.planner.rewrite.program import opened
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program

RTOL = 1e-5  # of results and gradients in float32
PLAIN = (((1,), (0,)), ((), ()))
GREATEST = {"e4m3": 448, "e5m2": 57344, "int8": 127}
DTYPES = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.mark.parametrize("module", (eight_bits, narrow), ids=lambda m: m.__name__)
def test_the_examples_hold(module):
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


# ---- against NumPy ----


def rounded(x, form, axis):
    """Return an array in float64 as it is after it was rounded to 8 bits."""
    most = np.abs(x).max(axis, keepdims=True).astype(np.float32)
    most = np.maximum(most, np.float32(2.0**-100))
    scaled = x.astype(np.float32) * (np.float32(GREATEST[form]) / most)
    if form == "int8":
        numbers = np.clip(np.rint(scaled), -127, 127)
    else:
        numbers = np.clip(scaled, -GREATEST[form], GREATEST[form]).astype(DTYPES[form])
    return numbers.astype(np.float64) * (most.astype(np.float64) / GREATEST[form])


def reference(kind, x, w, g):
    """Return y, dx and dw of y = x w in float64."""
    if kind == "fp8":
        to, back, rows, columns = "e4m3", "e5m2", None, None
    else:
        to, back, rows, columns = "int8", "int8", 1, 0
    y = rounded(x, to, rows) @ rounded(w, to, columns)
    dx = rounded(g, back, rows) @ rounded(w, to, rows).T
    if kind == "int8":
        return y, dx, x.astype(np.float64).T @ g
    return y, dx, rounded(x, to, None).T @ rounded(g, back, None)


def found(how, x, w, g):
    y, pull = jax.vjp(partial(eight_bits.product, how=how), x, w)
    return y, *pull(g)


@settings(max_examples=3, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 9)] * 3),
    kind=st.sampled_from(narrow.KINDS),
    computed=st.sampled_from(["", "float32"]),
    magnitude=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_numpy(sizes, kind, computed, magnitude, seed):
    rows, width, columns = sizes
    draw = np.random.default_rng(seed).standard_normal
    x = draw((rows, width)).astype(np.float32)
    w = (magnitude * draw((width, columns))).astype(np.float32)
    g = draw((rows, columns)).astype(np.float32)

    results = found(eight_bits.How(kind, PLAIN, computed), x, w, g)

    for mine, theirs in zip(results, reference(kind, x, w, g), strict=True):
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=RTOL * scale)


DIMS = {
    "tokens": ((((2,), (0,)), ((), ())), (3, 5, 7), (7, 4)),
    "two summed": ((((1, 0), (1, 2)), ((), ())), (4, 6, 7), (9, 6, 4)),
    "experts": ((((3,), (1,)), ((1,), (0,))), (2, 4, 3, 6), (4, 6, 8)),
    "kernel first": ((((0,), (2,)), ((2,), (1,))), (6, 3, 4), (5, 4, 6)),
}


@pytest.mark.parametrize("kind", narrow.KINDS)
@pytest.mark.parametrize("name", DIMS)
def test_any_product_has_the_gradients_of_its_rounded_operands(kind, name):
    dims, left, right = DIMS[name]
    # whole numbers that any of the formats holds to the bit, whatever the scale
    draw = partial(np.random.default_rng(0).choice, [-1.0, 0.0, 1.0])
    x = jnp.asarray(draw(left), jnp.float32)
    w = jnp.asarray(draw(right), jnp.float32)
    y, pull = jax.vjp(partial(jax.lax.dot_general, dimension_numbers=dims), x, w)
    g = jnp.asarray(draw(y.shape), jnp.float32)

    results = found(eight_bits.How(kind, dims), x, w, g)

    for mine, exact in zip(results, (y, *pull(g)), strict=True):
        np.testing.assert_allclose(mine, exact, rtol=RTOL, atol=1e-6)


@pytest.mark.parametrize("kind", narrow.KINDS)
def test_what_is_not_finite_shows(kind):
    x = jnp.ones((2, 3)).at[0, 0].set(jnp.nan)
    how = eight_bits.How(kind, PLAIN)

    assert jnp.isnan(eight_bits.product(x, jnp.ones((3, 2)), how)[0]).all()
    zeros = eight_bits.product(jnp.zeros((2, 3)), jnp.ones((3, 2)), how)
    assert (zeros == 0).all()


# ---- what is found ----


def shapes_found(loss, *args):
    program = opened(jax.make_jaxpr(loss)(*args))
    count = len(jax.tree.leaves(args[0]))
    return [
        eqn.invars[kernel].aval.shape for eqn, kernel in narrow.find(program, count)
    ]


def bf16(*shape):
    return jnp.ones(shape, jnp.bfloat16)


def test_routers_heads_small_kernels_and_float32_stay():
    params = {
        "deep": bf16(64, 64),
        "small": bf16(64, 32),
        "float32": jnp.ones((64, 64)),
        "router": bf16(64, 128),
        "head": bf16(64, 512),
    }

    def loss(params, x):
        x = x @ params["deep"].T.reshape(64, 64)
        x = x + (x @ params["small"]).sum(-1, keepdims=True)
        wide = x.astype(jnp.float32) @ params["float32"]
        x = x + wide.astype(jnp.bfloat16)
        best = jax.lax.top_k(x @ params["router"], 2)[0]
        x = (x * x.T @ x) * best.sum(-1, keepdims=True)
        return (x @ params["head"]).sum()

    assert shapes_found(loss, params, bf16(64, 64)) == [(64, 64)]


def test_kernels_are_found_in_loops():
    def loss(params, x):
        layers, head = params
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, layers)[0]
        return (x @ head).sum()

    args = (bf16(3, 64, 64), bf16(64, 64)), bf16(2, 64)

    assert shapes_found(loss, *args) == [(64, 64)]
    text = str(jax.make_jaxpr(jax.grad(narrow.narrowed(loss, "fp8")))(*args))
    assert "f8_e4m3fn" in text and "f8_e5m2" in text


def test_what_several_kernels_meet_is_rounded_once():
    def loss(x, kernels):
        how = eight_bits.How("fp8", PLAIN)
        parts = [eight_bits.product(x, kernel, how) ** 2 for kernel in kernels]
        return sum(parts[1:], parts[0]).sum()

    args = bf16(4, 8), [k * bf16(8, 8) for k in (1, 2, 3)]
    plain = jax.grad(loss, argnums=(0, 1))
    once = narrow.merged(plain)

    maxima = str(jax.make_jaxpr(once)(*args)).count("reduce_max")
    assert maxima == 1 + 2 * 3  # of the activations; of each kernel and gradient
    jax.tree.map(np.testing.assert_array_equal, once(*args), plain(*args))


# ---- in a plan ----

BATCH = 8
STEPS = 2


@pytest.fixture
def small(monkeypatch):
    """Let small kernels count as large, and split small arrays."""
    monkeypatch.setattr(narrow, "LEAST_WIDTH", 8)
    monkeypatch.setattr(named, "SMALL", 0)


def language(precision, loop="unrolled", **more):
    recipe = lepton.Recipe(
        model=partial(
            models.TransformerLM, vocab=32, dim=16, layers=1, heads=2, loop=loop
        ),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=BATCH,
        steps_per_call=1,
        precision=precision,
        **more,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


def batches():
    shape = (STEPS, BATCH, 17)
    x = np.random.default_rng(0).integers(0, 32, shape, dtype=np.int32)
    return x[..., :-1], x[..., 1:]


def planned(trace, sizes=(1,), masks=None, keep=0, remat="none"):
    topology = lepton.topology(f"cpu:{math.prod(sizes)}")
    trace = trace.on(topology)
    assignment = build.by_hand(trace, sizes, masks or {}, keep, remat=remat)
    return trace, build.fixed(trace, topology, assignment)


def trained(trace, plan):
    """Return the losses of the steps under a plan, and a kernel after them."""
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    values = []
    for step in range(STEPS):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        values.append(float(records[0, 0]))
    return values


@functools.cache
def plain_losses():
    return trained(*planned(language("bfloat16")))


@pytest.mark.parametrize("kind", narrow.KINDS)
def test_several_devices_have_the_scales_of_one(small, kind):
    one = trained(*planned(language(kind)))
    trace = language(kind)
    names = named.Names(
        trace.on(lepton.topology("cpu:1")).gradient("none"), trace.arguments
    )
    up = next(g.name for g in names.groups if "up" in g.name)
    several = trained(*planned(trace, (2, 2), {"batch": 1, up: 2}, keep=1))
    plain = plain_losses()

    # bfloat16 sums its terms in another order
    np.testing.assert_allclose(one, several, rtol=2**-8)
    assert one != plain
    np.testing.assert_allclose(one, plain, rtol=0.05)


def test_what_is_computed_again_is_the_same(small):
    plain = trained(*planned(language("fp8", "scan")))
    again = trained(*planned(language("fp8", "scan"), remat="dots"))

    np.testing.assert_allclose(plain, again, rtol=2**-8)


def test_a_plan_says_how_it_multiplies_and_replays_it(small):
    trace, plan = planned(language("fp8"))

    assert plan.products == "fp8 as float32"
    assert any("emulated in float32" in decision for decision in plan.reasons)
    assert any("cpu has no fp8 products" in note for note in plan.notes)
    assert Plan.from_json(plan.to_json()).forms == trace.forms
    with pytest.raises(PlanError, match="is for fp8 products"):
        plan.check(language("bfloat16"))
    assert "int8" not in planned(language("bfloat16"))[1].to_json()


@pytest.mark.parametrize(
    ("chip", "precision", "how", "words"),
    [
        ("h100", "fp8", "fp8", []),
        ("v6e", "int8", "int8", []),
        ("tpu7x", "fp8", "fp8", []),
        ("v5p", "fp8", "fp8 as bfloat16", ["emulated", 'precision="int8"']),
        ("tpu7x", "int8", "int8 as bfloat16", ["emulated", 'precision="fp8"']),
        ("v6e", "fp8", "fp8", ["no faster", 'precision="int8"']),
        ("v4", "int8", "int8", ["no faster"]),
    ],
)
def test_chips_say_what_they_multiply(chip, precision, how, words):
    chip = hardware.CHIPS[chip]

    assert products.products_on(precision, chip) == how
    notes = products.notes(how, chip)
    assert len(notes) == bool(words)
    assert all(word in notes[0] for word in words)


def test_an_unknown_precision_names_the_nearest():
    with pytest.raises(RecipeError, match="did you mean 'int8'"):
        language("in8")

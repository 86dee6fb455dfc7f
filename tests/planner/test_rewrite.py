"""The faster forms of a gradient against what JAX traces."""

from __future__ import annotations

import doctest
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import lepton_jax as lepton
from lepton_jax.planner import rewrite
from lepton_jax.planner.rewrite import (
    angles,
    kept,
    pooling,
    program,
    slices,
    units,
)

# Greatest difference that another order of the terms of a sum makes, by the greatest
# value: sums here have fewer than 5,000 terms.
ROUNDING = 2e-5


def primitives(function, *args):
    traced = jax.make_jaxpr(rewrite.rewritten(function))(*args)
    return program.primitives(traced.jaxpr)


def both(function, *args):
    plain = jax.jit(function)(*args)
    faster = jax.jit(rewrite.rewritten(function))(*args)
    return jax.tree.leaves(plain), jax.tree.leaves(faster)


def assert_equal(function, *args):
    for plain, faster in zip(*both(function, *args), strict=True):
        np.testing.assert_array_equal(plain, faster)


def assert_close(function, *args, rounding=ROUNDING):
    for plain, faster in zip(*both(function, *args), strict=True):
        scale = float(jnp.abs(plain).max()) + 1e-30
        np.testing.assert_allclose(plain, faster, rtol=0, atol=rounding * scale)


@pytest.mark.parametrize(
    "module", (pooling, slices, program, kept, units, angles), ids=lambda m: m.__name__
)
def test_the_examples_hold(module):
    assert doctest.testmod(module).failed == 0


# ---- pooling ----


@st.composite
def poolings(draw):
    """An array with many ties, and a pooling of it: of its window, stride or pads."""
    rank = draw(st.integers(1, 3))
    window = [draw(st.integers(1, 3)) for _ in range(rank)]
    sizes = [extent + draw(st.integers(0, 5)) for extent in window]
    strides = list(window)
    if draw(st.booleans()):
        strides[0] = draw(st.integers(1, 3))
    padding = draw(st.sampled_from(["VALID", "SAME"]))
    dilation = [draw(st.sampled_from([1, 1, 1, 2])) for _ in range(rank)]
    random = np.random.default_rng(draw(st.integers(0, 99)))
    x = random.integers(-2, 3, (2, *sizes, 2))
    dtype = draw(st.sampled_from([np.float32, np.float16, jnp.bfloat16]))
    inner = [[1, *part, 1] for part in (window, strides, dilation)]
    return jnp.asarray(x, dtype), inner, padding


@given(poolings())
@settings(max_examples=12, deadline=None)
def test_max_pooling_and_its_gradient_keep_every_bit(case):
    x, (window, strides, dilation), padding = case

    def loss(x):
        y = lax.reduce_window(
            x,
            -jnp.inf,
            lax.max,
            window,
            strides,
            padding,
            window_dilation=dilation,
        )
        weights = jnp.arange(1, y.size + 1, dtype=jnp.float32).reshape(y.shape)
        return (y.astype(jnp.float32) * weights).sum()

    if any(step > 1 for step in dilation):  # JAX has no gradient for it
        assert_equal(loss, x)
    else:
        assert_equal(jax.value_and_grad(loss), x)


def test_the_gradient_of_pooling_goes_to_the_first_of_equal_values():
    def loss(x):
        return nnx.max_pool(x, (2, 2), strides=(2, 2)).sum()

    x = jnp.ones((1, 2, 2, 1))
    gradient = rewrite.rewritten(jax.grad(loss))(x)
    assert gradient.ravel().tolist() == [1, 0, 0, 0]
    assert "select_and_scatter_add" not in primitives(jax.grad(loss), x)


def test_pooling_of_whole_numbers_stays_as_it_is():
    x = jnp.arange(8)
    pooled = partial(
        lax.reduce_window,
        init_value=jnp.iinfo(jnp.int32).min,
        computation=lax.max,
        window_dimensions=(2,),
        window_strides=(2,),
        padding="VALID",
    )
    assert "reduce_window_max" in primitives(pooled, x)
    assert_equal(pooled, x)


# ---- slices ----


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 2))
@settings(max_examples=8, deadline=None)
def test_parts_of_a_value_have_the_same_gradient(widths, dim):
    shape = [3, 3, 3]
    shape[dim] = sum(widths)
    x = jnp.arange(1.0, np.prod(shape) + 1).reshape(shape)

    def loss(x):
        parts = jnp.split(x, np.cumsum(widths)[:-1], dim)
        return sum((part**2).sum() * (i + 1) for i, part in enumerate(parts))

    assert_equal(jax.grad(loss), x)
    assert "pad" not in primitives(jax.grad(loss), x)


def test_parts_that_overlap_or_leave_a_gap_are_padded():
    def overlap(x):
        return (x[:3] ** 2).sum() + (x[2:] ** 2).sum()

    def gap(x):
        return (x[:2] ** 2).sum() + (x[3:] ** 2).sum()

    for loss in (overlap, gap):
        assert_equal(jax.grad(loss), jnp.arange(5.0))


# ---- angles ----


def halves(x, cos, sin):
    left, right = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def pairs(x, cos, sin):
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], -1).reshape(x.shape)
    return x * jnp.repeat(cos, 2, -1) + turned * jnp.repeat(sin, 2, -1)


def whole(x, cos, sin):
    left, right = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return x * jnp.tile(cos, 2) + turned * jnp.tile(sin, 2)


def turned_by(write, positions, x):
    half = x.shape[-1] // 2
    rates = 100.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None] * rates
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    return (write(x, 0.5 * cos, sin).astype(jnp.float32) ** 3).sum()


@given(
    st.sampled_from([halves, pairs, whole]),
    st.booleans(),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
    st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(2, 6)),
)
@settings(max_examples=5, deadline=None)
def test_rotary_positions_are_a_table(write, by_row, dtype, shape):
    rows, length, heads = shape
    positions = jnp.arange(float(length))
    if by_row:
        positions = positions + jnp.arange(float(rows))[:, None]
    x = jax.random.normal(jax.random.key(0), (rows, length, heads, 6), dtype)
    gradient = jax.grad(partial(turned_by, write), argnums=1)

    rounding = max(ROUNDING, float(jnp.finfo(dtype).eps))
    assert_close(gradient, positions, x, rounding=rounding)
    assert "dot_general" in primitives(gradient, positions, x)


@given(st.integers(0, 10_000), st.sampled_from([(1, 2), (7, 1, 32), (3, 5, 256)]))
@settings(max_examples=8, deadline=None)
def test_a_table_holds_the_sines_themselves(start, shape):
    values = start + jnp.arange(float(np.prod(shape))).reshape(shape)

    def spread(values):
        return jnp.broadcast_to(jnp.sin(values), (2, *shape))

    assert_equal(spread, values)
    assert "dot_general" in primitives(spread, values)


def test_angles_in_a_loop_are_a_table_of_each_turn():
    positions, x = jnp.arange(5.0), jnp.ones((3, 5, 4, 6))

    def loss(positions, x):
        def layer(x, number):
            half = jnp.arange(3.0) + number
            angle = positions[:, None, None] * half
            return halves(x, jnp.cos(angle), jnp.sin(angle)), None

        return (jax.lax.scan(layer, x, jnp.arange(2.0))[0] ** 2).sum()

    assert_close(jax.grad(loss, argnums=1), positions, x)
    assert "dot_general" in primitives(loss, positions, x)


@pytest.mark.parametrize(
    "loss",
    (
        lambda x: jnp.sin(x) * 2,
        lambda x: jnp.sin(x[0, 0]) * jnp.ones((64, 64)),
        lambda x: jnp.ones((64, 400)) * jnp.sin(jnp.arange(400.0)),
        lambda x: jnp.sin(x.astype(jnp.bfloat16)) * jnp.ones((64, 4, 5), jnp.bfloat16),
    ),
    ids=("as many", "a scalar", "wide", "bfloat16"),
)
def test_other_sines_stay(loss):
    x = jnp.ones((4, 5))

    assert_equal(loss, x)
    assert "dot_general" not in primitives(loss, x)


def test_a_sine_that_goes_through_many_layers_is_followed_in_no_time():
    def loss(x):
        x = jnp.sin(x)
        for _ in range(60):  # each layer doubles the ways from the sine
            x = x + 0.5 * x * x
        return x

    assert "dot_general" not in primitives(loss, jnp.ones((4, 5)))


# ---- products ----


@given(
    st.sampled_from([(600,), (8, 100), (2, 300)]),
    st.sampled_from([(3,), (40,), (4, 5)]),
    st.sampled_from([(7,), (2, 3), (50,)]),
)
@settings(max_examples=6, deadline=None)
def test_the_gradient_of_a_kernel_is_the_same_but_for_rounding(rows, inputs, outputs):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((*rows, *inputs)), jnp.float32)
    w = jnp.asarray(random.standard_normal((*inputs, *outputs)), jnp.float32)

    def loss(w, x):
        return (jnp.tensordot(x, w, len(inputs)) ** 2).sum()

    assert_close(jax.grad(loss, (0, 1)), w, x)


# ---- loops ----


class Recurrent(nnx.Module):
    """A user's own recurrent classifier."""

    def __init__(self, cell, rngs, **options):
        self.layer = nnx.RNN(cell(5, 7, rngs=rngs), **options)
        self.out = nnx.Linear(7, 3, rngs=rngs)

    def __call__(self, x):
        shape = (x.shape[0], x.shape[-1])
        carry = self.layer.cell.initialize_carry(shape, nnx.Rngs(0))
        return self.out(self.layer(x, initial_carry=carry)).sum(1)


def loss_of(model):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        return (nnx.merge(graph, params, rest, copy=True)(x) ** 2).sum()

    return jax.value_and_grad(loss, (0, 1)), params


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("options", ({}, {"reverse": True}, {"unroll": 2}), ids=str)
@pytest.mark.parametrize(
    "cell",
    (nnx.SimpleCell, nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell),
    ids=lambda cell: cell.__name__,
)
def test_a_recurrent_network_has_the_same_gradient_but_for_rounding(cell, options):
    if options and cell is not nnx.LSTMCell:
        pytest.skip("one cell is enough for the directions")
    gradient, params = loss_of(Recurrent(cell, nnx.Rngs(0), **options))
    x = jax.random.normal(jax.random.key(1), (4, 6, 5))
    assert_close(gradient, params, x)


def _bodies(jaxpr):
    return [
        eqn.params["jaxpr"].jaxpr for eqn in jaxpr.eqns if eqn.primitive.name == "scan"
    ]


def test_two_products_a_step_stay_in_the_loops_of_an_lstm():
    gradient, params = loss_of(Recurrent(nnx.LSTMCell, nnx.Rngs(0)))
    x = jnp.ones((4, 6, 5))
    traced = jax.make_jaxpr(rewrite.rewritten(gradient))(params, x)
    forward, backward = _bodies(traced.jaxpr)
    count = [
        sum(eqn.primitive.name == "dot_general" for eqn in body.eqns)
        for body in (forward, backward)
    ]
    assert count == [1, 4]  # four gates at once; the gradient of the state by each gate


def test_a_loop_whose_carry_is_used_elsewhere_keeps_its_sum():
    w = jnp.full((3, 3), 0.5)

    def loop(w, xs):
        def step(carry, x):
            total, state = carry
            state = jnp.tanh(x + state @ w)
            return (total + state @ state.T, state * total.sum()), total

        return lax.scan(step, (jnp.zeros((2, 2)), jnp.ones((2, 3))), xs)

    xs = jnp.linspace(-1, 1, 24).reshape(4, 2, 3)
    assert_close(loop, w, xs)


def test_a_loop_with_a_print_is_left_alone(capfd):
    def loop(w, xs):
        def step(state, x):
            jax.debug.print("step")
            return jnp.tanh(x @ w + state), None

        return lax.scan(step, jnp.zeros(3), xs)[0]

    jax.block_until_ready(
        jax.jit(rewrite.rewritten(loop))(jnp.eye(3), jnp.ones((4, 3)))
    )
    jax.effects_barrier()
    assert capfd.readouterr().out.count("step") == 4


def test_a_loop_keeps_for_its_backward_pass_what_cannot_be_made_again():
    gradient, params = loss_of(Recurrent(nnx.LSTMCell, nnx.Rngs(0)))
    x = jnp.ones((4, 6, 5))
    stacked = {}
    for names in (("loops",), ("loops", "kept")):
        with rewrite.only(*names):
            traced = jax.make_jaxpr(rewrite.rewritten(gradient))(params, x)
        forward = _bodies(traced.jaxpr)[0]
        stacked[names] = len(forward.outvars)
    assert stacked["loops", "kept"] <= stacked["loops",] - 4  # four slopes of gates


# ---- dims of extent 1 ----


@given(st.lists(st.integers(1, 3), min_size=4, max_size=6), st.integers(0, 5))
@settings(max_examples=4, deadline=None)
def test_a_softmax_over_any_dim_keeps_every_bit(shape, dim):
    dim %= len(shape)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def loss(x):
        return (jax.nn.softmax(x, dim) ** 2).sum()

    plain = jax.value_and_grad(loss)(x)
    faster = rewrite.rewritten(jax.value_and_grad(loss))(x)
    jax.tree.map(np.testing.assert_array_equal, plain, faster)


# ---- the whole ----


def recipe(model, x):
    return lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam,
        learning_rate=1e-2,
        train=lepton.data.Arrays(x, np.arange(len(x)) % 3),
        batch_size=8,
        steps=3,
        shuffle=False,
    )


@pytest.fixture
def images():
    return np.random.default_rng(0).random((16, 8, 8, 1), np.float32)


def losses_of(model, x, *names):
    with rewrite.only(*names):
        trainer = lepton.Trainer(recipe(model, x), devices=1, sinks=())
        return trainer.fit().records["loss"]


def test_without_passes_the_program_is_what_jax_traces(images):
    gradient, params = loss_of(lepton.models.CNN(3, size=(8, 8, 1), rngs=nnx.Rngs(0)))
    with rewrite.only():
        assert not rewrite.applies("cpu", 1)
        traced = jax.make_jaxpr(rewrite.rewritten(gradient))(params, images)
    assert str(traced.jaxpr) == str(jax.make_jaxpr(gradient)(params, images).jaxpr)


@pytest.mark.usefixtures("quick_compilation")
def test_fit_is_the_same_with_and_without_rewriting_but_for_rounding(images):
    model = partial(lepton.models.CNN, 3, size=(8, 8, 1), widths=(4, 4), dense=8)
    off = losses_of(model, images)
    on = losses_of(model, images, *rewrite.PASSES)
    np.testing.assert_allclose(on, off, rtol=1e-5)


def test_the_plan_prices_the_program_that_runs(images):
    model = partial(lepton.models.CNN, 3, size=(8, 8, 1), widths=(4, 4), dense=8)
    trace = lepton.trace(recipe(model, images), images, np.zeros(16, np.int32))
    pooled = set()
    for where in ("cpu:1", "cpu:8", "v5e:1", "h200:1"):
        graph = trace.on(lepton.topology(where)).gradient("none")
        if any(op.name == "select_and_scatter_add" for op in graph.main.operations):
            pooled.add(where)
    assert pooled == {"cpu:8", "v5e:1", "h200:1"}

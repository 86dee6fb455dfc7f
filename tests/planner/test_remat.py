"""Rematerialization from outside: the same values, less that is kept."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lepton_jax.compat import source_line
from lepton_jax.planner.program import remat
from lepton_jax.planner.program.graph import BARRIER, Graph
from lepton_jax.planner.program.remat import boundaries, rematerialized

DIM = 32
ROWS = 64
LAYERS = 8


def layer(x, w):
    with jax.named_scope("layer"):
        hidden = jnp.tanh(x @ w["up"])
        return x + jnp.sin(hidden) * jnp.exp(-hidden) @ w["down"]


def straight(params, x, key):
    for i in range(LAYERS):
        x = layer(x, jax.tree.map(lambda p: p[i], params))  # noqa: B023
        x = jnp.where(
            jax.random.bernoulli(
                jax.random.fold_in(key, i),
                0.9,
                x.shape,
            ),
            x,
            0,
        )
    return (x**2).mean(), x.sum()


def looped(params, x, key):
    def body(carry, w):
        x, key = carry
        key, sub = jax.random.split(key)
        x = layer(x, w)
        return (jnp.where(jax.random.bernoulli(sub, 0.9, x.shape), x, 0), key), x.mean()

    (x, _), means = lax.scan(body, (x, key), params)
    return (x**2).mean(), means


def arguments():
    rng = np.random.default_rng(0)
    params = {
        "up": rng.normal(size=(LAYERS, DIM, 4 * DIM)) / 6,
        "down": rng.normal(size=(LAYERS, 4 * DIM, DIM)) / 12,
    }
    return (
        jax.tree.map(jnp.float32, params),
        jnp.float32(rng.normal(size=(ROWS, DIM))),
        jax.random.key(1),
    )


def bytes_kept(function):
    """Return the bytes that the forward pass keeps, parameters apart."""

    def backward(params, *rest):
        _, pullback, _ = jax.vjp(lambda p: function(p, *rest), params, has_aux=True)
        return pullback

    args = arguments()
    residuals = jax.tree.leaves(jax.eval_shape(backward, *args))
    parameters = set()
    for leaf in jax.tree.leaves(args[0]):
        parameters |= {leaf.shape, leaf.shape[1:]}
    return sum(
        x.size * x.dtype.itemsize for x in residuals if x.shape not in parameters
    )


def checkpoints_of(jaxpr):
    """List the equations of a jaxpr that `jax.checkpoint` makes."""
    names = ("remat2", "checkpoint")
    return [eqn for eqn in jaxpr.eqns if eqn.primitive.name in names]


@pytest.mark.parametrize("policy", ["dots", "full"])
@pytest.mark.parametrize("function", [straight, looped])
def test_values_gradients_and_random_numbers_are_the_same(function, policy):
    def results(function):
        return jax.jit(jax.value_and_grad(function, has_aux=True))(*arguments())

    expected = results(function)
    ours = results(rematerialized(function, policy))

    near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(near, ours, expected)


@pytest.mark.parametrize("function", [straight, looped])
def test_the_stricter_policy_keeps_less(function):
    none, dots, full = (
        bytes_kept(rematerialized(function, policy))
        for policy in ("none", "dots", "full")
    )
    assert full < dots < none
    assert full < none / (8 if function is looped else 3), (
        "what enters each layer, of all that it computes"
    )


def test_no_rematerialization_is_the_function_itself():
    assert rematerialized(straight, "none") is straight


def test_cast_parameters_are_kept_and_not_cast_again_in_each_segment():
    def cast(params, x, key):
        return straight(
            jax.tree.map(lambda p: p.astype(jnp.bfloat16), params),
            x.astype(jnp.bfloat16),
            key,
        )

    program = jax.make_jaxpr(rematerialized(cast, "full"))(*arguments())

    segments = checkpoints_of(program.jaxpr)
    assert len(segments) > 2
    for segment in segments[1:]:
        for eqn in segment.params["jaxpr"].eqns:
            if eqn.primitive.name == "convert_element_type":
                assert eqn.invars[0].aval.shape[:1] != (LAYERS,)


def test_straight_code_is_cut_where_little_is_alive():
    jaxpr = jax.make_jaxpr(straight)(*arguments()).jaxpr
    cuts = boundaries(jaxpr, 2)
    assert cuts[0] == 0
    assert cuts[-1] == len(jaxpr.eqns)
    assert cuts == sorted(set(cuts))
    assert len(cuts) > 3
    for cut in cuts[1:-1]:
        before = {variable for eqn in jaxpr.eqns[:cut] for variable in eqn.outvars}
        after = {
            variable
            for eqn in jaxpr.eqns[cut:]
            for variable in eqn.invars
            if not isinstance(variable, remat.Literal)
        }
        shapes = [variable.aval.shape for variable in before & after]
        activations = [shape for shape in shapes if shape[:1] == (ROWS,)]
        assert len(activations) <= 2, "not within a layer, where the wide ones live too"


def test_loops_and_small_code_are_not_cut():
    looped_jaxpr = jax.make_jaxpr(looped)(*arguments()).jaxpr
    assert boundaries(looped_jaxpr, 2) == [0, len(looped_jaxpr.eqns)]
    small = jax.make_jaxpr(lambda x: jnp.sin(jnp.cos(x)))(jnp.ones(4)).jaxpr
    assert boundaries(small, 0) == [0, 2]


def test_the_body_of_a_loop_is_run_again_but_not_a_small_cell():
    def cell(params, x, key):
        def update(h, w):
            return jnp.tanh(h * w[0, 0]), None

        h, _ = lax.scan(update, x, params["up"])
        return h.mean(), key

    def checkpoints(function):
        program = jax.make_jaxpr(rematerialized(function, "full"))(*arguments())
        (loop,) = (e for e in program.jaxpr.eqns if e.primitive.name == "scan")
        return checkpoints_of(loop.params["jaxpr"].jaxpr)

    assert len(checkpoints(looped)) == 1
    assert checkpoints(cell) == []


def test_a_second_run_is_held_back_until_it_is_needed():
    """A graph that inlines it has a barrier before it.

    Without one XLA would merge it with the first run, and keep everything after all.
    """

    def graph(function):
        gradient = jax.grad(rematerialized(function, "full"), has_aux=True)
        return Graph(jax.make_jaxpr(gradient)(*arguments()), 2, 2)

    assert any(op.name == BARRIER for op in graph(straight).operations())
    assert not graph(straight).unknown
    assert not graph(looped).unknown


def test_source_lines_and_scopes_are_kept():
    program = jax.make_jaxpr(rematerialized(straight, "full"))(*arguments())

    segment = checkpoints_of(program.jaxpr)[0]
    eqns = segment.params["jaxpr"].eqns
    dots = [eqn for eqn in eqns if eqn.primitive.name == "dot_general"]
    assert dots
    for eqn in dots:
        assert "test_remat.py" in source_line(eqn)
        assert "layer" in str(eqn.source_info.name_stack)

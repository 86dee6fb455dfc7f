"""Rematerialization value by value: what a backward pass finds kept."""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.planner import Plan
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.program.keeping import (
    ALL_ATTENTION,
    Keeping,
    Kept,
    is_keeping,
    keeping_of,
)
from lepton_jax.planner.program.remat import rematerialized
from lepton_jax.planner.rewrite.program import equations
from lepton_jax.planner.search.finer import chosen

DIM = 32
ROWS = 64
LAYERS = 8
AWAY = ["offload 0-1", "keep 0 and offload 1", "keep 2 and 0 in 3 and offload 1"]


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


# ---- the program ----


def layer(x, params):
    gate = jnp.tanh(x @ params["gate"])
    up = jnp.einsum("rd,dh->rh", x, params["up"])  # a call, in JAX's own form
    return jnp.sin(x) + (gate * jnp.sin(up)) @ params["down"]


def straight(params, x):
    for i in range(LAYERS):
        x = layer(x, {name: kernel[i] for name, kernel in params.items()})
    return (x**2).mean()


def looped(params, x):
    def body(x, params):
        x = layer(x, params)
        return x, x.mean()

    x, means = lax.scan(body, x, params)
    return (x**2).mean() + means.sum()


@functools.cache
def arguments():
    rng = np.random.default_rng(0)
    params = {
        "gate": rng.normal(size=(LAYERS, DIM, 4 * DIM)) / 6,
        "up": rng.normal(size=(LAYERS, DIM, 4 * DIM)) / 6,
        "down": rng.normal(size=(LAYERS, 4 * DIM, DIM)) / 12,
    }
    x = rng.normal(size=(ROWS, DIM))
    return jax.tree.map(jnp.float32, params), jnp.float32(x)


def products(function, policy):
    """Return how many products of a hidden layer a gradient computes in a turn."""
    gradient = jax.grad(rematerialized(function, policy))
    program = jax.make_jaxpr(gradient)(*arguments())
    shape = (ROWS, 4 * DIM)
    dots = [e for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    return sum(eqn.outvars[0].aval.shape == shape for eqn in dots)


@pytest.mark.parametrize("policy", ["keep 0", "keep 0-1", "keep 1 and 0 in 3", *AWAY])
@pytest.mark.parametrize("function", [straight, looped])
def test_values_and_gradients_are_the_same(function, policy):
    def results(function):
        return jax.jit(jax.value_and_grad(function))(*arguments())

    ours = results(rematerialized(function, policy))
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(near, ours, results(function))


def test_what_is_kept_is_not_computed_again():
    # forward gate and up, backward the gradient that enters both
    assert products(looped, "dots") == 3
    assert products(looped, "full") == 3 + 2
    assert products(looped, "keep 0") == products(looped, "keep 1") == 3 + 1
    assert products(looped, "keep 0-1") == 3
    assert products(looped, "keep 2") == 3 + 2, "nothing reads what is added"
    assert products(looped, "keep 2 and offload 0-1") == 3
    assert products(looped, "keep 0 and offload 1") == 3


def test_the_first_turns_of_a_loop_keep_more():
    both = products(looped, "keep 0 and 1 in 3")
    assert both == products(looped, "keep 0") + products(looped, "keep 0-1")
    assert products(looped, "keep 0 and 1 in 8") == products(looped, "keep 0-1"), (
        "a loop of eight turns stays whole"
    )


def test_a_straight_program_is_numbered_layer_by_layer():
    full = products(straight, "full")
    assert products(straight, "keep 0") == full - 1
    assert products(straight, "keep 0,1,3") == full - 3


def test_some_layers_of_a_stack_lie_as_the_stack_does():
    gradient = jax.grad(rematerialized(looped, "keep 0 and 1 in 3"))
    graph = Graph(jax.make_jaxpr(gradient)(*arguments()), parameters=3, gradients=3)
    parts = [op for op in graph.main.operations if op.name == "slice"]
    kernels = [op.outputs[0] for op in parts if op.inputs[0].stored is not None]
    assert len(kernels) >= 6
    assert all(kernel.stored[1] == (-1, 1, 2) for kernel in kernels)


@pytest.mark.parametrize("policy", AWAY)
def test_what_is_offloaded_lies_on_the_host_between_the_passes(policy):
    gradient = jax.grad(rematerialized(looped, policy))
    graph = Graph(jax.make_jaxpr(gradient)(*arguments()), parameters=3, gradients=3)
    away = [value for value in graph.values if value.on_host]
    layers = {value.shape[0] for value in away if len(value.shape) == 3}
    assert layers == ({3, 5} if "in 3" in policy else {8})
    assert all(value.shape[-2:] == (ROWS, 4 * DIM) for value in away)


keys = st.one_of(st.just(ALL_ATTENTION), st.integers(0, 200))
lists = st.lists(keys, min_size=1, unique=True)


numbers = st.lists(st.integers(0, 200), unique=True)


@given(lists, lists, st.integers(0, 99), numbers)
def test_a_policy_is_read_as_it_is_written(always, first, turns, host):
    def parts(keeping):
        always, first, turns, host = keeping
        return set(always), set(first), turns, set(host)

    written = Keeping(tuple(always), tuple(first) if turns else (), turns, tuple(host))
    assert is_keeping(str(written))
    away = Keeping((), host=(*host, 0))
    assert is_keeping(str(away)) and parts(keeping_of(str(away))) == parts(away)
    assert parts(keeping_of(str(written))) == parts(written)


# ---- the choice ----

kept = st.builds(
    Kept,
    st.integers(0, 10**6),
    st.sampled_from([1, 4, 32]),
    st.integers(1, 10**6).map(lambda n: 32 * n),
    st.floats(1, 1e9),
    st.none(),
)


@given(st.lists(kept, unique_by=lambda value: value.key), st.integers(0, 10**8))
def test_what_is_chosen_fits_and_nothing_more_would(values, room):
    choice = chosen(values, room)
    by_key = {value.key: value for value in values}
    taken = sum(by_key[key].bytes for key in choice.always)
    for key in choice.first:
        value = by_key[key]
        assert 0 < choice.turns < value.turns
        taken += value.bytes * choice.turns / value.turns
    assert taken <= room

    left = room - sum(by_key[key].bytes for key in choice.always)
    others = [value for value in values if value.key not in choice.always]
    assert all(value.bytes > left for value in others)


@given(
    st.lists(kept, unique_by=lambda value: value.key),
    st.integers(0, 10**8),
    st.integers(0, 10**8),
)
def test_the_host_takes_what_does_not_fit_and_is_dearer_than_what_is_left(
    values, room, host
):
    choice = chosen(values, room, host)
    alone = chosen(values, room)
    assert choice.always == alone.always
    by_key = {value.key: value for value in values}
    away = [by_key[key] for key in choice.host]
    assert sum(value.bytes for value in away) <= host
    assert not set(choice.host) & {*choice.always, *choice.first}
    left = host - sum(value.bytes for value in away)
    others = [v for v in values if v.key not in (*choice.always, *choice.host)]
    assert all(value.bytes > left for value in others)


@functools.cache
def traced():
    model = partial(
        models.TransformerLM,
        256,
        dim=256,
        layers=16,
        heads=4,
        hidden=1024,
        loop="scan",
    )
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=64,
        precision="bfloat16",
    )
    tokens = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    return lepton.trace(recipe, tokens, tokens)


def on(memory, **figures):
    """Return a TPU with some bytes of memory."""
    whole = lepton.topology("v5e:1x1")
    chip = dataclasses.replace(whole.chip, memory=memory, **figures)
    return dataclasses.replace(whole, chip=chip)


@functools.cache
def bound(remat):
    """Return the bytes within which a policy surely fits, in one piece."""
    where = lepton.topology("v5e:1x1")
    return lepton.plan(traced(), where, remat=remat, micro_batches=1).peak_bound


def planned(share, **pins):
    """Plan for a memory between those of two policies."""
    where = on(planned_memory(share))
    return lepton.plan(traced(), where, micro_batches=1, **pins)


def planned_memory(share):
    return (1 - share) * bound("full") + share * bound("dots")


def test_between_two_policies_the_room_is_used():
    full = planned(0.8, remat="full")
    little, much = planned(0.3), planned(0.8)
    assert little.remat.startswith("keep attention")
    assert much.remat.startswith("keep attention,")
    assert much.peak_bound <= much.memory
    assert sum(much.seconds.values()) < sum(little.seconds.values())
    assert sum(little.seconds.values()) < sum(full.seconds.values())
    assert full.peak < little.peak < much.peak


def test_values_on_the_host_take_time_there_and_no_memory_of_the_device():
    plan = partial(planned, 0.8)
    less = plan(remat="keep attention,0")
    away = plan(remat="keep attention,0 and offload 1")
    kept = plan(remat="keep attention,0-1")
    assert away.peak < kept.peak
    assert away.bytes_per_device["activations"] == less.bytes_per_device["activations"]
    assert away.seconds["matmul"] == kept.seconds["matmul"] < less.seconds["matmul"]
    assert away.seconds["memory"] > kept.seconds["memory"]
    slow = on(planned_memory(0.8), host_bandwidth=1e6)
    late = lepton.plan(traced(), slow, micro_batches=1, remat=away.remat)
    assert late.seconds["communication"] > away.seconds["communication"]
    layers, tokens, width = 16, 64 * 1024, 256
    assert f"{layers * tokens * width * 2 / 2**20:.1f} MiB" in away.reasons["offload"]
    assert "offload" not in kept.reasons


def test_where_the_link_is_fast_the_planner_offloads_by_itself():
    memory = planned_memory(0.3)
    fast = lepton.plan(traced(), on(memory, host_bandwidth=1e12), micro_batches=1)
    slow = lepton.plan(traced(), on(memory, host_bandwidth=1e6), micro_batches=1)
    none = lepton.plan(traced(), on(memory, host_memory=0.0), micro_batches=1)
    assert "offload" in fast.remat
    assert "offload" not in slow.remat and slow.remat == none.remat
    assert sum(fast.seconds.values()) < 0.98 * sum(none.seconds.values())
    assert fast.peak_bound <= fast.memory


def test_where_the_devices_have_no_room_everything_may_go_to_the_hosts():
    full = on(planned_memory(0.01), host_bandwidth=1e12)
    plan = lepton.plan(traced(), full, micro_batches=1)
    assert plan.remat.startswith("offload 0")
    assert Plan.from_json(plan.to_json()).remat == plan.remat


def test_a_plan_that_keeps_some_values_is_replayed():
    plan = planned(0.5)
    again = Plan.from_json(plan.to_json())
    assert again.remat == plan.remat
    pinned = planned(0.5, remat=plan.remat)
    assert pinned.remat == plan.remat
    assert pinned.peak == plan.peak


@pytest.mark.parametrize(
    ("remat", "says"),
    [
        ("keep 99", "keeps product 99, which the model has not"),
        ("keep 0 and 77 in 3", "keeps product 77"),
        ("keep", "'keep' is not known"),
        ("keep 0,nothing", "is not known"),
        ("keep 0 and 1 in 0", "is not known"),
        ("offload attention", "is not known"),
        ("offload 0 and offload 1", "is not known"),
        ("keep 0 and offload 1 and offload 2", "is not known"),
        ("keep 0 and offload attention", "is not known"),
        ("keep 0 and offload 78", "keeps product 78"),
    ],
)
def test_a_wrong_policy_is_an_error_that_says_what_there_is(remat, says):
    with pytest.raises(lepton.PlanError, match=says) as caught:
        planned(0.5, remat=remat)
    assert "product 0" in str(caught.value) or "none, dots, full" in str(caught.value)


def test_a_value_is_kept_in_one_place():
    with pytest.raises(lepton.PlanError, match="product 1 in two places"):
        planned(0.5, remat="keep 0-2 and offload 1")

"""Mixtures of experts that drop no token, on one device and on several."""

from __future__ import annotations

import doctest
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import losses, models
from lepton_jax.models import moe
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate import workspace
from lepton_jax.planner.estimate.sizes import Sizes
from lepton_jax.planner.program import named, ragged
from lepton_jax.planner.program.graph import Graph
from lepton_jax.planner.rewrite import experts, own
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program
from lepton_jax.verify.comparison import verify

RTOL = 1e-5
BATCH, LENGTH = 8, 6
LONG = 256  # of so many tokens experts are gathered for them, not they for the experts
SHAPE = {"vocab": 32, "dim": 16, "layers": 1, "heads": 2, "hidden": 24, "experts": 8}


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@pytest.fixture(autouse=True)
def small_arrays_split(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)


def test_the_examples_of_experts_hold():
    assert doctest.testmod(experts).failed == 0


# ---- what it computes ----


def token_by_token(x, choices, gates, gate, up, down):
    """Return the sum of each token's experts, each computed for all tokens."""
    total = jnp.zeros_like(x)
    for expert in range(gate.shape[0]):
        out = (jax.nn.silu(x @ gate[expert]) * (x @ up[expert])) @ down[expert]
        weight = jnp.where(choices == expert, gates, 0).sum(-1, keepdims=True)
        total = total + weight * out
    return total


def arrays(tokens=(3, 5), chosen=2, count=4):
    keys = jax.random.split(jax.random.key(0), 6)
    kernels = [(count, 6, 7), (count, 6, 7), (count, 7, 6)]
    x = jax.random.normal(keys[0], (*tokens, 6))
    scores = jax.random.normal(keys[1], (*tokens, count))
    gates, choices = jax.lax.top_k(jax.nn.softmax(scores), chosen)
    pairs = zip(keys[2:], kernels, strict=False)
    return [x, choices, gates, *(jax.random.normal(k, shape) for k, shape in pairs)]


def with_gradients(function, x, choices, *rest):
    def loss(x, *rest):
        return jnp.sin(function(x, choices, *rest)).sum()

    every = tuple(range(len(rest) + 1))
    return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, every))(x, *rest))


def in_mixture(*arrays):
    """Return what a plan's own operation for experts computes."""
    numbers = jnp.arange(arrays[3].shape[0])
    return experts.mixture.__wrapped__(*arrays, numbers, platform="")


@pytest.mark.parametrize("function", (moe.chosen_experts, in_mixture))
def test_bfloat16_of_experts_is_as_exact_as_the_formulas(function):
    given = [
        x if x.dtype == jnp.int32 else x.astype(jnp.bfloat16)
        for x in arrays((6, 8), count=4)
    ]
    wide = [x if x.dtype == jnp.int32 else x.astype(jnp.float32) for x in given]

    triples = zip(
        with_gradients(token_by_token, *wide),
        with_gradients(token_by_token, *given),
        with_gradients(function, *given),
        strict=True,
    )
    for exact, formula, found in triples:
        assert found.dtype == jnp.bfloat16
        rounding = jnp.sqrt(jnp.mean((formula - exact) ** 2))
        # as many roundings, in another order
        assert jnp.sqrt(jnp.mean((found - exact) ** 2)) <= 1.25 * rounding


@pytest.mark.parametrize("tokens", ((3, 5), (1,)))
def test_experts_compute_what_a_formula_for_each_token_does(tokens):
    given = arrays(tokens)

    pairs = zip(
        with_gradients(token_by_token, *given),
        with_gradients(moe.chosen_experts, *given),
        strict=True,
    )
    for known, found in pairs:
        limit = RTOL * max(1.0, float(jnp.abs(known).max()))
        np.testing.assert_allclose(found, known, rtol=0, atol=limit)


def test_no_token_is_dropped_where_all_choose_one_expert():
    x, choices, gates, *kernels = arrays(chosen=1)
    choices = jnp.full_like(choices, 2)

    found = moe.chosen_experts(x, choices, gates, *kernels)

    known = token_by_token(x, choices, gates, *kernels)
    np.testing.assert_allclose(found, known, rtol=RTOL, atol=RTOL)


def test_the_kernel_for_tpus_gives_the_same_gradients():
    *given, numbers = *arrays(), jnp.arange(4)

    def both(platform):
        def run(*arrays):
            return experts.mixture.__wrapped__(*arrays, numbers, platform=platform)

        return with_gradients(run, *given)

    for known, found in zip(both(""), both("interpreted"), strict=True):
        limit = RTOL * max(1.0, float(jnp.abs(known).max()))
        np.testing.assert_allclose(found, known, rtol=0, atol=limit)


def test_parts_of_the_experts_add_up_to_all():
    given = arrays()
    kernels = given[3:]

    parts = [
        moe.grouped_experts(
            *given[:3], *(k[i : i + 2] for k in kernels), jnp.arange(i, i + 2)
        )
        for i in (0, 2)
    ]

    known = moe.chosen_experts(*given)
    np.testing.assert_allclose(parts[0] + parts[1], known, rtol=RTOL, atol=RTOL)


def test_enough_capacity_is_as_good_as_none():
    from flax import nnx

    layer = moe.Experts(8, 12, 4, chosen=2, capacity=4.0, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 6, 8))

    with_slots = layer(x)
    layer.capacity = None

    np.testing.assert_allclose(layer(x), with_slots, rtol=1e-4, atol=RTOL)


# ---- on several devices ----


def batches():
    x = np.random.default_rng(0).integers(0, 32, (2, BATCH, LENGTH + 1), np.int32)
    return x[..., :-1], x[..., 1:]


def traced(**more):
    recipe = lepton.Recipe(
        model=partial(models.MoELM, **SHAPE, capacity=None, **more),
        loss=losses.cross_entropy,
        optimizer=optax.sgd(0.5),
        batch_size=BATCH,
        steps_per_call=1,
    )
    return lepton.trace(recipe, *(x[0] for x in batches()))


def trained(trace, plan):
    devices = jax.devices()[: math.prod(plan.mesh.values())]
    program = Program(trace, plan, devices)
    state = program.init(0)
    values = []
    for step in range(2):
        batch = jax.tree.map(lambda x, step=step: x[step], batches())
        batch = jax.device_put(batch, program.block_sharding)
        state, records = program.train(state, batch, 0, 1)
        values.append(float(records[0, 0]))
    return values


def planned(trace, sizes, masks, keep=0, remat="none"):
    where = lepton.topology(f"cpu:{math.prod(sizes)}")
    trace = trace.on(where)
    names = named.Names(trace.gradient(remat), trace.arguments)
    known = [group.name for group in names.groups]
    ends = {"experts": "feed_forward/up.0", "hidden": "feed_forward/up.2"}
    chosen = {}
    for what, mask in masks.items():
        end = ends.get(what, what)
        chosen[next(name for name in known if name.endswith(end))] = mask
    assignment = build.by_hand(trace, sizes, chosen, keep, remat)
    return trace, build.fixed(trace, where, assignment)


@pytest.fixture(scope="module")
def expected():
    recipe = traced().recipe
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "chosen_experts", token_by_token)
        trace = lepton.trace(recipe, *(x[0] for x in batches()))
        return trained(*planned(trace, (1,), {}))


@pytest.mark.parametrize(
    ("sizes", "masks", "keep", "remat"),
    [
        ((1,), {}, 0, "none"),
        ((8,), {"batch": 1}, 1, "dots"),
        ((8,), {"batch": 1, "experts": 1}, 0, "none"),
        ((2, 4), {"batch": 3, "experts": 2}, 1, "full"),
        ((4, 2), {"batch": 1, "hidden": 2}, 0, "none"),
    ],
    ids=["one device", "fsdp", "experts", "fsdp and experts", "hidden units"],
)
def test_experts_on_several_devices_train_as_the_formula(
    sizes, masks, keep, remat, expected
):
    trace, plan = planned(traced(), sizes, masks, keep, remat)

    assert plan.experts
    np.testing.assert_allclose(trained(trace, plan), expected, rtol=RTOL)


def test_the_plan_says_that_no_token_is_dropped_and_is_kept(tmp_path):
    _, plan = planned(traced(), (1,), {})

    assert "experts without dropped tokens" in str(plan)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert lepton.Plan.load(path).experts


def test_samples_do_not_meet_in_experts():
    from lepton_jax.planner.program import interaction

    assert interaction.where_samples_of_a_step_meet(traced()) is None


def test_a_function_of_the_same_name_is_no_mixture():
    @jax.jit
    def chosen_experts(x, *_):
        return x

    assert not experts.has_mixture(jax.make_jaxpr(chosen_experts)(*arrays()).jaxpr)


@pytest.mark.parametrize("length", (LENGTH, LONG), ids=["tokens", "kernels"])
def test_xla_sends_what_is_planned_for_experts(length):
    """Few tokens are gathered for the experts, experts for many tokens."""
    token = jax.ShapeDtypeStruct((1, length), jnp.int32)
    trace = lepton.trace(traced().recipe, token, token).on(lepton.topology("cpu:8"))
    plan = lepton.plan(trace, lepton.topology("cpu:8"), mesh={"expert": 8})
    assert plan.experts

    found = verify(trace, plan)

    assert not found.unexpected and not found.absent
    assert found.flops == pytest.approx(plan.flops, rel=0.05)


# ---- memory ----


@pytest.mark.parametrize(
    ("length", "sizes", "masks", "tokens_over", "hidden_over"),
    [
        (LONG, (8,), {"batch": 1}, 8, 1),
        (48, (2, 4), {"batch": 3, "experts": 2}, 2, 1),
        (48, (4, 2), {"batch": 3, "experts": 2}, 4, 1),
        (LONG, (4, 2), {"batch": 1, "hidden": 2}, 4, 2),
    ],
    ids=["tokens", "experts over 4", "experts over 2", "hidden units"],
)
def test_rows_are_those_of_all_devices_that_share_the_experts(
    length, sizes, masks, tokens_over, hidden_over
):
    """Tokens lie split over the experts' axis, too, but are gathered for them."""
    token = jax.ShapeDtypeStruct((1, length), jnp.int32)
    where = lepton.topology(f"cpu:{math.prod(sizes)}")
    trace = lepton.trace(traced().recipe, token, token).on(where)
    names = named.Names(trace.gradient("none"), trace.arguments)
    groups = {"experts": "feed_forward/up.0", "hidden": "feed_forward/up.2"}
    chosen = [
        sum(
            mask
            for what, mask in masks.items()
            if group.name.endswith(groups.get(what, what))
        )
        for group in names.groups
    ]
    assignment = Assignment(sizes, tuple(chosen), keep=0)
    held = Sizes(names.graph, names)
    layout = workspace.laid_out(names, assignment, held.prefers)

    found = workspace.workspace_bytes(layout, held.working, tiled=False)

    values = [names.graph.values[index] for index in found]
    rows = BATCH * length * 2 / tokens_over
    width = {SHAPE["hidden"]: SHAPE["hidden"] / hidden_over, SHAPE["dim"]: SHAPE["dim"]}
    for value in values:
        count = rows if len(value.shape) == 4 else rows / 2  # chosen twice, or once
        assert found[value.index] == 4 * count * width[value.shape[-1]]
    assert {value.shape[-1] for value in values} == set(width)


def test_the_forward_pass_runs_again_only_when_its_slopes_are_there():
    """Else XLA begins it at once in all layers, and keeps what each of them makes."""
    given = arrays()
    kernels = given[3:]

    def loss(x):
        return experts.ruled(moe.chosen_experts)(x, *given[1:3], *kernels).sum()

    program = jax.make_jaxpr(jax.grad(loss))(given[0])
    (gradient,) = [
        eqn for eqn in program.jaxpr.eqns if eqn.primitive.name == own.OWN_GRADIENT
    ]
    shapes = [variable.aval for variable in gradient.invars]
    body = jax.make_jaxpr(partial(gradient.params["own"].run, ""))(*shapes).jaxpr

    barriers = [e for e in body.eqns if e.primitive.name == "optimization_barrier"]
    assert any(body.invars[-1] in barrier.invars for barrier in barriers)


# ---- grouped products ----


def test_grouped_products_have_named_axes_and_flops():
    def loss(x, w, sizes):
        return jax.lax.ragged_dot(x, w, sizes).sum()

    x, w = jnp.ones((8, 4)), jnp.ones((3, 4, 5))
    sizes = jnp.array([2, 3, 3])
    graph = Graph(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w, sizes), 2, 2)
    found = [op for op in graph.operations() if op.name == ragged.RAGGED]

    assert not graph.unknown
    by_shape = {op.outputs[0].shape: op for op in found}
    of_kernels = by_shape[3, 4, 5]
    inputs = graph.main.inputs
    for dim in (1, 2):
        left = graph.find(of_kernels.outputs[0].nodes[dim])
        assert left == graph.find(inputs[1].nodes[dim])
    for op in found:
        assert ragged.ragged_flops(op.eqn) == 2 * 8 * 4 * 5
        assert ragged.ragged_flops(op.eqn, dense=True) == 3 * 2 * 8 * 4 * 5

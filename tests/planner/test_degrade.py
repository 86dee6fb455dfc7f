"""The planner says what it can't do, and the results stay right.

Planning touches no device.
"""

import functools
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from jax.experimental import pallas as pl
from jax.experimental.custom_partitioning import custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir

import lepton_jax as lepton
from lepton_jax.errors import ModelError, PlanError
from lepton_jax.planner import planning
from lepton_jax.planner.program import named
from lepton_jax.planner.search import build as search
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

CPU = lepton.topology("cpu:8")
ONE = lepton.topology("cpu:1")
STEPS = 3

doubled_p = Primitive("doubled")
doubled_p.def_abstract_eval(lambda x: x)
doubled_p.def_impl(lambda x: x + x)
mlir.register_lowering(
    doubled_p, mlir.lower_fun(lambda x: x + x, multiple_results=False)
)

partitioned = custom_partitioning(lambda x: x + x)
partitioned.def_partition(
    partition=lambda mesh, args, result: (
        mesh,
        lambda x: x + x,
        result.sharding,
        (result.sharding,),
    ),
    infer_sharding_from_operands=lambda mesh, args, result: args[0].sharding,
    sharding_rule="i j -> i j",
)


def kernel(x):
    def body(x_ref, out_ref):
        out_ref[...] = x_ref[...] * 2

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
        interpret=True,
    )(x)


def called_back(x):
    return jax.pure_callback(
        lambda x: np.asarray(x) * 2,
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        x,
    )


DOUBLES = {
    "doubled": doubled_p.bind,
    "custom_partitioning": partitioned,
    "pallas_call": kernel,
    "pure_callback": called_back,
}


def differentiable(double):
    function = jax.custom_vjp(double)
    function.defvjp(
        lambda x: (double(x), None),
        lambda _, g: (double(g),),
    )
    return function


class Odd(nnx.Module):
    """Two layers, and between them an operation that the planner has never heard of."""

    def __init__(self, operation, rngs):
        self.first = nnx.Linear(16, 32, rngs=rngs)
        self.last = nnx.Linear(32, 8, rngs=rngs)
        self.operation = operation

    def __call__(self, x):
        return self.last(self.operation(jnp.tanh(self.first(x))))


def traced(
    model,
    width=16,
    batch=16,
    loss=lepton.losses.cross_entropy,
    **fields,
):
    recipe = lepton.Recipe(
        model=model,
        loss=loss,
        optimizer=optax.adam(1e-2, eps=1e-3),
        batch_size=batch,
        steps_per_call=1,
        **fields,
    )
    return lepton.trace(
        recipe,
        jax.ShapeDtypeStruct((1, width), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def losses(trace, plan):
    program = Program(
        trace,
        plan,
        jax.devices()[: math.prod(plan.mesh.values())],
    )
    state = program.init(0)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(STEPS):
        batch = (
            rng.normal(size=trace.inputs.shape).astype(np.float32),
            rng.integers(0, 7, trace.targets.shape).astype(np.int32),
        )
        state, records = program.train(
            state,
            jax.device_put(batch, program.block_sharding),
            0,
            1,
        )
        found.append(float(records[0, 0]))
    assert {k: tuple(x.sharding.spec) for k, x in by_path(state).items()} == {
        a.path: a.spec for a in plan.arrays
    }
    return found


def alone(trace):
    return losses(
        trace,
        search.fixed(
            trace,
            ONE,
            search.by_hand(trace, (1,), {}, 0),
        ),
    )


@pytest.mark.parametrize("name", DOUBLES)
def test_an_unknown_primitive_is_reported_and_computes_the_same(name, monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)
    trace = traced(lambda rngs: Odd(differentiable(DOUBLES[name]), rngs))
    groups = named.Names(trace.gradient("none"), trace.arguments).groups
    hidden = next(g.name for g in groups if "first" in g.name and g.size == 32)
    plans = [
        planning.plan(trace, CPU),
        search.fixed(
            trace,
            CPU,
            search.by_hand(
                trace,
                (2, 4),
                {"batch": 1, hidden: 2},
                1,
            ),
        ),
    ]
    expected = alone(trace)
    for plan in plans:
        (note,) = plan.notes
        assert f"no rule for the primitive '{name}'" in note
        assert "whole on each device" in note
        np.testing.assert_allclose(
            losses(trace, plan),
            expected,
            rtol=1e-5,
        )


def test_a_loop_of_unknown_length_is_no_obstacle():
    def iterate(x):
        return jax.lax.while_loop(
            lambda c: jnp.abs(c).max() > 0.1,
            lambda c: c / 2,
            x,
        )

    function = jax.custom_vjp(iterate)
    function.defvjp(
        lambda x: (iterate(x), None),
        lambda _, g: (g,),
    )
    trace = traced(lambda rngs: Odd(function, rngs))
    plan = planning.plan(trace, CPU)
    assert not plan.notes
    np.testing.assert_allclose(
        losses(trace, plan),
        alone(trace),
        rtol=1e-5,
    )


def test_a_shape_that_depends_on_values_is_an_error_at_the_users_line():
    with pytest.raises(ModelError, match=r"test_degrade\.py"):
        traced(lambda rngs: Odd(lambda x: x[x > 0], rngs))


@pytest.mark.parametrize(
    ("widths", "batch"),
    [
        ((7, 13, 11), 16),
        ((16, 13, 8), 16),
        ((7, 13, 11), 13),
        ((16, 32, 8), 13),
        ((16, 32, 8), 12),
    ],
)
@pytest.mark.parametrize("mesh", [None, {"data": 2, "tensor": 4}])
def test_sizes_that_divide_nothing_stay_whole(widths, batch, mesh, monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)
    trace = traced(
        lambda rngs: lepton.models.MLP(widths, rngs=rngs),
        widths[0],
        batch,
    )
    plan = planning.plan(trace, CPU, mesh=mesh)
    for array in (*plan.arrays, *plan.batch):
        for extent, entry in zip(array.shape, array.spec, strict=False):
            count = math.prod(
                plan.mesh[a]
                for a in ((entry,) if isinstance(entry, str) else entry or ())
            )
            assert extent % count == 0
            assert count == 1 or extent not in (7, 11, 13)
    np.testing.assert_allclose(
        losses(trace, plan),
        alone(trace),
        rtol=1e-5,
    )


def test_a_batch_that_cannot_be_split_is_said():
    plan = planning.plan(
        traced(lambda rngs: lepton.models.MLP((7, 13, 11), rngs=rngs), 7, 13), CPU
    )
    assert plan.batch_axes == ()
    assert plan.name == "idle"
    assert "idle" in plan.mesh


def test_what_is_asked_to_be_kept_in_parts_and_does_not_divide_says_so(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)

    def model(rngs):
        return lepton.models.MLP((7, 13, 11), rngs=rngs)

    trace = traced(model, 7, 16)
    assignment = search.by_hand(trace, (8,), {"batch": 1}, 1)

    plan = search.fixed(trace, CPU, assignment)

    reasons = {a.path: a.reason for a in plan.arrays if a.kind == "params"}
    assert "7x13" in reasons["params/layers/0/kernel"]
    assert all(not a.spec for a in plan.arrays)


class Sentences(linen.Module):
    @linen.compact
    def __call__(self, tokens, train: bool):
        x = linen.Embed(64, 32)(tokens)
        return linen.Dense(64)(
            linen.Dropout(0.1, deterministic=not train)(
                x + linen.MultiHeadDotProductAttention(4)(x)
            )
        )


@pytest.mark.parametrize(
    ("model", "objective"),
    [
        (Sentences(), "memory"),
        (
            functools.partial(
                lepton.models.TransformerLM,
                64,
                dim=32,
                layers=2,
                heads=4,
            ),
            "time",
        ),
    ],
    ids=["linen", "nnx"],
)
def test_planning_allocates_no_device_array(model, objective, monkeypatch):
    def refuse(*args, **kwargs):
        pytest.fail("an array was put on a device")

    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw(1e-3),
        batch_size=16,
        precision="bfloat16",
    )
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)

    def plan(**options):
        return planning.plan(
            lepton.trace(recipe, tokens, tokens),
            lepton.topology("h200:8"),
            objective=objective,
            **options,
        )

    plan()  # constants that JAX itself keeps from its first trace on
    gc.collect()
    before = jax.live_arrays()
    monkeypatch.setattr(jax, "device_put", refuse)
    plans = plan(), plan(remat="full", micro_batches=2)
    gc.collect()
    known = {id(x) for x in before}
    assert plans[1].remat == "full"
    assert [x.shape for x in jax.live_arrays() if id(x) not in known] == []


def test_a_plan_for_chips_that_are_not_there_needs_none():
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    recipe = lepton.Recipe(
        model=lambda rngs: lepton.models.TransformerLM(
            512,
            dim=256,
            layers=2,
            heads=8,
            rngs=rngs,
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw(1e-3),
        batch_size=4096,
    )
    plan = planning.plan(
        lepton.trace(recipe, tokens, tokens), lepton.topology("v5p:4x4x4")
    )
    assert math.prod(plan.mesh.values()) == 64
    with pytest.raises(PlanError, match="64 devices, 8 are given"):
        plan.make_mesh(jax.devices())

"""A stack of layers as a pipeline computes what the plain model computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import Primitive

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.monitor import read_events
from lepton_jax.planner import planning
from lepton_jax.planner.program import named
from lepton_jax.planner.rewrite import Stages, forms, in_stages
from lepton_jax.planner.rewrite.attention import How, attend
from lepton_jax.planner.search import build
from lepton_jax.train.program import Program
from lepton_jax.verify.comparison import verify

LAYERS = 8
SAMPLES = 12
WIDTH = 5
RTOL = 1e-5  # of losses in float32
CPU = lepton.topology("cpu:8")


@pytest.fixture(autouse=True, scope="module")
def small_arrays_are_split_too(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "SMALL", 0)
        yield
    traced.cache_clear()
    plainly.cache_clear()


# ---- the rewrite ----


def tower(weights, x, key):
    """Layers with dropout, a constant of the samples, and results of each layer.

    At zero its layers have no slope.
    """
    keys = jax.random.split(key, weights.shape[0])
    place = x[:, :1]

    @jax.checkpoint
    def layer(x, row):
        kernel, key = row
        x = jnp.tanh(x @ kernel) + 0.1 * place
        x = jnp.where(jax.random.bernoulli(key, 0.8, x.shape), x, 0.0) + 0.01
        x = x / jnp.sqrt((x**2).sum(-1, keepdims=True))
        return x, (jnp.mean(x**3), x[:, 1])

    x, (means, columns) = jax.lax.scan(layer, x, (weights, keys))
    return x.sum() + means.sum(), (means, columns)


@functools.cache
def gradients(stages):
    keys = jax.random.split(jax.random.key(0), 3)
    weights = jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH)) / 4
    x = jax.random.normal(keys[1], (SAMPLES, WIDTH))
    function = in_stages(tower, stages, (1,))
    gradient = jax.value_and_grad(function, (0, 1), has_aux=True)
    return jax.jit(gradient)(weights, x, keys[2])


@pytest.mark.parametrize(
    "stages",
    [
        Stages(2, 3),
        Stages(4, 2),  # fewer micro-batches than stages
        Stages(8, 12),
        Stages(2, 5),  # does not divide the samples: one micro-batch
        Stages(2, 4, 2),
        Stages(2, 12, 4),
    ],
    ids=lambda s: "x".join(map(str, dataclasses.astuple(s))),
)
def test_loss_gradients_draws_and_results_of_layers_are_the_plain_ones(stages):
    result = gradients(stages)
    plain = gradients(Stages())
    for own, other in zip(jax.tree.leaves(result), jax.tree.leaves(plain), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(own, other, rtol=RTOL, atol=RTOL * scale)


def test_layers_that_do_not_divide_and_loops_over_time_stay_as_they_are():
    shape = jax.ShapeDtypeStruct
    arguments = (
        shape((LAYERS, WIDTH, WIDTH), "float32"),
        shape((SAMPLES, WIDTH), "float32"),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    in_three = in_stages(tower, Stages(3, 2), (1,))
    assert "stage_roll" not in str(jax.make_jaxpr(in_three)(*arguments))

    def over_time(kernel, x):
        def cell(state, row):
            return jnp.tanh((state + row) @ kernel), state

        return jax.lax.scan(cell, x[:, 0], x.swapaxes(0, 1))

    cells = in_stages(over_time, Stages(2, 2), (1,))
    sequences = shape((SAMPLES, LAYERS, WIDTH), "float32")
    program = jax.make_jaxpr(cells)(shape((WIDTH, WIDTH), "float32"), sequences)
    assert "stage_roll" not in str(program)


def test_a_layer_that_cannot_be_mapped_is_no_stage():
    secret = Primitive("secret")
    secret.def_abstract_eval(lambda x: x)

    def loss(weights, x):
        def layer(x, kernel):
            return secret.bind(jnp.tanh(x @ kernel)), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    shapes = (
        jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), "float32"),
        jax.ShapeDtypeStruct((SAMPLES, WIDTH), "float32"),
    )
    piped = in_stages(loss, Stages(2, 2), (1,))
    assert "stage_roll" not in str(jax.make_jaxpr(piped)(*shapes))


# ---- plans ----


def language_model(rngs, loop="scan"):
    return models.TransformerLM(
        64,
        dim=16,
        layers=4,
        heads=4,
        kv_heads=2,
        hidden=32,
        loop=loop,
        tied=True,
        rngs=rngs,
    )


@functools.cache
def traced(loop="scan"):
    recipe = lepton.Recipe(
        model=functools.partial(language_model, loop=loop),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-2),
        batch_size=16,
        steps_per_call=1,
    )
    tokens = jax.ShapeDtypeStruct((1, 8), "int32")
    return lepton.trace(recipe, tokens, tokens)


def two_losses(plan):
    """Return the losses of two steps, and the parameters after them."""
    program = Program(traced(), plan, jax.devices()[: np.prod([*plan.mesh.values()])])
    state = program.init(0)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 16, 8)).astype(np.int32)
    losses = []
    for batch in tokens:
        placed = jax.device_put((batch, batch), program.block_sharding)
        state, records = program.train(state, placed, 0, 1)
        losses.append(float(records[0, 0]))
    return losses, jax.tree.map(np.array, state.params)


@functools.cache
def plainly():
    one = build.by_hand(traced(), (1,), {}, 0)
    return two_losses(build.fixed(traced(), lepton.topology("cpu:1"), one))


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"stage": 2, "fsdp": 2, "tensor": 2}, {"stages": (2, 4), "remat": "full"}),
        ({"stage": 4, "data": 2}, {"stages": (4, 8)}),
        ({"fsdp": 4, "stage": 2}, {"stages": (2, 4), "remat": "dots"}),
        ({"stage": 2, "fsdp": 4}, {"stages": (2, 4, 2)}),
        ({"stage": 2, "data": 4}, {"stages": (2, 2), "micro_batches": 2}),
    ],
    ids=["tensor", "data", "fsdp-outside", "chunks", "micro-batches"],
)
def test_a_planned_pipeline_trains_as_one_device_does(mesh, options):
    plan = planning.plan(traced(), CPU, mesh=mesh, **options)
    assert (
        dataclasses.astuple(plan.pipeline)[: len(options["stages"])]
        == (options["stages"])
    )
    layers = [a for a in plan.arrays if a.path.startswith("params/blocks")]
    assert all(array.use[0] == "stage" for array in layers)

    losses, params = two_losses(plan)

    known, after = plainly()
    np.testing.assert_allclose(losses, known, rtol=RTOL)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(near, params, after)


def test_a_pipeline_is_a_choice_that_is_said_saved_and_never_made_on_a_cpu():
    plan = planning.plan(traced(), CPU, mesh={"stage": 4, "data": 2})
    assert (plan.stages, plan.stage_parts) == (4, 8)
    assert plan.name == "pipeline x data parallel"
    assert "27% of the stages' work is the bubble" in str(plan)
    again = lepton.Plan.from_json(plan.to_json())
    assert again.forms == plan.forms

    free = planning.plan(traced(), CPU)
    assert free.stages == 1
    older = dataclasses.asdict(free)
    for name in ("stages", "stage_parts", "stage_chunks"):
        del older[name]
    text = lepton.planner.plans.json.dumps(older)
    assert lepton.Plan.from_json(text).pipeline == Stages()


@pytest.mark.parametrize(
    ("mesh", "stages", "message"),
    [
        (None, (8,), "4 layers do not divide into 8 stages"),
        (None, (2, 3), "3 micro-batches in flight do not divide a batch of 16"),
        ({"data": 8}, 2, "the mesh divides 1"),
        (None, (4, 2, 2), "do not divide into groups of 4"),
        (None, "four", "stages is 'four'"),
    ],
)
def test_what_can_be_no_pipeline_is_an_error_with_a_remedy(mesh, stages, message):
    with pytest.raises(lepton.errors.PlanError, match=message):
        planning.plan(traced(), CPU, mesh=mesh, stages=stages)


def test_layers_in_straight_code_are_no_stack():
    with pytest.raises(lepton.errors.PlanError, match="no stack of layers"):
        planning.plan(traced("unrolled"), CPU, stages=2)


def test_xla_sends_and_computes_what_the_plan_says():
    plan = planning.plan(traced(), CPU, mesh={"stage": 4, "data": 2})
    report = verify(traced(), plan, CPU)
    assert not report.unexpected and not report.absent
    kinds = {row.kind: row for row in report.rows if "stage" in row.axes}
    permutes = kinds["collective-permute"]
    assert permutes.found == pytest.approx(permutes.planned)
    assert permutes.found_count == 2 * plan.pipeline.turns


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"stage": 2, "data": 2, "tensor": 2}, {"stages": (2, 4)}),
        ({"stage": 2, "fsdp": 4}, {"stages": (2, 4), "remat": "dots"}),
    ],
    ids=["tensor", "dots"],
)
def test_attention_of_all_stages_is_one_kernel(mesh, options, monkeypatch):
    monkeypatch.setitem(forms.LEAST_LENGTH, "cpu", 8)
    plan = planning.plan(traced(), CPU, mesh=mesh, **options)
    assert plan.attention == "blocks"
    graph = dataclasses.replace(traced(), forms=plan.forms).gradient(plan.remat)
    names = {op.name for op in graph.operations()}
    assert {"staged_attention", "staged_attention_gradient"} <= names

    losses, _ = two_losses(plan)

    np.testing.assert_allclose(losses, plainly()[0], rtol=RTOL)


@pytest.mark.parametrize("kernel", ["blocks", "splash-interpreted"])
def test_attention_mapped_over_stages_is_that_of_each(kernel):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 3, 16, heads, 8) for heads in (4, 2, 2)]
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    segments = jnp.arange(16)[None] // jnp.array([5, 7, 9])[:, None]
    how = How(causal=True, scale=0.4, kernel=kernel)

    def attends(query, key, value):
        return (attend(query, key, value, how, segments) ** 2).sum()

    gradient = jax.grad(attends, (0, 1, 2))
    mapped = jax.jit(jax.vmap(gradient))(*arrays)
    for stage in range(2):
        own = gradient(*(x[stage] for x in arrays))
        for x, expected in zip(mapped, own, strict=True):
            np.testing.assert_allclose(x[stage], expected, rtol=1e-4, atol=1e-5)


# ---- runs ----


def whole_recipe():
    tokens = np.random.default_rng(1).integers(0, 64, (64, 8)).astype(np.int32)
    policies = (lepton.controllers.guard(), lepton.controllers.clip_by_history())
    return traced().recipe.with_(
        train=(tokens, tokens),
        test=(tokens[:24], tokens[:24]),  # one batch and a half
        controller=lepton.controllers.chain(*policies),
    )


def records(folder):
    """Return what was recorded of each step, by its name."""
    events = read_events(folder / "events.jsonl")
    steps = [event["records"] for event in events if event["kind"] == "steps"]
    return {
        name: np.concatenate([np.float64(step[name]) for step in steps])
        for name in steps[0]
    }


def test_a_run_goes_on_with_a_pipeline_and_without_and_measures_the_same(tmp_path):
    free = lepton.Trainer(whole_recipe())
    plans = {
        "plain": free.plan(mesh={"data": 8}),
        "staged": free.plan(mesh={"stage": 4, "data": 2}, stages=(4, 4)),
    }

    def run(name, first, then):
        folder = tmp_path / name
        options = {"run_dir": folder}
        lepton.Trainer(whole_recipe(), plan=plans[first], **options).fit(steps=3)
        trainer = lepton.Trainer(whole_recipe(), plan=plans[then], **options).resume()
        trainer.fit(steps=3)
        return trainer

    plain = run("plain", "plain", "plain")
    known = jax.tree.map(np.array, plain.state.params)
    for name, order in {"in": ("plain", "staged"), "out": ("staged", "plain")}.items():
        other = run(name, *order)
        near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
        jax.tree.map(near, jax.tree.map(np.array, other.state.params), known)
        own = records(tmp_path / name)
        for key, values in records(tmp_path / "plain").items():
            np.testing.assert_allclose(own[key], values, rtol=1e-4)


def test_across_a_slow_network_a_pipeline_is_the_planners_own_choice():
    def model(rngs):
        return models.TransformerLM(
            512,
            dim=4096,
            layers=8,
            heads=16,
            loop="scan",
            rngs=rngs,
        )

    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=32,
        precision="bfloat16",
    )
    few_tokens = jax.ShapeDtypeStruct((1, 128), "int32")
    trace = lepton.trace(recipe, few_tokens, few_tokens)
    nodes = lepton.topology("a100:2x2")
    plain = planning.plan(trace, nodes, stages=1)

    plan = planning.plan(trace, nodes)

    assert plan.stages > 1
    assert plan.step_seconds < plain.step_seconds
    assert "the best plan without a pipeline takes" in plan.reasons["in stages"]
    assert planning.plan(trace, lepton.topology("a100:4")).stages == 1

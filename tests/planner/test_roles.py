"""Mesh axes that are called after what they do, do that and nothing else."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.planner import planning
from lepton_jax.planner.program import named
from lepton_jax.planner.search.build import by_hand, fixed
from lepton_jax.train.program import Program

pytestmark = pytest.mark.usefixtures("quick_compilation")

CPU = lepton.topology("cpu:8")
SMALL = functools.partial(
    models.TransformerLM,
    64,
    dim=32,
    layers=2,
    heads=8,
    hidden=64,
)
MIXTURE = functools.partial(
    models.MoELM,
    64,
    dim=32,
    layers=1,
    heads=4,
    hidden=64,
    experts=8,
)
ODD = functools.partial(models.MLP, (7, 13, 11))


@functools.cache
def language(model, batch_size=16):
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-2),
        batch_size=batch_size,
        steps_per_call=1,
    )
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    return lepton.trace(recipe, tokens, tokens)


@functools.cache
def rows(model, width, batch_size):
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-2),
        batch_size=batch_size,
    )
    return lepton.trace(
        recipe,
        jax.ShapeDtypeStruct((1, width), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )


def stored(plan, axis):
    """Parameters that are kept in parts over an axis."""
    return {
        a.path
        for a in plan.arrays
        if a.kind == "params"
        and any(axis in ((e,) if isinstance(e, str) else e or ()) for e in a.spec)
    }


def split(plan, axis):
    """Named axes that a mesh axis splits in computing."""
    return {a.name for a in plan.axes if axis in a.mesh}


@pytest.fixture(autouse=True)
def _everything_is_worth_splitting(monkeypatch):
    monkeypatch.setattr(named, "SMALL", 0)


@pytest.mark.parametrize("objective", ["time", "memory"])
@pytest.mark.parametrize("name", ["tensor", "model", "tensor2", "tp"])
def test_tensor_splits_neither_samples_nor_only_storage(name, objective):
    plan = planning.plan(
        language(SMALL),
        CPU,
        mesh={name: 8},
        objective=objective,
    )

    assert plan.batch_axes == ()
    assert "FSDP" not in plan.name
    assert plan.name.startswith("tensor parallel")
    assert split(plan, name)
    assert not split(plan, name) & {"batch", "inputs.1"}
    assert any(a.use for a in plan.arrays if a.kind == "params")


def test_sixteen_ways_of_a_model_of_a_billion():
    recipe = lepton.Recipe(
        model=functools.partial(
            models.TransformerLM, **models.transformer_size("1b") | {"loop": "scan"}
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw(1e-4),
        batch_size=64,
        precision="bfloat16",
    )
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    plan = planning.plan(
        lepton.trace(recipe, tokens, tokens),
        lepton.topology("v5e:4x4"),
        mesh={"tensor": 16},
    )

    assert plan.batch_axes == ()
    assert plan.name == "tensor parallel"
    assert any("feed_forward" in name for name in split(plan, "tensor"))
    assert (
        planning.plan(
            lepton.trace(recipe, tokens, tokens),
            lepton.topology("v5e:4x4"),
            mesh={"x": 16},
        ).name
        == "FSDP"
    )


@pytest.mark.parametrize("objective", ["time", "memory"])
def test_data_keeps_nothing_in_parts_but_rows_that_are_looked_up(objective):
    plan = planning.plan(
        language(SMALL),
        CPU,
        mesh={"data": 8},
        objective=objective,
    )

    assert plan.name.startswith("data parallel")
    assert plan.batch_axes == ("data",)
    assert stored(plan, "data") <= {"params/embed/embedding"}
    assert split(plan, "data") <= {"batch", "embed.0"}


def test_fsdp_splits_samples_and_keeps_the_state_in_parts():
    plan = planning.plan(
        language(SMALL),
        CPU,
        mesh={"fsdp": 8},
    )

    assert plan.name == "FSDP"
    assert plan.batch_axes == ("fsdp",)
    assert len(stored(plan, "fsdp")) > 10

    both = planning.plan(
        language(SMALL),
        CPU,
        mesh={"data": 2, "fsdp": 4},
    )

    assert both.batch_axes == ("data", "fsdp")
    assert stored(both, "fsdp")
    assert not stored(both, "data")


@pytest.mark.parametrize("name", ["sequence", "context", "sp"])
def test_sequence_splits_a_later_dim_of_the_inputs(name):
    plan = planning.plan(
        language(SMALL),
        CPU,
        mesh={name: 8},
    )

    assert plan.batch_axes == ()
    assert split(plan, name) == {"inputs.1"}


def test_expert_splits_experts():
    plan = planning.plan(
        language(MIXTURE),
        CPU,
        mesh={"expert": 8},
    )
    kernels = {
        a.path.rsplit("/", 1)[-1]: a
        for a in plan.arrays
        if a.kind == "params" and "feed_forward/" in a.path
    }

    assert all(kernels[k].use[:1] == ("expert",) for k in ("gate", "up", "down"))


@pytest.mark.parametrize(
    ("trace", "mesh", "says"),
    [
        (
            lambda: rows(ODD, 7, 16),
            {"data": 2, "tensor": 4},
            ["'tensor' is idle", "can't be split over 4"],
        ),
        (
            lambda: rows(ODD, 7, 13),
            {"data": 8},
            ["'data' is idle", "batch (13)"],
        ),
        (
            lambda: language(SMALL),
            {"expert": 8},
            ["'expert' is idle", "the model has none"],
        ),
        (
            lambda: rows(ODD, 7, 16),
            {"data": 4, "sequence": 2},
            ["'sequence' is idle"],
        ),
    ],
    ids=["tensor", "data", "expert", "sequence"],
)
def test_an_axis_that_can_not_do_what_it_is_called_after_is_idle_and_the_plan_says_so(
    trace, mesh, says
):
    plan = planning.plan(
        trace(),
        CPU,
        mesh=mesh,
    )
    (note,) = [note for note in plan.notes if "idle" in note]

    assert all(words in note for words in says)

    axis = note.split("'")[1]

    assert not split(plan, axis)
    assert not stored(plan, axis)


def test_other_names_leave_it_to_the_search():
    names = [
        planning.plan(language(SMALL), CPU, mesh={name: 8}, objective="memory").name
        for name in ("x", "devices")
    ]
    assert (
        names[0]
        == names[1]
        == planning.plan(
            language(SMALL),
            CPU,
            mesh={"fsdp": 8},
            objective="memory",
        ).name
    )


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "tensor": 4},
        {"fsdp": 2, "tensor": 2, "sequence": 2},
        {"tensor": 8},
    ],
    ids=str,
)
def test_what_the_names_make_of_a_model_trains_like_one_device(mesh):
    def losses(plan):
        program = Program(
            trace,
            plan,
            jax.devices()[: math.prod(plan.mesh.values())],
        )
        state = program.init(0)
        found = []
        for step in range(2):
            tokens = (
                np.random.default_rng(step)
                .integers(0, 64, trace.inputs.shape)
                .astype(np.int32)
            )
            batch = jax.device_put((tokens, tokens), program.block_sharding)
            state, records = program.train(state, batch, 0, 1)
            found.append(float(records[0, 0]))
        return found

    trace = language(SMALL)
    alone = by_hand(trace, (1,), {}, 0)
    expected = losses(fixed(trace, lepton.topology("cpu:1"), alone))
    np.testing.assert_allclose(
        losses(planning.plan(trace, CPU, mesh=mesh)),
        expected,
        rtol=2e-5,
    )

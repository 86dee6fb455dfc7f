"""Golden plans: what experts lay out by hand, the search finds by itself.

A plan that changes here changes what users run.
"""

import doctest
import re
from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.planner import plans, trace
from lepton_jax.planner.search import descent, finalists, limits, masks, shapes
from lepton_jax.planner.show import colour

TOKEN = jax.ShapeDtypeStruct((1,), jnp.int32)
IMAGE = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)
LABEL = jax.ShapeDtypeStruct((1,), jnp.int32)


def language(
    size,
    length,
    batch_size,
    model=models.TransformerLM,
    **more,
):
    arguments = models.transformer_size(size) | {"loop": "scan"} | more
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    recipe = lepton.Recipe(
        model=partial(model, **arguments),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw(1e-4),
        batch_size=batch_size,
        precision="bfloat16",
    )
    return trace(recipe, tokens, tokens)


def specs(plan):
    return {
        a.path.removeprefix("params/"): a.spec
        for a in plan.arrays
        if a.kind == "params"
    }


def test_one_billion_parameters_on_a_node_are_fsdp():
    plan = lepton.plan(language("1b", 2048, 64), lepton.topology("h200:8"))

    assert (plan.name, plan.mesh, plan.batch_axes) == ("FSDP", {"fsdp": 8}, ("fsdp",))

    found = specs(plan)

    assert found["blocks/feed_forward/gate/kernel"] == (None, None, "fsdp")
    assert found["blocks/attention/query/kernel"] == (None, "fsdp")
    assert found["embed/embedding"] == ("fsdp",)
    assert found["norm/scale"] == (), "8 KiB are not worth a collective"
    assert all(a.use == () for a in plan.arrays if a.kind == "params"), (
        "gathered where they are used"
    )

    moments = [
        a
        for a in plan.arrays
        if a.path.startswith("optimizer/0/mu/") and "gate" in a.path
    ]

    assert [a.spec for a in moments] == [(None, None, "fsdp")], (
        "the optimizer's state lies as its parameter"
    )


def test_seventy_billion_on_small_chips_need_two_axes():
    plan = lepton.plan(language("70b", 4096, 1024), lepton.topology("v5e:16x16"))

    assert len(plan.mesh) == 2
    assert all(n > 1 for n in plan.mesh.values())
    assert "fsdp" in plan.mesh
    assert plan.peak < plan.memory
    assert plan.remat != "none"
    assert all(
        len([e for e in spec if e])
        for path, spec in specs(plan).items()
        if path.startswith("blocks/feed_forward/")
    )


def test_a_mixture_sends_tokens_to_experts():
    traced = language(
        "1b",
        2048,
        64,
        model=models.MoELM,
        experts=32,
    )
    plan = lepton.plan(traced, lepton.topology("h200:8"))

    assert plan.name.startswith("expert parallel")
    assert plan.mesh == {"expert": 8}
    assert plan.batch_axes == ("expert",)

    kernels = {
        p: s
        for p, s in specs(plan).items()
        if p.startswith("blocks/feed_forward/") and "router" not in p
    }

    assert kernels
    assert all(spec[1] == "expert" for spec in kernels.values()), (
        "dim 0 is the layer, dim 1 the expert"
    )
    assert any(c.kind == "all-to-all" for c in plan.collectives)


TABLE = 10_000_000 * 64 * 4  # bytes of the users' embeddings


def recommender(optimizer):
    recipe = lepton.Recipe(
        model=partial(
            models.TwoTower,
            10_000_000,
            1_000_000,
            dim=64,
        ),
        loss=lepton.losses.squared_error,
        optimizer=optimizer,
        batch_size=8192,
    )
    return trace(
        recipe,
        {"user": TOKEN, "item": TOKEN},
        jax.ShapeDtypeStruct((1,), jnp.float32),
    )


def gathered(plan):
    sizes = (c.bytes for c in plan.collectives if c.kind == "all-gather")
    return max(sizes, default=0)


def test_a_recommenders_tables_are_split_by_rows():
    traced = recommender(optax.adam(1e-2))
    for name, devices in (("h200:8", 8), ("v5e:4x4", 16)):
        plan = lepton.plan(traced, lepton.topology(name))
        assert "row-sharded embeddings" in plan.name
        assert plan.mesh == {"data": devices}
        tables = [
            spec for path, spec in specs(plan).items() if path.endswith("embedding")
        ]
        assert tables == [("data",), ("data",)]
        assert gathered(plan) < TABLE / 100, "rows travel, tables don't"


def test_tables_that_are_updated_by_rows_cost_a_step_next_to_nothing():
    traced = recommender(optax.adagrad(1e-2))
    for name in ("h200:8", "v5e:4x4"):
        plan = lepton.plan(traced, lepton.topology(name))
        assert gathered(plan) < TABLE / 100, "rows travel, tables don't"
        assert plan.bytes_per_device["gradients"] < 1e7
        assert plan.step_seconds < 1e-3


@pytest.mark.parametrize("name", ["h200:8", "v5e:4x4"])
def test_a_small_network_is_data_parallel(name):
    recipe = lepton.Recipe(
        model=partial(models.CNN, 10),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=1024,
    )
    plan = lepton.plan(trace(recipe, IMAGE, LABEL), lepton.topology(name))

    assert plan.name == "data parallel"
    assert plan.remat == "none"
    assert plan.micro_batches == 1
    assert all(a.spec == () for a in plan.arrays)
    assert {c.kind for c in plan.collectives} == {"all-reduce"}


def test_a_sequence_too_long_for_one_device_is_split():
    traced = language("1b", 32768, 2)
    plan = lepton.plan(traced, lepton.topology("v5p:2x2x2"))

    assert any(axis.startswith("sequence") for axis in plan.mesh), plan.mesh
    assert any(a.name == "inputs.1" and a.mesh for a in plan.axes)


def test_the_objective_decides():
    traced = language("1b", 2048, 64)
    on = lepton.topology("h200:8")
    time = lepton.plan(traced, on, objective="time")
    memory = lepton.plan(traced, on, objective="memory")
    cost = lepton.plan(traced, on, objective="cost")

    assert memory.peak < time.peak
    assert memory.step_seconds > time.step_seconds
    assert cost.price_per_step > 0

    with pytest.raises(lepton.PlanError, match="price of b200"):
        lepton.plan(
            traced,
            lepton.topology("b200:8"),
            objective="cost",
        )


def test_what_cannot_fit_gets_an_answer():
    traced = language("8b", 4096, 8)
    with pytest.raises(lepton.PlanError) as caught:
        lepton.plan(traced, lepton.topology("v5e:2x2"))
    text = str(caught.value)

    assert "nothing fits" in text
    assert "optimizer" in text
    assert "GiB" in text
    assert "v5e:" in caught.value.remedy
    assert "smallest that holds it" in caught.value.remedy

    with pytest.raises(lepton.PlanError, match="let the planner choose remat"):
        lepton.plan(
            language("1b", 4096, 64),
            lepton.topology("v5e:4x4"),
            remat="none",
            micro_batches=1,
        )


def test_a_batch_that_is_asked_for_instead_fits(monkeypatch):
    monkeypatch.setattr(limits, "DOUBLINGS", 0)

    def wide(batch_size):
        recipe = lepton.Recipe(
            model=partial(models.MLP, (1_000_000, 10)),
            loss=lepton.losses.cross_entropy,
            optimizer=optax.sgd(0.1),
            batch_size=batch_size,
        )
        return trace(
            recipe,
            jax.ShapeDtypeStruct((1, 1_000_000), jnp.float32),
            jax.ShapeDtypeStruct((1,), jnp.int32),
        )

    with pytest.raises(lepton.PlanError) as caught:
        lepton.plan(wide(65_536), lepton.topology("v5e:2x2"))
    asked = int(re.search(r"a batch_size of (\d+)", caught.value.remedy)[1])

    assert lepton.plan(wide(asked), lepton.topology("v5e:2x2")).peak < 16 * 2**30

    with pytest.raises(lepton.PlanError):
        lepton.plan(wide(4 * asked), lepton.topology("v5e:2x2"))
    # not even one sample fits
    with pytest.raises(lepton.PlanError) as caught:
        lepton.plan(language("1b", 1_048_576, 64), lepton.topology("v5e:2x2"))

    assert "batch_size" not in caught.value.remedy
    assert "smaller samples" in caught.value.remedy


def test_five_rivals_and_a_plan_that_replays(tmp_path):
    plan = lepton.plan(language("8b", 2048, 64), lepton.topology("v5p:4x4x4"))

    assert 1 <= len(plan.rivals) <= 5
    assert all(r.loses for r in plan.rivals)

    plan.save(tmp_path / "plan.json")

    assert lepton.Plan.load(tmp_path / "plan.json") == plan
    assert not plan.diff(plan)

    other = lepton.plan(
        language("8b", 2048, 64),
        lepton.topology("v5p:4x4x4"),
        remat="full",
    )

    assert "remat" in plan.diff(other) if plan.remat != "full" else not plan.diff(other)


@pytest.mark.parametrize(
    "module",
    [descent, finalists, masks, shapes, plans, colour],
    ids=lambda module: module.__name__.rpartition(".")[2],
)
def test_the_worked_examples_hold(module):
    results = doctest.testmod(module)

    assert results.attempted > 0
    assert results.failed == 0

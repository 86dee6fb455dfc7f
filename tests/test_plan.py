"""Trace, topology and plan: what is known before an array exists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.hardware import CHIPS
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")


def recipe(blobs=None, **fields):
    defaults = {
        "model": lambda rngs: lepton.models.MLP((12, 16, 3), rngs=rngs),
        "loss": lepton.losses.cross_entropy,
        "optimizer": optax.adam(1e-3),
        "batch_size": 64,
        "train": blobs,
    }
    return lepton.Recipe(**(defaults | fields))


def test_a_trace_allocates_nothing_and_counts_the_work(blobs, monkeypatch):
    monkeypatch.setattr(
        jax,
        "device_put",
        lambda *a, **k: pytest.fail("an array was put on a device"),
    )
    traced = lepton.trace(
        recipe(),
        jax.ShapeDtypeStruct((1, 12), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )

    assert traced.flops == 3 * 2 * 64 * (12 * 16 + 16 * 3)
    assert traced.inputs.shape == (64, 12)
    assert traced.outputs.shape == (64, 3)
    assert traced.classes == 3
    assert all(
        isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(traced.state)
    )
    assert "259 parameters" in str(traced)


def test_loops_are_multiplied_out_in_the_work():
    class Repeats(nnx.Module):
        def __init__(self, rngs):
            self.inner = nnx.Linear(8, 8, rngs=rngs)

        def __call__(self, x):
            return jax.lax.scan(
                lambda carry, _: (jnp.tanh(carry @ self.inner.kernel[...]), None),
                x,
                length=10,
            )[0]

    traced = lepton.trace(
        recipe(model=Repeats, loss=optax.squared_error),
        jax.ShapeDtypeStruct((1, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, 8), jnp.float32),
    )

    assert traced.flops == 3 * 10 * 2 * 64 * 8 * 8


def test_predicted_bytes_are_those_of_the_live_state(blobs):
    trainer = lepton.Trainer(recipe(blobs), devices=4)
    trainer.fit(steps=1)
    held = trainer.program.plan.bytes_per_device
    for kind in ("params", "optimizer"):
        leaves = jax.tree.leaves(getattr(trainer.state, kind))
        assert held[kind] == sum(x.addressable_shards[0].data.nbytes for x in leaves)

    assert held["data"] == sum(x.nbytes for x in blobs)


def test_every_array_of_the_state_lies_as_planned(blobs):
    trainer = lepton.Trainer(recipe(blobs), devices=8)
    trainer.fit(steps=2)
    specs = {a.path: a.spec for a in trainer.program.plan.arrays}
    leaves = by_path(trainer.state)

    assert leaves.keys() == specs.keys()

    for path, leaf in leaves.items():
        assert tuple(leaf.sharding.spec) == specs[path]
        assert len(leaf.sharding.device_set) == 8, path


def test_gathering_a_resident_batch_moves_nothing_between_devices(blobs):
    trainer = lepton.Trainer(recipe(blobs, steps_per_call=1), devices=8)
    trainer.fit(steps=1)
    program = trainer.program

    assert program.plan.data == "resident"

    data = jax.device_put(blobs, program.replicated)
    indices = jax.device_put(np.arange(64, dtype=np.int32), program.block_sharding)
    text = program._train.lower(trainer.state, indices, data).compile().as_text()

    assert "all-reduce" in text, "the gradients are reduced"
    assert not any(
        kind in text for kind in ("all-gather", "all-to-all", "collective-permute")
    )


def test_data_that_does_not_fit_is_streamed_and_gives_the_same_losses(
    blobs, monkeypatch
):
    import sys

    resident = lepton.Trainer(recipe(blobs), devices=2)
    expected = resident.fit(steps=20)["loss"]
    monkeypatch.setattr(
        sys.modules["lepton_jax.planner.estimate.feeding"], "RESIDENT_SHARE", 0.0
    )
    streamed = lepton.Trainer(recipe(blobs), devices=2)
    np.testing.assert_array_equal(streamed.fit(steps=20)["loss"], expected)

    assert (resident.program.plan.data, streamed.program.plan.data) == (
        "resident",
        "streamed",
    )


def test_plans_are_plain_data(blobs):
    plan = lepton.Trainer(recipe(blobs)).plan("h200:8")

    assert lepton.Plan.from_json(plan.to_json()) == plan
    assert plan.mesh == {"data": 8}
    assert "layers/0/kernel" in str(plan)
    assert "12x16" in str(plan)

    with pytest.raises(lepton.PlanError, match="8 devices"):
        plan.make_mesh(jax.devices()[:4])


def language(length, batch_size=16):
    model = partial(
        lepton.models.TransformerLM,
        64,
        dim=32,
        layers=1,
        heads=4,
        hidden=64,
    )
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return lepton.trace(recipe(model=model, batch_size=batch_size), tokens, tokens)


def test_a_plan_is_checked_against_the_recipe_and_its_data():
    on = lepton.topology("cpu:8")
    plan = lepton.plan(language(8), on)

    plan.check(language(8))
    with pytest.raises(lepton.PlanError, match="batches of 16, and the recipe has 32"):
        plan.check(language(8, batch_size=32))
    with pytest.raises(
        lepton.PlanError,
        match=r"2 arrays differ, e.g. inputs \[16, 8\] in the plan, \[16, 16\] in the",
    ):
        plan.check(language(16))
    with pytest.raises(lepton.PlanError, match="absent in the plan") as caught:
        plan.check(lepton.trace(recipe(batch_size=16), None, None), where="plan.json")
    assert caught.value.where == "plan.json"


def test_a_plan_made_before_the_data_is_known_says_nothing_of_a_batch():
    bare = lepton.trace(recipe(), None, None)
    shapes = (
        jax.ShapeDtypeStruct((1, 12), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    with_data = lepton.trace(recipe(), *shapes)
    on = lepton.topology("cpu:8")

    lepton.plan(bare, on).check(with_data)
    lepton.plan(with_data, on).check(bare)


def test_a_plan_without_data_covers_the_parameters():
    plan = lepton.Trainer(recipe()).plan("tpu7x:2x2x1")

    assert plan.mesh == {"data": 8}, "each chip shows two devices"
    assert plan.bytes_per_device["params"] == 4 * 259
    assert "not known yet" in str(plan)


def test_steps_per_call_follow_the_cost_of_a_step(blobs):
    small = lepton.Trainer(recipe(blobs)).plan("cpu:1")
    large = lepton.Trainer(
        recipe(
            blobs,
            model=lambda rngs: lepton.models.MLP(
                (12, 4096, 4096, 3),
                rngs=rngs,
            ),
        )
    ).plan("cpu:1")
    asked = lepton.Trainer(recipe(blobs, steps_per_call=5)).plan("cpu:1")

    assert (small.steps_per_call, large.steps_per_call, asked.steps_per_call) == (
        32,
        1,
        5,
    )


@pytest.mark.parametrize(
    ("name", "devices", "platform"),
    [
        ("cpu:8", 8, "cpu"),
        ("v5p:4x4x4", 64, "tpu"),
        ("V5E:16x16", 256, "tpu"),
        ("h100:8", 8, "cuda"),
        ("tpu7x:2x2x1", 8, "tpu"),
    ],
)
def test_topologies_by_name(name, devices, platform):
    found = lepton.topology(name)
    assert (found.devices, found.platform, found.name) == (
        devices,
        platform,
        name.lower(),
    )


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("v5q:4x4", "did you mean 'v5"),
        ("v5p", "chip:count"),
        ("v5p:4x", "chip:count"),
        ("v5p:0x4", "chip:count"),
        ("", "chip"),
    ],
)
def test_topologies_that_are_none(name, fragment):
    with pytest.raises(lepton.PlanError, match=fragment):
        lepton.topology(name)


def test_the_catalogue_knows_each_chip_by_its_own_kinds():
    kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]

    assert len(kinds) == len(set(kinds))
    assert all(
        chip.bf16_flops > 0 and chip.memory > 2**30 and chip.bandwidth > 0
        for chip in CHIPS.values()
    )


def test_linen_needs_the_shapes_of_its_inputs():
    with pytest.raises(lepton.DataError, match="shapes"):
        lepton.Trainer(recipe(model=linen.Dense(3))).plan("cpu:8")

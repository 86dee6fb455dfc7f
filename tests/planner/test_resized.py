"""A plan for other devices than it was made for keeps its forms where it can."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.errors import PlanError
from lepton_jax.planner import resized as resizing
from lepton_jax.planner.program import named
from lepton_jax.planner.rewrite import forms

LENGTH = 16
BATCH = 24
STEPS = 4
RTOL = 1e-5  # of losses in float32


@pytest.fixture(autouse=True, scope="module")
def small_arrays_take_every_form(quick_compilation):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(named, "SMALL", 0)
        patch.setitem(forms.LEAST_LENGTH, "cpu", LENGTH)
        yield
    traced.cache_clear()


def recipe():
    tokens = np.random.default_rng(0).integers(0, 32, (96, LENGTH + 1), np.int32)
    sizes = {"dim": 16, "layers": 4, "heads": 4, "hidden": 32, "loop": "scan"}
    return lepton.Recipe(
        model=functools.partial(models.TransformerLM, 32, **sizes),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam,
        learning_rate=1e-2,
        train=(tokens[:, :-1], tokens[:, 1:]),
        batch_size=BATCH,
        steps=STEPS,
    )


@functools.cache
def traced():
    given = recipe()
    return lepton.trace(given, *(x[:1] for x in given.train))


def plan(mesh, **asked):
    devices = int(np.prod([*mesh.values()]))
    where = lepton.topology(f"cpu:{devices}")
    return lepton.plan(traced(), where, mesh=mesh, **asked)


def resized(given, devices):
    return resizing(given, traced(), lepton.topology(f"cpu:{devices}"))


def test_the_examples_hold():
    from lepton_jax.planner import resized_plans

    assert doctest.testmod(resized_plans).failed == 0


@pytest.mark.parametrize(
    ("mesh", "asked", "devices", "kept"),
    [
        ({"data": 4, "tensor": 2}, {"remat": "dots"}, 6, {"data": 3, "tensor": 2}),
        ({"sequence": 8}, {"context": "ring"}, 4, {"sequence": 4}),
        ({"stage": 4, "data": 2}, {"stages": (4, 8)}, 4, {"stage": 4}),
        ({"stage": 4, "data": 2}, {"stages": (4, 8)}, 2, {"stage": 2}),
        ({"fsdp": 8}, {"micro_batches": 3}, 2, {"fsdp": 2}),
    ],
    ids=["tensor", "ring", "stages", "fewer stages", "micro-batches"],
)
def test_axes_and_forms_stay(mesh, asked, devices, kept):
    given = plan(mesh, **asked)

    smaller = resized(given, devices)

    assert smaller.mesh == kept
    assert smaller.context == given.context
    assert smaller.attention == given.attention
    assert (smaller.remat, smaller.micro_batches) == (given.remat, given.micro_batches)
    stages = kept.get("stage", 1)
    parts = given.stage_parts if stages > 1 else 1
    assert (smaller.stages, smaller.stage_parts) == (stages, parts)


@pytest.mark.parametrize(
    ("mesh", "devices"), [({"tensor": 4}, 3), ({"stage": 4, "data": 2}, 1)]
)
def test_where_the_axes_can_not_be_had_the_search_is_free(mesh, devices):
    smaller = resized(plan(mesh), devices)

    assert smaller.devices == devices
    assert smaller.stages == 1


def test_a_trainer_goes_on_with_fewer_devices_only_where_it_may(tmp_path):
    given = plan({"stage": 2, "data": 4}, stages=(2, 4))
    given = dataclasses.replace(given, data="resident")
    whole = lepton.Trainer(recipe(), devices=1).fit()["loss"]
    run = {"plan": given, "run_dir": tmp_path / "run"}
    lepton.Trainer(recipe(), devices=8, **run).fit(steps=STEPS // 2)

    with pytest.raises(PlanError, match="is for 8 devices, 4 are given"):
        lepton.Trainer(recipe(), devices=4, **run).resume().fit()
    trainer = lepton.Trainer(recipe(), devices=4, resize_plan=True, **run)
    with pytest.warns(UserWarning, match="is for 8 devices, and there are 4"):
        rest = trainer.resume().fit()["loss"]

    assert trainer.program.plan.mesh == {"stage": 2, "data": 2}
    np.testing.assert_allclose(rest, whole[STEPS // 2 :], rtol=RTOL)

"""Forms of a step: what a plan changes in a program changes nothing in a run.

Each form trains as the plain step does, goes on from a checkpoint that another form
wrote, and stands under the controller and a fault of the data like any other.
"""

import dataclasses
import functools
from functools import partial

import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import lepton_jax as lepton
from lepton_jax import models

RTOL = 1e-5  # of losses in float32
STEPS = 8
HALF = STEPS // 2
LENGTH = 32

# What a plan for eight devices may say, and how it lays them out.
AWAY = "keep attention,0 and offload 1,2"
FORMS = {
    "plain": {},
    "kept": {"remat": "keep 0,2 and 1,4 in 2"},
    "attention": {"attention": "blocks"},
    "pieces": {"loss_pieces": 4},
    "all": {"remat": AWAY, "attention": "blocks", "loss_pieces": 4},
}


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(quick_compilation):
    """Spend no time on fast programs."""


@functools.cache
def data():
    tokens = np.random.default_rng(0).integers(0, 48, (64, LENGTH + 1), np.int32)
    return tokens[:, :-1], tokens[:, 1:]


def recipe(steered):
    model = partial(
        models.TransformerLM, 48, dim=32, layers=4, heads=4, hidden=96, loop="scan"
    )
    return lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=3e-3,
        train=data(),
        batch_size=16,
        steps=STEPS,
        save_every=HALF,
        controller=lepton.controllers.adaptive() if steered else (),
    )


@functools.cache
def laid_out(steered=False):
    trainer = lepton.Trainer(recipe(steered=steered), devices=8)
    mesh = {"data": 4, "tensor": 2}
    return trainer.plan(mesh=mesh, pins={"**/gate/kernel": P(None, None, "tensor")})


def trained(form, run_dir=None, resume=False, steps=None, steered=False):
    plan = dataclasses.replace(laid_out(steered), **FORMS[form])
    trainer = lepton.Trainer(
        recipe(steered=steered), devices=8, plan=plan, run_dir=run_dir
    )
    if resume:
        trainer.resume()
    return trainer.fit(steps=steps)["loss"]


@functools.cache
def plain():
    return lepton.Trainer(recipe(steered=False), devices=1).fit()["loss"]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_as_one_device_does(form):
    np.testing.assert_allclose(trained(form), plain(), rtol=RTOL)


@pytest.mark.parametrize(
    ("first", "then"), [("kept", "kept"), ("plain", "all"), ("all", "plain")]
)
def test_a_run_goes_on_under_the_same_form_or_another(first, then, tmp_path):
    trained(first, tmp_path / "run", steps=HALF)
    rest = trained(then, tmp_path / "run", resume=True)
    assert len(rest) == HALF
    np.testing.assert_allclose(rest, plain()[HALF:], rtol=RTOL)
    if first == then:
        np.testing.assert_array_equal(rest, trained(then)[HALF:])


def test_a_controller_steers_a_form_as_it_steers_the_plain_step():
    """On the same devices: what it measures depends on their number."""
    expected = trained("plain", steered=True)
    np.testing.assert_allclose(trained("all", steered=True), expected, rtol=RTOL)
    assert not np.allclose(expected, plain(), rtol=1e-3)

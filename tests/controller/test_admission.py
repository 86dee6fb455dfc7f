"""Which optimizers the learning-free rate drives, and what an update is worth."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.controller.policies import admission
from lepton_jax.step import optimizers

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"a": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}}


def admitted(optimizer, params=SMALL):
    recipe = lepton.Recipe(
        model=dict,
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=1e-3,
    )
    built = optimizers.build(recipe)
    admission.check(recipe, built)
    built.trials[-1](built, params)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adamw,
        optax.lamb,
        optax.adafactor,
        optax.contrib.muon,
        optax.radam,
        lambda rate: optax.MultiSteps(optax.adamw(rate), 4),
    ],
    ids=["adamw", "lamb", "adafactor", "muon", "radam", "in four batches"],
)
def test_updates_whose_size_follows_the_rate_alone_are_admitted(optimizer):
    admitted(optimizer)


@pytest.mark.parametrize(
    ("optimizer", "fault"),
    [
        (optax.sgd, "grow with the gradient"),
        (partial(optax.sgd, momentum=0.9), "grow with the gradient"),
        (optax.adagrad, "grow with the gradient"),
        (optax.adadelta, "grow with the gradient"),
        (lambda rate: optax.scale(0 * rate), "zero"),
        (lambda rate: optax.chain(optax.adam(1e-3), optax.scale(1.0)), "do not follow"),
    ],
    ids=["sgd", "momentum", "adagrad", "adadelta", "still", "its own rate"],
)
def test_updates_of_another_size_are_refused_with_the_reason(optimizer, fault):
    with pytest.raises(lepton.RecipeError, match=fault) as caught:
        admitted(optimizer)
    assert "optax.adamw" in str(caught.value)


def test_an_optimizer_that_knows_all_parameters_by_name_is_tried_on_all():
    labels = {f"layer_{i}": {"kernel": "a" if i else "b"} for i in range(3)}
    params = {name: {"kernel": jnp.zeros((3, 3))} for name in labels}

    def make(rate):
        rules = {"a": optax.adamw(rate), "b": optax.lion(rate)}
        return optax.multi_transform(rules, labels)

    admitted(make, params)


@pytest.mark.parametrize(
    ("optimizer", "worth"), [(optax.adam, 1.0), (partial(optax.lion, b1=0.5), 1.0)]
)
def test_the_signal_says_what_an_update_is_worth(blobs, optimizer, worth):
    watcher = controllers.Policy(
        "watcher",
        lambda: (),
        lambda signals, state: ({}, state),
        ("update_worth",),
        ("learning_rate",),
    )
    history = lepton.Trainer(
        model=partial(lepton.models.MLP, (12, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=1e-2,
        controller=watcher,
        devices=1,
    ).fit(blobs, steps=3)

    assert np.isnan(history["update_worth"][0]), "there was no update yet"
    assert history["update_worth"][1] == pytest.approx(worth, rel=1e-3)

"""The norm that policies see is that of the gradient that the optimizer is given."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers, models


def keeps_gradients(rate):
    """Return an optimizer whose state is the last gradient."""

    def init(params):
        return jax.tree.map(jnp.zeros_like, params)

    def update(gradients, state, params=None):
        return jax.tree.map(lambda g: -rate * g, gradients), gradients

    return optax.GradientTransformation(init, update)


def seen_and_given(length, controller, **model):
    tokens = np.random.default_rng(0).integers(0, 48, (16, length + 1), np.int32)
    recipe = lepton.Recipe(
        model=partial(models.TransformerLM, 48, dim=32, heads=4, hidden=96, **model),
        loss=lepton.losses.cross_entropy,
        optimizer=keeps_gradients,
        learning_rate=1e-3,
        train=(tokens[:, :-1], tokens[:, 1:]),
        batch_size=8,
        steps=1,
        controller=controller,
    )
    trainer = lepton.Trainer(recipe, devices=1)
    history = trainer.fit()
    leaves = jax.tree.leaves(trainer.state.optimizer)
    given = np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in leaves))
    return history["gradient_norm"][0], given


# compiled as users compile: XLA's faults are those of its optimizations
@pytest.mark.parametrize("loop", ["scan", "unrolled"])
@pytest.mark.parametrize("length", [16, 128, 256])
@pytest.mark.parametrize("steered", ["guarded", "marked"])
def test_the_norm_that_policies_see_is_that_of_the_gradient(length, steered, loop):
    policies = {
        "guarded": (controllers.first_steps(), controllers.guard()),
        "marked": (controllers.first_steps(), controllers.label_noise()),
    }
    controller = policies[steered]
    seen, given = seen_and_given(length, controller, layers=4, loop=loop)
    assert seen == pytest.approx(given, rel=1e-5)
    assert given > 0


def test_a_transformer_trains_under_the_default_controller():
    tokens = np.random.default_rng(0).integers(0, 48, (64, 129), np.int32)
    recipe = lepton.Recipe(
        model=partial(
            models.TransformerLM, 48, dim=32, layers=4, heads=4, hidden=96, loop="scan"
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=3e-3,
        train=(tokens[:, :-1], tokens[:, 1:]),
        batch_size=8,
        steps=8,
        controller=controllers.adaptive(),
    )
    history = lepton.Trainer(recipe, devices=1).fit()
    assert np.isfinite(history["gradient_norm"]).all()
    assert history["updates"][-1] >= 7

"""Gradients taken near an average: the policy and its knob."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.models import MLP

pytestmark = pytest.mark.usefixtures("quick_compilation")

RATE = 0.01
STEPS = 12


def recipe_of(optimizer, policy, blobs):
    return lepton.Recipe(
        model=partial(MLP, (12, 8, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=RATE,
        controller=policy,
        train=blobs,
        batch_size=25,
    )


def test_it_is_the_method_written_by_hand():
    interpolation = 0.9
    controller = controllers.Controller(
        recipe_of(optax.adam, controllers.schedule_free(interpolation, 0.5), None)
    )
    params = {"x": jnp.array([3.0, -1.0])}
    optimizer, state = controller.init(params, {})
    pieces = controllers.Pieces(params, {}, optimizer)

    rule = optax.scale_by_adam(b1=0.0)
    by_hand = rule.init(params["x"])
    fast = average = params["x"]
    for step in range(STEPS):
        near = interpolation * average + (1 - interpolation) * fast
        np.testing.assert_allclose(pieces.params["x"], near, rtol=1e-5)
        gradient = 2 * near + jnp.sin(step)
        direction, by_hand = rule.update(gradient, by_hand)
        fast = fast - RATE * direction
        average = average + (fast - average) / (step + 1)

        pieces, state, _ = controller.update(
            step=step,
            state=state,
            before=pieces,
            after={},
            gradients={"x": gradient},
            values={"loss": jnp.float32(1)},
        )
        np.testing.assert_allclose(state.average[0]["x"], average, rtol=1e-5)


def test_a_skipped_update_leaves_all_as_it_is():
    moves = {"skip": jnp.float32(1), "interpolation": 0.5, "averaging_decay": 0.9}
    policy = controllers.Policy(
        "skipping",
        lambda: (),
        lambda signals, state: (moves, state),
        moves=tuple(moves),
    )
    controller = controllers.Controller(recipe_of(optax.adam, policy, None))
    params = {"x": jnp.array([3.0, -1.0])}
    optimizer, state = controller.init(params, {})
    after, held, _ = controller.update(
        step=0,
        state=state,
        before=controllers.Pieces(params, {}, optimizer),
        after={},
        gradients={"x": jnp.ones(2)},
        values={"loss": jnp.float32(1)},
    )

    np.testing.assert_array_equal(after.params["x"], params["x"])
    np.testing.assert_array_equal(held.average[0]["x"], params["x"])


def test_interpolation_without_an_average_is_refused(blobs):
    policy = controllers.Policy(
        "alone",
        lambda: (),
        lambda signals, state: ({"interpolation": 0.5}, state),
        moves=("interpolation",),
    )
    with pytest.raises(lepton.RecipeError, match="averaging_decay"):
        controllers.Controller(recipe_of(optax.adam, policy, blobs))


@pytest.mark.parametrize(
    ("optimizer", "names"),
    [
        (optax.adamw, ["schedule_free"]),
        (partial(optax.nadam, b2=0.95), ["schedule_free"]),
        (optax.lion, ["averaging"]),
        (optax.lamb, ["averaging"]),
        (optax.contrib.muon, ["averaging"]),
        (optax.adafactor, ["averaging"]),
    ],
)
def test_other_policies_take_its_place_where_momentum_cannot_be_left_out(
    optimizer, names
):
    policy = controllers.schedule_free(otherwise=(controllers.averaging(),))
    controller = controllers.Controller(recipe_of(optimizer, policy, None))

    assert [policy.name for policy in controller.policies] == names


def test_the_average_is_served(blobs):
    trainer = lepton.Trainer(
        recipe_of(optax.adamw, controllers.schedule_free(), blobs), devices=1
    )
    trainer.fit(steps=5)
    params, _ = controllers.select_weights(trainer.state)

    held = trainer.state.controller.average[0]
    for served, kept in zip(
        jax.tree.leaves(params), jax.tree.leaves(held), strict=True
    ):
        np.testing.assert_array_equal(served, kept)


def test_it_keeps_the_laws_of_policies():
    controllers.conformance(controllers.schedule_free(), runs=False)


@pytest.mark.parametrize("options", [{"interpolation": 1.0}, {"share": 0.6}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(lepton.RecipeError, match=next(iter(options))):
        controllers.schedule_free(**options)

"""The learning-free rate and the adaptive composition."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller as bench_controller
from tools.bench import controller_tasks

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 80
BATCH = 25


def trained(blobs, rate=1e-3):
    trainer = lepton.Trainer(
        model=partial(MLP, (12, 16, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=rate,
        batch_size=BATCH,
        shuffle=False,
        devices=1,
        controller=controllers.adaptive(),
    )
    return trainer, trainer.fit(blobs, steps=STEPS)


@pytest.fixture(scope="module")
def usual(blobs):
    return trained(blobs)


@pytest.mark.parametrize("rate", [1e-3 / 30, 1e-3 * 30])
def test_the_run_is_the_same_at_any_learning_rate(blobs, usual, rate):
    _, history = trained(blobs, rate)

    np.testing.assert_allclose(
        history["learning_rate"], usual[1]["learning_rate"], rtol=1e-3
    )
    np.testing.assert_allclose(history["loss"], usual[1]["loss"], rtol=1e-3)


def test_a_rate_set_later_acts_by_its_ratio(blobs):
    whole, _ = trained(blobs)
    halved, _ = trained(blobs)
    halved.state = controllers.set_base(halved.state, learning_rate=0.5e-3)

    rate = whole.fit(blobs, steps=1)["learning_rate"][0]
    half = halved.fit(blobs, steps=1)["learning_rate"][0]

    assert half == pytest.approx(0.5 * rate, rel=1e-5)
    assert half > 0


def test_a_schedule_is_refused(blobs):
    with pytest.raises(lepton.RecipeError, match="schedule"):
        trained(blobs, optax.linear_schedule(1e-4, 1e-2, STEPS))


def test_it_learns_serves_the_average_and_begins_with_a_small_rate(blobs, usual):
    trainer, history = usual

    assert history["loss"][-10:].mean() < 0.5 * history["loss"][:3].mean()
    assert history["learning_rate"][0] < 0.01 * history["learning_rate"].max()
    assert not history["guard:skip"].any()
    assert not history["restart"].any()
    assert not history["rollback"].any()

    params, _ = controllers.select_weights(trainer.state)
    away = [
        np.abs(a - b).max()
        for a, b in zip(
            jax.tree.leaves(params), jax.tree.leaves(trainer.state.params), strict=True
        )
    ]

    assert max(away) > 0


def blocks(data):
    """A task of the benchmark whose validation set is its training set."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 320).astype(np.int32)
    points = np.eye(3, dtype=np.float32)[labels] + random.normal(
        0, 0.5, (320, 3)
    ).astype(np.float32)
    samples = Arrays(points, labels)
    return bench_controller.Task(
        controller_tasks.recipe_of(partial(MLP, (3, 8, 3)), samples, samples, 80, 16),
        samples,
    )


def test_the_trainer_gives_the_losses_of_the_benchmarks_own_loop(monkeypatch):
    task = blocks(None)
    order = np.tile(np.arange(320, dtype=np.int32), 4).reshape(40, 2, 16)
    monkeypatch.setattr(
        bench_controller, "_orders", lambda recipe, samples, seed: order
    )
    curves = bench_controller.Runner(task, bench_controller.adaptive)(1e-3, 5)
    recipe = task.recipe.with_(controller=controllers.adaptive(), shuffle=False, seed=5)
    trainer = lepton.Trainer(recipe, devices=1)
    history = trainer.fit()

    np.testing.assert_allclose(
        np.asarray(history["loss"]).reshape(40, 2).mean(1), curves.train, rtol=2e-4
    )
    np.testing.assert_allclose(
        trainer.evaluate(task.report)[0], curves.test[-1], rtol=2e-4
    )


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (optax.sgd, 0.1),
        (partial(optax.sgd, momentum=0.9), 0.1),
        (optax.adagrad, 0.1),
        (optax.adamw(1e-3), None),
    ],
)
def test_an_optimizer_that_it_cannot_drive_is_refused(blobs, optimizer, rate):
    with pytest.raises(lepton.RecipeError, match="learning_free") as caught:
        lepton.Trainer(
            model=partial(MLP, (12, 3)),
            loss=lepton.losses.cross_entropy,
            optimizer=optimizer,
            learning_rate=rate,
            controller=controllers.adaptive(),
        ).fit(blobs, steps=2)
    assert "optax.adamw" in str(caught.value)


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.adam,
        optax.lion,
        partial(optax.adamw, weight_decay=0.1),
        optax.contrib.muon,
    ],
)
def test_optimizers_with_updates_of_the_rates_size_are_taken(optimizer):
    recipe = lepton.Recipe(
        model=partial(MLP, (12, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=1e-3,
        controller=controllers.adaptive(),
    )
    assert "learning_rate" in controllers.Controller(recipe).base


@pytest.mark.parametrize(
    ("optimizer", "unproven"), [(optax.adamw, False), (optax.lion, True)]
)
def test_a_person_is_told_where_the_optimizer_is_none_like_adam(optimizer, unproven):
    recipe = lepton.Recipe(
        model=partial(MLP, (12, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=1e-3,
        controller=controllers.adaptive(),
    )
    names = [policy.name for policy in controllers.Controller(recipe).policies]

    assert ("unproven" in names) == unproven
    assert ("schedule_free" in names) != unproven


@pytest.mark.parametrize(
    "options", [{"start": 0.0}, {"coefficient": -1.0}, {"growth": 0.9}, {"until": 2.0}]
)
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(lepton.RecipeError, match=next(iter(options))):
        controllers.learning_free(**options)


NUMBER = st.floats(width=32, allow_nan=True, allow_infinity=True)


def estimates(measured, steps, **options):
    """Return the estimate after each step.

    Args:
      measured: (<g, x_0 - x>, |s|_1, <g, x_0 - z>) of each step.
      steps: those of the run.
      **options: of `learning_free`.
    """
    policy = controllers.learning_free(**options)
    state = policy.init()
    found = []
    for step, (product, size, way) in enumerate(measured):
        signals = {
            "gradient_dot_distance": product,
            "gradient_dot_way": way,
            "gradient_sum_norm": abs(size),
            "gradient_steps": 1.0,
            "loss": size,
            "base_rate": 1e-3,
            "step": step,
            "progress": (step + 1) / steps,
        }
        moves, state = policy.update(
            {n: jnp.float32(x) for n, x in signals.items()}, state
        )
        found.append(float(state.estimate))
        np.testing.assert_allclose(
            float(moves["learning_rate"]) * 1e-3, found[-1], rtol=1e-5
        )
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER, NUMBER), min_size=1, max_size=8))
def test_the_estimate_is_finite_and_never_falls_in_the_warm_up(measured):
    found = estimates(measured, steps=10, until=0.9)

    assert all(math.isfinite(estimate) for estimate in found)
    assert found == sorted(found)


@pytest.mark.parametrize(("way", "grows"), [(1.0, True), (-1.0, False)])
def test_after_the_warm_up_the_estimate_follows_the_way(way, grows):
    warm = [(0.0, 1.0, 0.0)] * 20
    found = estimates([*warm, *[(0.0, 1.0, way)] * 80], steps=100)
    # for each factor of the steps it can change by that to the power of 1.5
    most = (100 / len(warm)) ** 1.5

    assert (found[-1] > found[len(warm)]) == grows
    assert 1 / most < found[-1] / found[len(warm)] < most


def test_an_estimate_that_does_not_follow_stays_after_the_warm_up():
    warm = [(1.0, 1.0, 1.0)] * 20
    found = estimates([*warm, *[(0.0, 1.0, 1.0)] * 80], steps=100, follow=0)

    assert found[-1] == found[60]

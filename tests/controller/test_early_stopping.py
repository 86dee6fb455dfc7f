"""A run ends when its evaluations no longer improve, and serves its best parameters."""

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


def moved(evaluated, metric="loss", progress=0.1, **options):
    """Return the moves by name, each a list with a value for each evaluation."""
    policy = controllers.early_stopping(metric, **options)
    state = policy.init()
    rows = []
    for count, value in enumerate(evaluated, 1):
        for seen in (count - 1, count):
            signals = {
                "evaluations": jnp.float32(seen),
                policy.watches[1]: jnp.float32(value if seen == count else np.nan),
                "progress": jnp.float32(progress),
            }
            moves, state = policy.update(signals, state)
            assert seen == count or not moves["stop"]
        rows.append(moves)
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_it_waits_for_as_many_evaluations_as_it_is_told():
    moves = moved([3, 2, 2.1, 2.2, 2.3, 2.4], patience=3)
    assert moves["stop"] == [0, 0, 0, 0, 1, 0]
    assert moves["serve_kept"] == [0, 0, 0, 0, 1, 0]
    assert moves["keep_average"] == [1, 1, 0, 0, 0, 0]


def test_a_better_one_in_between_begins_the_wait_anew():
    assert moved([3, 2, 2.1, 1.9, 2, 2.1], patience=2)["stop"] == [0, 0, 0, 0, 0, 1]


def test_accuracies_are_better_when_they_are_higher():
    values = [0.5, 0.6, 0.55, 0.58]
    assert moved(values, "accuracy", patience=2)["stop"] == [0, 0, 0, 1]
    assert moved(values, "hinge", patience=2, lower=True)["stop"] == [0, 0, 1, 0]


def test_a_gain_must_be_as_large_as_it_is_told():
    values = [1.0, 0.99, 0.98, 0.97]
    assert moved(values, patience=2, rtol=0.05)["stop"] == [0, 0, 1, 0]
    assert moved(values, patience=2)["stop"] == [0, 0, 0, 0]


def test_what_is_no_number_is_no_better():
    assert moved([1.0, np.nan, np.inf], patience=2)["stop"] == [0, 0, 1]


def overfitting(blobs, **fields):
    inputs, targets = blobs
    noisy = np.random.default_rng(0).permutation(targets)  # there is nothing to learn
    defaults = {
        "controller": controllers.early_stopping(patience=3),
        "test": (inputs[32:], noisy[32:]),
        "steps": 60,
    }
    return lepton.Recipe(
        model=partial(MLP, (12, 32, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=0.03,
        train=(inputs[:32], noisy[:32]),
        batch_size=32,
        evaluate_every=2,
        **defaults | fields,
    )


def test_the_run_ends_and_the_best_parameters_are_served(blobs, tmp_path):
    trainer = lepton.Trainer(overfitting(blobs), run_dir=tmp_path / "run")
    history = trainer.fit()
    losses = [metrics["loss"] for _, metrics in history.evaluations]
    best = int(np.argmin(losses))
    steps = [step for step, _ in history.evaluations]

    assert history.status == "finished" and "early_stopping" in history.reason
    assert history.steps == 2 * (best + 1 + 3) + 1 == steps[-1]
    # to the bit the parameters of the best evaluation
    assert losses[-1] == losses[best]
    assert trainer.evaluate()[0] == losses[best]

    journal = controllers.read_journal(tmp_path / "run")
    knobs = [line.get("knob") for line in journal]
    assert knobs[-1] == "stop" or "stop" in knobs
    short = lepton.Trainer(overfitting(blobs, steps=steps[best], controller=()))
    short.fit()
    served = controllers.select_weights(trainer.state, trainer.recipe)[0]
    for ours, plain in zip(
        jax.tree.leaves(served), jax.tree.leaves(short.state.params), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-4, atol=1e-6)


def test_a_budget_that_ends_first_serves_the_best_too(blobs):
    history = lepton.Trainer(
        overfitting(blobs, controller=controllers.early_stopping(patience=100))
    ).fit()
    losses = [metrics["loss"] for _, metrics in history.evaluations]
    assert history.steps == 60
    assert losses[-1] == min(losses) < losses[-2]


def test_a_run_that_goes_on_after_its_end_waits_anew(blobs):
    trainer = lepton.Trainer(overfitting(blobs))
    first = trainer.fit()
    assert trainer.fit().steps == 0
    again = trainer.fit(steps=60)
    assert first.steps < 60 and again.steps == 6


def test_there_must_be_something_to_evaluate_on(blobs):
    with pytest.raises(lepton.RecipeError, match="nothing to evaluate on"):
        lepton.Trainer(overfitting(blobs, test=None)).fit()
    unknown = controllers.early_stopping("accuarcy")
    with pytest.raises(lepton.RecipeError, match="did you mean"):
        recipe = overfitting(
            blobs, controller=unknown, metrics={"accuracy": lepton.metrics.accuracy}
        )
        lepton.Trainer(recipe).fit()
    with pytest.raises(lepton.RecipeError, match="patience"):
        controllers.early_stopping(patience=0)

"""At the end of a run the average is served at which an evaluation was best."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.models import MLP

pytestmark = pytest.mark.usefixtures("quick_compilation")


def moved(trained, evaluated, progress=None, **options):
    """Return the moves by name, each a list with a value for each evaluation.

    Args:
      trained: mean training loss before each.
      evaluated: its loss.
      progress: that of all of them; None: they are even and end with the run.
      **options: of the policy.
    """
    policy = controllers.best_average(**options)
    state = policy.init()
    rows = []
    for count, (train, test) in enumerate(zip(trained, evaluated, strict=True), 1):
        for seen in (count - 1, count):
            now = count / len(evaluated) if progress is None else progress
            signals = {
                "loss": jnp.float32(train),
                "progress": jnp.float32(now if seen == count else 0.99 * now),
                "evaluations": jnp.float32(seen),
                "evaluation_loss": jnp.float32(test if seen == count else np.nan),
            }
            moves, state = policy.update(signals, state)
        rows.append(moves)
    return {name: [float(row[name]) for row in rows] for name in rows[0]}


def test_the_best_average_is_kept_and_served_at_the_end():
    moves = moved([3, 2, 1, 0.5, 0.4, 0.3], [3, 2, 2.1, 1.9, 2.4, 2.0])

    assert moves["keep_average"] == [1, 1, 0, 1, 0, 0]
    assert moves["serve_kept"] == [0, 0, 0, 0, 0, 1]
    assert moves["averaging_decay"][-1] == 1


def test_an_average_that_is_best_at_the_end_is_served_as_it_is():
    moves = moved([3, 2, 1, 0.5], [3, 2.5, 2.6, 2.4])

    assert not any(moves["serve_kept"])
    assert np.isnan(moves["averaging_decay"]).all()


def test_a_person_is_told_once_that_the_model_overfits():
    moves = moved([3, 2, 1, 0.5, 0.4, 0.3], [3, 2, 2.1, 2.3, 2.4, 2.5])

    assert moves["notice"] == [0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("trained", "evaluated"),
    [
        ([3, 2, 2.5, 2.6, 2.7], [3, 2, 2.1, 2.3, 2.5]),  # a fault of the data
        ([3, 2, 1.9, 1.9, 1.9], [3, 2, 2.1, 2.3, 2.1]),  # noise, without a gap
        ([3, 2, 1, 0.5, 0.4], [3, 2, 2.01, 2.02, 2.03]),  # within the margin
        ([3, 2, 1, 0.5, 0.4], [3, 2, 2.1, 1.9, 2.0]),  # it gets better again
        ([-1, -2, -3, -4, -5], [-1, -2, -1.9, -1.8, -1.7]),  # of no known scale
    ],
)
def test_nothing_is_said_without_overfitting(trained, evaluated):
    assert not any(moved(trained, evaluated)["notice"])


def test_the_first_evaluations_do_not_count():
    losses = [3, 2, 1, 0.5, 0.4, 0.3], [3, 2, 2.1, 2.3, 2.4, 2.5]
    early = moved(*losses, progress=0.05)

    assert not any(early["keep_average"])
    assert not any(early["notice"])


def test_a_run_without_a_known_budget_serves_the_best_once_it_overfits():
    losses = [3, 2, 1, 0.5, 0.4, 0.3], [3, 2, 2.1, 2.3, 2.4, 1.0]
    moves = moved(*losses, progress=np.nan)

    assert moves["serve_kept"] == [0, 0, 0, 1, 0, 0]
    assert moves["averaging_decay"][3:] == [1, 1, 1]
    assert not any(moves["keep_average"][3:])


def test_what_is_served_is_the_average_of_the_best_evaluation(blobs):
    inputs, targets = blobs
    rng = np.random.default_rng(0)
    noisy = rng.permutation(targets)  # nothing to learn here, so any model overfits
    recipe = lepton.Recipe(
        model=partial(MLP, (12, 32, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=0.03,
        controller=(controllers.schedule_free(), controllers.best_average(quiet=0)),
        train=(inputs[:32], noisy[:32]),
        test=(inputs[32:], noisy[32:]),
        steps=60,
        batch_size=32,
        evaluate_every=5,
    )
    history = lepton.Trainer(recipe).fit()
    losses = [metrics["loss"] for _, metrics in history.evaluations]
    best = int(np.argmin(losses[:-1]))

    assert best < len(losses) - 3
    # one more step went into the average that is kept
    assert losses[-1] == pytest.approx(losses[best], rel=0.05)
    assert losses[-1] < 0.8 * losses[-2]


def test_an_average_can_be_kept_where_there_is_one_alone():
    keeping = controllers.Policy(
        "keeping",
        lambda: (),
        lambda signals, state: ({"keep_average": jnp.float32(0)}, state),
        watches=("step",),
        moves=("keep_average",),
    )
    recipe = lepton.Recipe(
        model=partial(MLP, (12, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        controller=keeping,
    )
    with pytest.raises(lepton.RecipeError, match="averaging"):
        controllers.Controller(recipe)


def test_it_keeps_the_laws_of_policies():
    controllers.conformance(controllers.best_average(), runs=False)


@pytest.mark.parametrize("options", [{"patience": 0}, {"margin": -1.0}, {"gap": -1.0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(lepton.RecipeError, match=next(iter(options))):
        controllers.best_average(**options)

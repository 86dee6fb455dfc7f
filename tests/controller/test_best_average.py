"""Where a model overfits, the average stays as it is."""

import jax.numpy as jnp
import numpy as np
import pytest

import lepton_jax as lepton
from lepton_jax import controllers


def held(trained, evaluated, progress=0.5, **options):
    """Return whether the average is held, and what is noticed, by evaluation."""
    policy = controllers.best_average(**options)
    state = policy.init()
    rows = []
    for count, (train, test) in enumerate(zip(trained, evaluated, strict=True), 1):
        for seen in (count - 1, count):
            signals = {
                "loss": jnp.float32(train),
                "progress": jnp.float32(progress),
                "evaluations": jnp.float32(seen),
                "evaluation_loss": jnp.float32(test if seen == count else np.nan),
            }
            moves, state = policy.update(signals, state)
        rows.append((float(moves["averaging_decay"]) == 1, float(moves["notice"])))
    return [row[0] for row in rows], [row[1] for row in rows]


def test_the_average_is_held_for_good_and_a_person_is_told_once():
    at, notices = held([3, 2, 1, 0.5, 0.4, 0.3], [3, 2, 2.1, 2.3, 2.4, 1.0])

    assert at == [False, False, False, True, True, True]
    assert notices == [0, 0, 0, 1, 0, 0]


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
def test_it_is_not_held_without_overfitting(trained, evaluated):
    at, _ = held(trained, evaluated)

    assert not any(at)


def test_the_first_evaluations_do_not_count():
    losses = [3, 2, 1, 0.5, 0.4, 0.3], [3, 2, 2.1, 2.3, 2.4, 1.0]
    at, _ = held(*losses, progress=0.05)
    unknown, _ = held(*losses, progress=np.nan)

    assert not any(at)
    assert any(unknown)


def test_it_keeps_the_laws_of_policies():
    controllers.conformance(controllers.best_average(), runs=False)


@pytest.mark.parametrize("options", [{"patience": 0}, {"margin": -1.0}, {"gap": -1.0}])
def test_arguments_out_of_range_are_refused(options):
    with pytest.raises(lepton.RecipeError, match=next(iter(options))):
        controllers.best_average(**options)

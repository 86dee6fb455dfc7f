"""Gradient boosting as a baseline, and the alarm for columns that are too good."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from lepton_jax import losses, metrics, models
from lepton_jax.baselines import NotHere, Samples, boosting, without_suspects

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 400
NAMES = {"categories": ["job", "ticket"], "numbers": ["age", "boat"]}


def drawn(seed, boat=False, tickets=False):
    """Rows whose class depends a little on age and job, or on more."""
    draw = np.random.default_rng(seed)
    age = draw.normal(size=ROWS)
    job = draw.integers(0, 4, ROWS)
    family = np.arange(ROWS) // 3
    luck = np.random.default_rng(9).normal(size=ROWS)[family]
    score = 0.8 * age + (job == 1) + draw.normal(size=ROWS) + 3 * tickets * luck
    label = (score > 0.4).astype(np.int32)
    late = np.where(label, 1.0, np.nan) if boat else draw.normal(size=ROWS)
    # rows of a family are on both sides
    ticket = family if tickets else draw.integers(0, 3, ROWS)
    inputs = {
        "numbers": np.stack([age, late], axis=1).astype(np.float32),
        "categories": np.stack([job, ticket], axis=1).astype(np.int32),
    }
    return Samples(inputs, label, ROWS, "classes", 2)


def share_right(samples, outputs):
    return (outputs.argmax(-1) == samples.targets).mean()


# ---- boosting ----


def test_trees_beat_chance_and_give_probabilities():
    train = drawn(0)
    test = drawn(1)
    baseline = boosting(train, test)
    np.testing.assert_allclose(np.exp(baseline.outputs).sum(-1), 1, rtol=1e-3)
    usual = max(test.targets.mean(), 1 - test.targets.mean())
    assert share_right(test, baseline.outputs) > usual + 0.05


def test_yes_or_no_gets_logits_in_the_shape_of_the_targets():
    rows = drawn(0)
    yes = Samples(rows.inputs, rows.targets[:, None], ROWS, "binary")
    outputs = boosting(yes, yes).outputs
    assert outputs.shape == (ROWS, 1)
    assert ((outputs > 0) == yes.targets).mean() > 0.7


def test_several_quantities_are_fitted_one_by_one():
    rows = drawn(0)
    age = rows.inputs["numbers"][:, 0]
    targets = np.stack([100 * age, -age], axis=1)
    several = Samples(rows.inputs, targets, ROWS, "quantities")
    outputs = boosting(several, several).outputs
    error = np.square(outputs - targets).mean(axis=0) / targets.var(axis=0)
    assert (error < 0.1).all()


def test_a_class_that_was_not_drawn_keeps_its_place():
    rows = drawn(0)
    three = Samples(rows.inputs, rows.targets * 2, ROWS, "classes", 3)
    outputs = boosting(three, three).outputs
    assert outputs.shape == (ROWS, 3)
    assert set(outputs.argmax(-1)) <= {0, 2}


def test_images_are_no_table():
    image = Samples(np.zeros((5, 8, 8)), np.zeros(5, int), 5, "classes", 2)
    with pytest.raises(NotHere, match="no table"):
        boosting(image, image)


# ---- suspects ----


def test_a_column_that_answers_alone_is_named_and_left_out():
    train = drawn(0, boat=True)
    test = drawn(1, boat=True)
    assert share_right(test, boosting(train, test).outputs) > 0.97
    alarm = without_suspects(train, test, names=NAMES)
    assert "alarm" in alarm.name
    assert "'boat', which alone answers as well as all" in alarm.name
    assert share_right(test, alarm.outputs) < 0.85


def test_rows_that_belong_together_on_both_sides_are_an_alarm():
    train = drawn(0, tickets=True)
    test = drawn(1, tickets=True)
    alarm = without_suspects(train, test, names=NAMES)
    assert "'ticket', which rows of training and test share" in alarm.name


def test_honest_columns_raise_no_alarm():
    with pytest.raises(NotHere, match="no column looks too good"):
        without_suspects(drawn(0), drawn(1), names=NAMES)


# ---- ensembles ----


def test_the_loss_of_an_ensemble_is_the_mean_of_its_members_losses():
    draw = np.random.default_rng(0)
    outputs = jnp.asarray(draw.normal(size=(5, 3, 4)), jnp.float32)
    targets = jnp.asarray(draw.integers(0, 4, 5))
    weighted = partial(losses.weighted_cross_entropy, weights=(1.0, 2.0, 3.0, 4.0))
    values, weights = losses.of_members(outputs, targets, loss=weighted, ndim=2)
    for member in range(3):
        alone, weight = weighted(outputs[:, member], targets)
        np.testing.assert_allclose(values[:, member], alone, rtol=1e-5)
        np.testing.assert_allclose(weights[:, member], weight)
    merged = models.mean_of_probabilities(outputs)
    plain = losses.of_members(merged, targets, loss=losses.cross_entropy, ndim=2)
    np.testing.assert_allclose(plain, losses.cross_entropy(merged, targets))


def test_metrics_of_an_ensemble_merge_its_members_first():
    draw = np.random.default_rng(0)
    outputs = jnp.asarray(draw.normal(size=(50, 3)), jnp.float32)
    targets = jnp.asarray(draw.normal(size=50), jnp.float32)
    metric = metrics.of_ensemble(metrics.rmse, models.mean_of_outputs, ndim=1)
    values = metric.values(outputs, targets)
    wanted = np.sqrt(np.square(outputs.mean(1) - targets).mean())
    assert metric.finish(values.mean()) == pytest.approx(float(wanted), rel=1e-5)


def test_predictions_of_several_labels_are_their_likeliest_classes():
    loss = partial(losses.joint_cross_entropy, classes=(2, 3))
    ensemble = partial(losses.of_members, loss=loss, ndim=2)
    outputs = jnp.asarray([[0.0, 1.0, 5.0, 1.0, 2.0], [3.0, 1.0, 0.0, 1.0, 2.0]])
    assert losses.decoder(ensemble)(outputs).tolist() == [[1, 0], [0, 2]]
    values = loss(outputs, jnp.asarray([[1, 0], [0, 2]]))
    second = losses.cross_entropy(outputs[:, 2:], jnp.asarray([0, 2]))
    np.testing.assert_allclose(values[:, 1], second, rtol=1e-6)


def test_squared_errors_are_in_units_of_each_targets_spread():
    outputs = jnp.asarray([[10.0, 0.1]])
    targets = jnp.asarray([[30.0, 0.3]])
    values = losses.scaled_squared_error(outputs, targets, spread=(10.0, 0.1))
    np.testing.assert_allclose(values, [[4.0, 4.0]], rtol=1e-5)

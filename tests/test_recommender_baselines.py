"""The baselines of recommenders next to plain NumPy, and to scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest

from lepton_jax import baselines
from lepton_jax.baselines.ials import factorize
from lepton_jax.baselines.pairs import SEEN, Pairs

USERS = np.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 3])
ITEMS = np.array([0, 1, 4, 1, 2, 0, 1, 2, 3, 4])


def samples(users, targets, task="other", classes=0):
    inputs = {"user": np.asarray(users, np.int32)}
    return baselines.Samples(inputs, np.asarray(targets), len(users), task, classes)


def test_the_last_pass_of_ials_solves_each_items_equations():
    pairs = Pairs.of(samples(USERS, ITEMS), 5)
    unobserved = 0.2
    regularization = 0.05
    users, items = factorize(
        pairs,
        dim=3,
        passes=4,
        unobserved=unobserved,
        regularization=regularization,
    )
    users = np.asarray(users, np.float64)
    for item in range(5):
        found = users[USERS[item == ITEMS]]
        weight = regularization * (len(found) + unobserved * 4)
        left = found.T @ found + unobserved * users.T @ users + weight * np.eye(3)
        expected = np.linalg.solve(left, found.sum(0))
        np.testing.assert_allclose(items[item], expected, rtol=2e-3, atol=1e-5)


def test_ials_gives_the_same_whatever_the_blocks(monkeypatch):
    draw = np.random.default_rng(0)
    pairs = Pairs.of(samples(draw.integers(0, 30, 400), draw.integers(0, 20, 400)), 20)
    whole = factorize(pairs, dim=4, passes=2)
    monkeypatch.setitem(factorize.__globals__, "MOST_ROWS", 3)
    parts = factorize(pairs, dim=4, passes=2)
    np.testing.assert_allclose(parts.items, whole.items, rtol=1e-3, atol=1e-5)


def test_neighbours_are_weighed_by_their_shrunk_cosine():
    test = samples([3], [1])
    outputs = baselines.item_knn(
        samples(USERS, ITEMS), test, neighbours=4, shrinkage=1.0, items=5
    ).outputs
    # user 3 has used item 4, as has user 0, who has used 0 and 1
    assert outputs[0, 0] == pytest.approx(1 / (2 + 1))
    assert outputs[0, 1] == pytest.approx(1 / (6**0.5 + 1))
    assert outputs[0, 2] == outputs[0, 3] == 0
    assert outputs[0, 4] == SEEN


def test_the_most_popular_item_comes_first_but_not_again():
    outputs = baselines.popularity(
        samples(USERS, ITEMS), samples([3, 2], [1, 4]), items=5
    ).outputs
    assert outputs[0].argmax() == 1
    assert outputs[1].argmax() == 4, "the only one that user 2 has not used"
    shown = baselines.popularity(
        samples(USERS, ITEMS), samples([3], [1]), items=5, shown=np.array([2, 3])
    ).outputs
    assert shown[0].argmax() == 2


def test_biases_are_the_ridge_solution():
    draw = np.random.default_rng(0)
    user = draw.integers(0, 6, 80)
    item = draw.integers(0, 5, 80)
    rating = draw.normal(3, 1, 80)
    rows = baselines.Samples({"user": user, "item": item}, rating, 80, "other")
    outputs = baselines.biases(rows, rows, user_weight=2.0, item_weight=3.0).outputs
    design = np.concatenate([np.eye(6)[user], np.eye(5)[item]], axis=1)
    penalty = np.diag([2.0] * 6 + [3.0] * 5)
    centred = rating - rating.mean()
    solution = np.linalg.solve(design.T @ design + penalty, design.T @ centred)
    np.testing.assert_allclose(outputs, rating.mean() + design @ solution, rtol=1e-5)


def test_samples_of_other_kinds_are_not_theirs():
    rows = baselines.Samples(np.zeros((3, 2)), np.zeros(3), 3, "quantities")
    methods = (
        baselines.popularity,
        baselines.item_knn,
        baselines.ials,
        baselines.biases,
        baselines.linear_clicks,
        baselines.factorization_machine,
    )
    for method in methods:
        with pytest.raises(baselines.NotHere):
            method(rows, rows)


@pytest.fixture
def clicks():
    draw = np.random.default_rng(0)
    numbers = draw.normal(size=(200, 2)).astype(np.float32)
    numbers[::9, 1] = np.nan
    categories = draw.integers(0, 4, (200, 2)).astype(np.uint32)
    both = np.where(categories[:, 0] == categories[:, 1], 2.0, -1.0)
    score = numbers[:, 0] + both
    targets = (score + draw.logistic(size=200) > 0).astype(np.int32)
    inputs = {"numbers": numbers, "categories": categories}
    return baselines.Samples(inputs, targets, 200, "other")


def test_the_linear_baseline_is_scikit_learns(clicks, monkeypatch):
    linear = pytest.importorskip("sklearn.linear_model", reason="scikit-learn")
    scope = baselines.linear_clicks.__globals__
    monkeypatch.setitem(scope, "STRENGTHS", (10.0,))
    logits = baselines.linear_clicks(clicks, clicks).outputs
    numbers = clicks.inputs["numbers"]
    parts = [np.nan_to_num(numbers), np.isnan(numbers)]
    parts += [np.eye(4)[column] for column in clicks.inputs["categories"].T]
    design = np.concatenate(parts, axis=1)
    model = linear.LogisticRegression(C=0.1, tol=1e-8, max_iter=1000)
    expected = model.fit(design, clicks.targets).decision_function(design)
    np.testing.assert_allclose(logits, expected, atol=5e-3)


def test_a_factorization_machine_learns_which_categories_agree(clicks, monkeypatch):
    scope = baselines.factorization_machine.__globals__
    monkeypatch.setitem(scope, "VECTOR_STRENGTHS", (1.0,))
    monkeypatch.setitem(scope, "STRENGTHS", (1.0, 1.0, 10.0))
    losses = []
    for method in (baselines.linear_clicks, baselines.factorization_machine):
        logits = method(clicks, clicks).outputs
        signs = np.where(clicks.targets > 0, -logits, logits)
        losses.append(np.logaddexp(0, signs).mean())
    assert losses[1] < 0.8 * losses[0]

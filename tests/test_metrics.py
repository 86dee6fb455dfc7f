"""Every metric is scikit-learn's, or ten lines of NumPy, however the data is cut."""

from functools import partial

import numpy as np
import optax
import pytest
import sklearn.metrics as reference
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import lepton_jax as lepton
from lepton_jax import losses, metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 43
BATCH = 16
CLASSES = 4
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(ROWS, CLASSES)).astype(np.float32)
LOGITS[:5] = LOGITS[5:10]
LABELS = RNG.integers(0, CLASSES, ROWS).astype(np.int32)
BINARY = RNG.integers(0, 2, ROWS).astype(np.int32)
RELEVANCE = RNG.integers(0, 3, (ROWS, CLASSES)).astype(np.int32)
RELEVANCE[7] = 0


class Echo(nnx.Module):
    """Returns its inputs."""

    def __init__(self, rngs):
        self.factor = nnx.Param(np.ones((), np.float32))

    def __call__(self, x):
        return x * self.factor[...]


def measured(metric, outputs, targets, devices=1, loss=losses.cross_entropy):
    trainer = lepton.Trainer(
        model=Echo,
        loss=loss,
        optimizer=optax.sgd(0.0),
        batch_size=BATCH,
        metrics=metric if isinstance(metric, dict) else {"it": metric},
        train=(outputs, targets),
        devices=devices,
    )
    return trainer.evaluate((outputs, targets))


def softmax(x):
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


CALLED = LOGITS.argmax(1)
SHARES = softmax(LOGITS.astype(float))
PAIR = LOGITS[:, :2]
SHARE = softmax(PAIR.astype(float))[:, 1]
SINGLE = LOGITS[:, 0]


def calibration(confidence, right):
    bins = np.ceil(confidence * 15)
    total = 0.0
    for number in np.unique(bins):
        own = bins == number
        total += own.mean() * abs(right[own].mean() - confidence[own].mean())
    return total


MULTICLASS = {
    "accuracy": (metrics.accuracy, reference.accuracy_score(LABELS, CALLED)),
    "f1": (metrics.f1, reference.f1_score(LABELS, CALLED, average="macro")),
    "precision": (
        metrics.precision,
        reference.precision_score(LABELS, CALLED, average="macro", zero_division=0),
    ),
    "recall": (
        metrics.recall,
        reference.recall_score(LABELS, CALLED, average="macro"),
    ),
    "balanced": (
        metrics.balanced_accuracy,
        reference.balanced_accuracy_score(LABELS, CALLED),
    ),
    "top_2": (
        partial(metrics.top_k_accuracy, k=2),
        reference.top_k_accuracy_score(LABELS, LOGITS, k=2),
    ),
    "log_loss": (metrics.log_loss, reference.log_loss(LABELS, SHARES)),
    "brier": (
        metrics.brier,
        ((SHARES - np.eye(CLASSES)[LABELS]) ** 2).sum(1).mean(),
    ),
    "ece": (
        metrics.calibration_error,
        calibration(SHARES.max(1), CALLED == LABELS),
    ),
    "auc": (
        metrics.auc,
        reference.roc_auc_score(LABELS, SHARES, multi_class="ovr"),
    ),
    "ap": (
        metrics.average_precision,
        reference.average_precision_score(np.eye(CLASSES)[LABELS], SHARES),
    ),
}


@pytest.mark.parametrize("devices", [1, 8])
def test_metrics_of_several_classes(devices):
    ours = measured({n: m for n, (m, _) in MULTICLASS.items()}, LOGITS, LABELS, devices)
    for name, (_, expected) in MULTICLASS.items():
        assert getattr(ours, name) == pytest.approx(expected, rel=1e-5), name


TWO = {
    "f1": (metrics.f1, reference.f1_score, "called"),
    "precision": (metrics.precision, reference.precision_score, "called"),
    "recall": (metrics.recall, reference.recall_score, "called"),
    "balanced": (
        metrics.balanced_accuracy,
        reference.balanced_accuracy_score,
        "called",
    ),
    "brier": (metrics.brier, reference.brier_score_loss, "share"),
    "log_loss": (metrics.log_loss, reference.log_loss, "share"),
    "auc": (metrics.auc, reference.roc_auc_score, "share"),
    "ap": (metrics.average_precision, reference.average_precision_score, "share"),
}


@pytest.mark.parametrize("form", ["two logits", "one logit"])
def test_metrics_of_two_classes(form):
    outputs, share = (PAIR, SHARE) if form == "two logits" else (SINGLE, None)
    share = sigmoid(SINGLE.astype(float)) if share is None else share
    loss = losses.cross_entropy
    if form == "one logit":
        loss = losses.binary_cross_entropy
    ours = measured({n: row[0] for n, row in TWO.items()}, outputs, BINARY, loss=loss)
    given = {"called": share > 0.5, "share": share}
    for name, (_, function, kind) in TWO.items():
        expected = function(BINARY, given[kind])
        assert getattr(ours, name) == pytest.approx(expected, rel=1e-5), name


RANKED = {
    "ndcg": partial(metrics.ndcg, k=2),
    "hit": partial(metrics.hit_rate, k=2),
    "mrr": metrics.reciprocal_rank,
    "map": metrics.mean_average_precision,
}


def test_metrics_of_ranks_with_several_relevant_candidates():
    distinct = RNG.permuted(LOGITS + np.arange(CLASSES), axis=1).astype(np.float32)
    loss = losses.squared_error
    ours = measured(RANKED, distinct, RELEVANCE, loss=loss)
    rows = RELEVANCE.any(1)
    scores, relevance = distinct[rows], RELEVANCE[rows]
    expected = reference.ndcg_score(relevance, scores, k=2)
    assert ours.ndcg == pytest.approx(expected, rel=1e-5)
    order = np.take_along_axis(relevance > 0, np.argsort(-scores), axis=1)
    assert ours.hit == pytest.approx(order[:, :2].any(1).mean(), rel=1e-5)
    first = order.argmax(1)
    assert ours.mrr == pytest.approx((1 / (1 + first)).mean(), rel=1e-5)
    expected = np.mean(
        [
            reference.average_precision_score(r > 0, s)
            for r, s in zip(relevance, scores, strict=True)
        ]
    )
    assert ours.map == pytest.approx(expected, rel=1e-5)


def test_metrics_of_ranks_with_one_relevant_candidate():
    ours = measured(RANKED, LOGITS, LABELS)
    own = LOGITS[np.arange(ROWS), LABELS][:, None]
    rank = (own < LOGITS).sum(1)
    assert ours.hit == pytest.approx((rank < 2).mean(), rel=1e-5)
    assert ours.mrr == pytest.approx((1 / (1 + rank)).mean(), rel=1e-5)
    assert ours.map == ours.mrr
    gain = np.where(rank < 2, 1 / np.log2(rank + 2), 0)
    assert ours.ndcg == pytest.approx(gain.mean(), rel=1e-5)


def test_equal_scores_gain_nothing():
    flat = np.zeros((ROWS, CLASSES), np.float32)
    ours = measured(RANKED, flat, LABELS)
    assert ours.hit == 0 and ours.mrr == pytest.approx(1 / CLASSES)
    one_hot = np.eye(CLASSES, dtype=np.int32)[LABELS]
    again = measured(RANKED, flat, one_hot, loss=losses.squared_error)
    assert again[1:] == pytest.approx(ours[1:])


def test_micro_batches_make_no_difference_to_sums():
    sums = {n: MULTICLASS[n][0] for n in ("precision", "balanced", "ece", "top_2")}
    rows = []
    for micro_batches in (1, 4):
        trainer = lepton.Trainer(
            model=Echo,
            loss=losses.cross_entropy,
            optimizer=optax.sgd(0.0),
            batch_size=BATCH,
            micro_batches=micro_batches,
            metrics=sums,
            train=(LOGITS, LABELS),
        )
        history = trainer.fit(steps=1)
        rows.append([history[name][0] for name in sums])
    np.testing.assert_allclose(*rows, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=8, max_size=8))
def test_average_precision_is_scikit_learns_with_ties_too(rows):
    scores = np.array([score for score, _ in rows], np.float32)
    positive = np.array([label for _, label in rows])
    ours = float(metrics.average_precision(scores, positive.astype(np.int32)))
    if positive.any():
        expected = reference.average_precision_score(positive, scores)
        assert ours == pytest.approx(expected, rel=1e-5)
    else:
        assert np.isnan(ours)


def test_accuracy_of_mixed_samples_is_that_of_their_larger_share():
    shares = softmax(RNG.normal(size=LOGITS.shape)).astype(np.float32)
    hits = metrics.accuracy(LOGITS, shares)
    np.testing.assert_array_equal(hits, shares.argmax(1) == CALLED)


def test_a_confusion_matrix_is_scikit_learns():
    ours = metrics.confusion_matrix(LABELS, CALLED)
    np.testing.assert_array_equal(ours, reference.confusion_matrix(LABELS, CALLED))
    assert metrics.confusion_matrix(LABELS, CALLED, 6).shape == (6, 6)
    with pytest.raises(lepton.DataError, match="among 2"):
        metrics.confusion_matrix(LABELS, CALLED, 2)
    with pytest.raises(lepton.DataError, match="float32"):
        metrics.confusion_matrix(LABELS, LOGITS)


def test_the_calibration_curve_is_what_the_error_is_made_of():
    share, confidence, hits = metrics.calibration_curve(LOGITS, LABELS).T
    assert share.sum() == pytest.approx(1)
    error = (share * np.abs(confidence - hits)).sum()
    expected = calibration(SHARES.max(1), CALLED == LABELS)
    assert error == pytest.approx(expected, rel=1e-5)


def test_missing_targets_are_left_out_of_a_metric():
    targets = SINGLE.copy()
    targets[::3] = np.nan
    there = ~np.isnan(targets)
    ours = measured(
        metrics.without_missing(metrics.rmse),
        LOGITS[:, 1],
        targets,
        loss=losses.without_missing(losses.squared_error),
    )
    expected = np.sqrt(((LOGITS[:, 1] - targets)[there] ** 2).mean())
    assert ours.it == pytest.approx(expected, rel=1e-5)
    assert ours.known == pytest.approx(there.mean())
    assert ours[0] == pytest.approx(expected**2, rel=1e-5)

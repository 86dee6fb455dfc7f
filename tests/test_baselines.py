"""Cheap methods against a network: intervals, pairs, and what is said of them."""

import json
import math
import sys
import time
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.baselines import Baseline, Interval, Network, NotHere, Samples
from lepton_jax.baselines.comparison import fitted_to, less_is_better, shown
from lepton_jax.baselines.intervals import alone, mean_interval, wilson
from lepton_jax.errors import DataError, RecipeError
from lepton_jax.metrics import Metric

ROWS = 60
CLASSES = 3


def some(targets, outputs=None):
    """Samples of some targets, whose inputs do not count."""
    targets = np.asarray(targets)
    task = "classes" if targets.dtype.kind == "i" else "quantities"
    return Samples(np.zeros((len(targets), 1)), targets, len(targets), task, CLASSES)


def logits(labels):
    """Logits whose largest one is that of the label."""
    return np.eye(CLASSES, dtype=np.float32)[labels]


def compared(metrics, outputs, targets, baseline):
    (one,) = Network(metrics, outputs, some(targets)).against(baseline)
    return one


# ---- intervals ----


def test_wilsons_interval_is_that_of_his_own_formula():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263
    interval = wilson(81, 263)
    assert interval.low == pytest.approx(0.2553, abs=1e-4)
    assert interval.high == pytest.approx(0.3662, abs=1e-4)


def test_a_mean_lies_in_its_interval_whose_width_is_that_of_the_normal():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = mean_interval(values)
    width = 2 * 1.96 * values.std() / 20
    assert interval.low < values.mean() < interval.high
    assert interval.high - interval.low == pytest.approx(width, rel=0.1)


def test_mcnemar_counts_only_the_rows_on_which_two_methods_differ():
    ours = np.array([1] * 8 + [0] * 1 + [1] * 50)
    theirs = np.array([0] * 8 + [1] * 1 + [1] * 50)
    # 8 of 9: 2 * (1 + 9) / 2**9
    assert alone(ours, theirs) == (8, 1)
    assert alone(ours, theirs).chance() == pytest.approx(20 / 512)
    assert alone(ours, ours).chance() == 1


@pytest.mark.parametrize(
    "name, less",
    [
        ("log_loss", True),
        ("val_rmse", True),
        ("FID", True),
        ("accuracy", False),
        ("female_recall", False),
        ("r2", False),
        ("hit_rate", False),
    ],
)
def test_whether_less_is_better_is_read_off_the_name(name, less):
    assert less_is_better(name) == less


@pytest.mark.parametrize(
    "interval, text",
    [
        (Interval(0.7912, 0.779, 0.803), "0.791 ± 0.012"),
        (Interval(41.2, 38, 45), "41.2 ± 3.5"),
        (Interval(1.0, 1.0, 1.0), "1"),
        (Interval(0.5, math.nan, math.nan), "0.5"),
    ],
)
def test_an_interval_is_shown_by_two_digits_of_its_width(interval, text):
    assert shown(interval) == text


# ---- comparing ----


def test_a_network_that_hits_more_often_is_better_and_one_that_hardly_does_is_not():
    targets = np.arange(ROWS) % CLASSES
    wrong = (targets + 1) % CLASSES
    metrics = {"accuracy": lepton.metrics.accuracy}
    theirs = np.where(np.arange(ROWS) < 30, targets, wrong)
    baseline = Baseline("half", "", logits(theirs))
    assert compared(metrics, logits(targets), targets, baseline).verdict == "better"
    assert compared(metrics, logits(wrong), targets, baseline).verdict == "worse"
    nearly = np.where(np.arange(ROWS) < 32, targets, wrong)
    one = compared(metrics, logits(nearly), targets, baseline)
    assert (one.verdict, one.paired) == ("equal", True)
    assert one.baseline.value == 0.5


def test_of_an_error_less_is_better_and_pairs_see_what_intervals_hide():
    generator = np.random.default_rng(1)
    targets = generator.normal(size=400).astype(np.float32)
    noise = generator.normal(size=400).astype(np.float32)
    # both err in the same rows, the baseline by a twentieth more
    baseline = Baseline("a little worse", "", targets + 1.05 * noise)
    metrics = {"rmse": lepton.metrics.rmse}
    one = compared(metrics, targets + noise, targets, baseline)
    assert one.verdict == "better"
    assert one.network.high > one.baseline.low


def test_a_metric_of_the_whole_set_and_one_of_several_means_have_intervals_too():
    generator = np.random.default_rng(2)
    targets = (np.arange(80) % 2).astype(np.float32)
    outputs = (3 * targets + generator.normal(size=80)).astype(np.float32)
    metrics = {"auc": lepton.metrics.auc, "f1": lepton.metrics.f1}
    samples = Samples(outputs, targets, 80, "binary")
    baseline = Baseline("noise", "", generator.normal(size=(80,)))
    ones = Network(metrics, outputs, samples).against(baseline)
    for one in ones:
        assert one.network.low < one.network.value < one.network.high
        assert one.verdict == "better"


def test_a_weighted_metric_counts_its_weights_in_each_resample():
    weights = np.array([1.0, 0.0] * 50, np.float32)
    outputs = np.where(weights > 0, 1.0, 1e6).astype(np.float32)
    targets = np.zeros(100, np.float32)
    metric = Metric(lambda o, t: (jnp.abs(o - t), weights[: len(o)]), lambda mean: mean)
    baseline = Baseline("twice", "", 2 * outputs)
    one = compared({"error": metric}, outputs, targets, baseline)
    assert one.network == Interval(1, 1, 1)
    assert one.baseline.value == 2


def test_values_by_row_and_metrics_alone_are_compared_as_far_as_they_go():
    targets = np.arange(ROWS) % CLASSES
    metrics = {"accuracy": lepton.metrics.accuracy}
    network = Network(metrics, logits(targets), some(targets))
    values = Baseline("values", "", values={"accuracy": np.zeros(ROWS)})
    alone = Baseline("alone", "", metrics={"accuracy": Interval(0.1, 0.05, 0.15)})
    other = Baseline("other", "", metrics={"hit rate": Interval(0.1, 0.05, 0.15)})
    (paired,) = network.against(values)
    (unpaired,) = network.against(alone)
    (unknown,) = network.against(other)
    assert (paired.paired, paired.verdict) == (True, "better")
    assert (unpaired.paired, unpaired.verdict) == (False, "better")
    assert (unknown.network, unknown.verdict) == (None, "")


def test_outputs_take_the_networks_shape_or_are_refused():
    two = Baseline("two", "", np.log([[0.25, 0.75]]))
    assert fitted_to(two, np.zeros(1), 1) == pytest.approx([math.log(3)])
    short = Baseline("short", "", np.log([[0.25, 0.75]]))
    padded = fitted_to(short, np.zeros((1, 3)), 1)
    assert padded.shape == (1, 3) and padded[0, 2] == pytest.approx(math.log(0.25))
    with pytest.raises(DataError, match="in the shape"):
        fitted_to(Baseline("wide", "", np.zeros((1, 5))), np.zeros((1, 3)), 1)
    with pytest.raises(DataError, match="2 rows for 1"):
        fitted_to(Baseline("long", "", np.zeros((2, 3))), np.zeros((1, 3)), 1)
    with pytest.raises(DataError, match="neither"):
        Network({}, None, some([0])).against(Baseline("empty", ""))


# ---- the least baseline ----


def test_the_majority_answers_alike_for_each_row():
    train = some(np.array([2, 2, 1, 2]))
    outputs = lepton.baselines.majority(train, some([0, 1])).outputs
    assert outputs.shape == (2, CLASSES) and (outputs.argmax(1) == 2).all()
    assert np.exp(outputs).sum(1) == pytest.approx(1)
    quantities = some(np.array([1.0, 2.0, 6.0]))
    assert lepton.baselines.majority(quantities, some([0.0])).outputs == [3]
    padded = some(np.array([-1, 2, 2, -1, 0]))
    assert (lepton.baselines.majority(padded, padded).outputs.argmax(1) == 2).all()
    gaps = some(np.array([1.0, np.nan, 3.0]))
    assert lepton.baselines.majority(gaps, some([0.0])).outputs == [2]
    yes = Samples(np.zeros(4), np.array([1, 1, 1, 0]), 4, "binary")
    assert lepton.baselines.majority(yes, yes).outputs[0] == pytest.approx(math.log(2))
    with pytest.raises(NotHere):
        other = Samples(np.zeros(4), np.zeros((4, 7)), 4, "other")
        lepton.baselines.majority(other, other)


# ---- a trainer's baselines ----


def recipe(**changes):
    generator = np.random.default_rng(0)
    labels = generator.integers(0, CLASSES, 200)
    inputs = np.eye(CLASSES, dtype=np.float32)[labels] + generator.normal(
        size=(200, CLASSES)
    ).astype(np.float32)
    return lepton.Recipe(
        model=partial(lepton.models.MLP, (CLASSES, CLASSES)),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        optimizer=optax.sgd(0.1),
        train=(inputs[:120], labels[:120]),
        test=(inputs[120:], labels[120:]),
        steps=3,
        batch_size=32,
    ).with_(**changes)


def test_a_trainer_compares_with_the_majority_where_the_recipe_names_nothing():
    trainer = lepton.Trainer(recipe())
    trainer.fit()
    (comparison,) = trainer.baseline()
    (one,) = comparison.compared
    assert one.network.value == pytest.approx(trainer.evaluate().accuracy)
    assert "the most frequent class" in str(comparison)


def test_without_a_metric_the_loss_is_compared():
    trainer = lepton.Trainer(recipe(metrics={}, baseline=lepton.baselines.majority))
    trainer.fit()
    (comparison,) = trainer.baseline()
    (one,) = comparison.compared
    assert one.metric == "loss"
    assert one.network.value == pytest.approx(trainer.evaluate().loss, rel=1e-5)


def slow(train, test):
    time.sleep(60)


def broken(train, test):
    raise ZeroDivisionError("nothing to divide by")


def needs(train, test):
    import no_such_package_at_all  # noqa: F401


def test_a_baseline_that_fails_or_is_slow_says_why_and_ends_nothing(tmp_path):
    two = recipe(baseline=(broken, needs))
    trainer = lepton.Trainer(two, run_dir=tmp_path)
    trainer.fit()
    trainer.examine(seconds=60)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    failed = [event["failed"] for event in events if event["kind"] == "baseline"]
    assert failed[0] == "ZeroDivisionError: nothing to divide by"
    assert "no_such_package_at_all is not installed" in failed[1]
    (late,) = lepton.Trainer(recipe(baseline=slow)).baseline(seconds=0.05)
    assert late.failed == "it took longer than 0.05 s"


def test_a_baseline_sees_a_bounded_sample_and_the_comparison_says_of_how_many():
    seen = {}

    def looks(train, test):
        seen["rows"] = (len(train), train.total, len(test), test.task, test.classes)
        raise NotHere("it only looks")

    trainer = lepton.Trainer(recipe(baseline=looks))
    trainer.fit()
    (comparison,) = trainer.baseline()
    assert seen["rows"] == (120, 120, 80, "classes", CLASSES)
    assert comparison.failed == "it only looks"
    assert (comparison.rows, comparison.total) == (80, 80)
    rows = lepton.data.host_rows(lepton.data.Arrays(np.arange(50)), 10, 2**20)
    assert rows.total == 50 and (rows.inputs == rows.numbers).all()
    assert len(lepton.data.host_rows(lepton.data.Arrays(np.arange(50)), 10, 12)[0]) == 3


def test_what_is_no_baseline_is_refused():
    with pytest.raises(RecipeError, match="baseline is 3"):
        recipe(baseline=3)


# ---- linear models and neighbours ----


def table(rows, seed):
    """Rows of which a number and a category say the class; some numbers are missing."""
    generator = np.random.default_rng(seed)
    numbers = generator.normal(size=(rows, 2)).astype(np.float32) * [1, 1000]
    categories = generator.integers(0, 4, (rows, 1)).astype(np.int32)
    labels = (numbers[:, 0] > 0).astype(np.int32) + (categories[:, 0] == 2)
    numbers[generator.random(rows) < 0.1, 1] = np.nan
    inputs = {"numbers": numbers.astype(np.float32), "categories": categories}
    return Samples(inputs, labels.astype(np.int32), rows, "classes", CLASSES)


@pytest.mark.parametrize("method, least", [("logistic", 0.85), ("nearest", 0.85)])
def test_a_method_learns_from_scaled_numbers_gaps_and_categories(method, least):
    pytest.importorskip("sklearn")
    test = table(300, 2)
    baseline = getattr(lepton.baselines, method)(table(600, 1), test)
    assert baseline.outputs.shape == (300, CLASSES)
    assert (baseline.outputs.argmax(1) == test.targets).mean() > least


@pytest.mark.parametrize("method", ["logistic", "nearest"])
def test_yes_or_no_and_quantities_come_in_the_shape_of_their_targets(method):
    pytest.importorskip("sklearn")
    inputs = np.linspace(-2, 2, 200, dtype=np.float32)[:, None]
    function = getattr(lepton.baselines, method)
    yes = Samples(inputs, (inputs > 0).astype(np.float32), 200, "binary")
    outputs = function(yes, yes).outputs
    assert outputs.shape == (200, 1)
    assert ((outputs > 0) == (inputs > 0)).mean() > 0.95
    quantity = Samples(inputs, 3 * inputs, 200, "quantities")
    outputs = function(quantity, quantity).outputs
    assert outputs.shape == (200, 1) and np.abs(outputs - 3 * inputs).mean() < 0.3


def test_too_many_features_or_targets_are_told_and_a_sample_of_rows_is(monkeypatch):
    pytest.importorskip("sklearn")
    wide = Samples(np.zeros((4, 5000), np.float32), np.arange(4), 4, "classes", 4)
    with pytest.raises(NotHere, match="5,000 columns"):
        lepton.baselines.logistic(wide, wide)
    two = Samples(np.zeros((4, 1)), np.zeros((4, 2)), 4, "quantities")
    with pytest.raises(NotHere, match="2 targets"):
        lepton.baselines.nearest(two, two)
    module = sys.modules["lepton_jax.baselines.logistic"]
    monkeypatch.setattr(module, "MOST_CELLS", 700)
    baseline = lepton.baselines.logistic(table(600, 1), table(10, 2))
    assert "100 of 600 training rows, drawn at random" in baseline.fitted


def test_a_class_that_training_lacks_is_no_error():
    pytest.importorskip("sklearn")
    one = Samples(np.zeros((8, 1), np.float32), np.ones(8, np.int32), 8, "classes", 3)
    for method in (lepton.baselines.logistic, lepton.baselines.nearest):
        outputs = method(one, one).outputs
        assert (outputs.argmax(1) == 1).all()
        assert fitted_to(Baseline("b", "", outputs), np.zeros((8, 3)), 8).shape == (
            8,
            3,
        )

"""Losses with weights, smoothing, missing targets, counts and several tasks."""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
import sklearn.metrics as reference
from flax import nnx
from sklearn.utils.class_weight import compute_class_weight

import lepton_jax as lepton
from lepton_jax import losses, metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(1)
ROOT = Path(__file__).resolve().parents[1]
ROWS = 36
LOGITS = RNG.normal(size=(ROWS, 3)).astype(np.float32)
LABELS = RNG.integers(0, 3, ROWS).astype(np.int32)


def mean(loss, outputs, targets):
    return float(losses.mean(*losses.weighted_sum(loss, outputs, targets)))


def log_softmax(x):
    return np.log(np.exp(x) / np.exp(x).sum(-1, keepdims=True))


def test_class_weights_are_sample_weights_of_scikit_learn():
    weights = losses.balanced(LABELS)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    np.testing.assert_allclose(weights, expected)
    ours = mean(partial(losses.weighted_cross_entropy, weights=weights), LOGITS, LABELS)
    shares = np.exp(log_softmax(LOGITS.astype(float)))
    expected = reference.log_loss(
        LABELS, shares, sample_weight=np.asarray(weights)[LABELS]
    )
    assert ours == pytest.approx(expected, rel=1e-5)


def test_smoothed_labels_are_optax_s():
    ours = losses.weighted_cross_entropy(LOGITS, LABELS, smoothing=0.2)
    soft = optax.smooth_labels(jax.nn.one_hot(LABELS, 3), 0.2)
    np.testing.assert_allclose(
        ours, optax.softmax_cross_entropy(LOGITS, soft), rtol=1e-5
    )
    mixed = losses.weighted_cross_entropy(LOGITS, soft, weights=(1.0, 2.0, 4.0))
    np.testing.assert_allclose(mixed[1], soft @ np.array([1.0, 2, 4]), rtol=1e-6)


def test_a_rare_positive_class_can_weigh_more():
    labels = LABELS == 2
    ours = mean(
        partial(losses.weighted_binary_cross_entropy, positive=3.0),
        LOGITS[:, 0],
        labels,
    )
    share = 1 / (1 + np.exp(-LOGITS[:, 0].astype(float)))
    expected = reference.log_loss(labels, share, sample_weight=1 + 2 * labels)
    assert ours == pytest.approx(expected, rel=1e-5)


def test_counts_have_poissons_likelihood():
    counts = RNG.poisson(3, ROWS)
    expected = -scipy.stats.poisson.logpmf(counts, np.exp(LOGITS[:, 0]))
    ours = losses.poisson(jnp.asarray(LOGITS[:, 0]), jnp.asarray(counts))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_pinball_is_scikit_learns():
    targets = LOGITS[:, 0]
    loss = partial(losses.pinball, levels=(0.1, 0.5, 0.9))
    ours = np.asarray(loss(LOGITS, targets)).mean(0)
    for k, level in enumerate((0.1, 0.5, 0.9)):
        expected = reference.mean_pinball_loss(targets, LOGITS[:, k], alpha=level)
        assert ours[k] == pytest.approx(expected, rel=1e-5)
    one = mean(partial(losses.pinball, levels=0.9), LOGITS[:, 2], targets)
    assert one == pytest.approx(ours[2], rel=1e-5)


def test_cosine_is_scikit_learns_and_has_a_gradient_at_zero():
    other = RNG.normal(size=LOGITS.shape).astype(np.float32)
    expected = reference.pairwise.paired_cosine_distances(LOGITS, other)
    np.testing.assert_allclose(losses.cosine(LOGITS, other), expected, atol=1e-5)
    gradient = jax.grad(lambda x: losses.cosine(x, other).sum())(0 * LOGITS)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(
    "call, kind, said",
    [
        (
            lambda: losses.weighted_cross_entropy(LOGITS, LABELS, weights=(1.0,)),
            lepton.RecipeError,
            "1 weights for 3 classes",
        ),
        (
            lambda: losses.weighted_cross_entropy(LOGITS, LABELS, smoothing=1.0),
            lepton.RecipeError,
            "smoothing",
        ),
        (
            lambda: losses.pinball(LOGITS, LABELS, levels=(0.1, 1.5)),
            lepton.RecipeError,
            "levels",
        ),
        (lambda: losses.balanced([0, 2, 2]), lepton.DataError, "class 1 has no"),
        (lambda: losses.balanced([]), lepton.DataError, "no labels"),
        (lambda: losses.balanced([0, 1, 2], 2), lepton.DataError, "among 2"),
        (lambda: losses.sum_of({}), lepton.RecipeError, "no tasks"),
        (lambda: losses.sum_of({"a": 3}), lepton.RecipeError, "the task 'a'"),
        (
            lambda: losses.sum_of({"a": (losses.huber, -1)}),
            lepton.RecipeError,
            "the task 'a'",
        ),
    ],
)
def test_settings_that_can_not_be_are_errors(call, kind, said):
    with pytest.raises(kind, match=said):
        call()


# ---- missing targets ----


def test_missing_targets_have_no_part_in_loss_and_gradient():
    targets = RNG.normal(size=(ROWS, 3)).astype(np.float32)
    targets[RNG.random(targets.shape) < 0.4] = np.nan
    there = ~np.isnan(targets)
    loss = losses.without_missing(losses.squared_error)
    expected = ((LOGITS - targets)[there] ** 2).mean()
    assert mean(loss, LOGITS, targets) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(lambda x: loss(x, targets)[0].sum())(jnp.asarray(LOGITS))
    np.testing.assert_array_equal(np.asarray(gradient != 0), there)


@pytest.mark.parametrize("missing", [-1, -100])
def test_missing_labels_are_negative_and_those_too_large_are_found(missing):
    labels = np.where(np.arange(ROWS) % 3, LABELS, missing)
    loss = losses.without_missing(losses.cross_entropy)
    known = labels >= 0
    expected = mean(losses.cross_entropy, LOGITS[known], labels[known])
    assert mean(loss, LOGITS, labels) == pytest.approx(expected, rel=1e-5)
    gradient = jax.grad(lambda x: loss(x, labels)[0].sum())(jnp.asarray(LOGITS))
    assert np.isfinite(gradient).all() and not gradient[~known].any()

    labels[1] = 3
    trainer = lepton.Trainer(
        model=partial(lepton.models.MLP, (3, 3)),
        loss=loss,
        optimizer=optax.sgd(0.1),
        train=(LOGITS, labels),
        batch_size=4,
    )
    with pytest.raises(lepton.DataError, match="there are 3 classes"):
        trainer.fit(steps=1)


# ---- several tasks ----


class TwoHeads(nnx.Module):
    """Two inputs by name, two outputs by name."""

    def __init__(self, rngs):
        self.body = nnx.Linear(3 + 1, 8, rngs=rngs)
        self.age = nnx.Linear(8, 1, rngs=rngs)
        self.sex = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, pixels, extra):
        x = nnx.relu(self.body(jnp.concatenate([pixels, extra[:, None]], axis=-1)))
        return {"age": self.age(x)[:, 0], "sex": self.sex(x)}


def tasks_data():
    extra = RNG.normal(size=ROWS).astype(np.float32)
    age = (LOGITS[:, 0] + extra).astype(np.float32)
    age[::4] = np.nan
    sex = (LOGITS[:, 1] > 0).astype(np.int32)
    return {"pixels": LOGITS, "extra": extra}, {"age": age, "sex": sex}


DATA = tasks_data()
LOSS = losses.sum_of(
    {
        "age": (losses.without_missing(losses.squared_error), 1.0),
        "sex": (losses.cross_entropy, 0.5),
    }
)


def make(devices=1, **fields):
    defaults = {
        "model": TwoHeads,
        "loss": LOSS,
        "optimizer": optax.adam(0.03),
        "metrics": {"accuracy": metrics.of_task("sex", metrics.accuracy)},
        "train": DATA,
        "batch_size": 16,
        "steps": 60,
    }
    return lepton.Trainer(devices=devices, **defaults | fields)


@pytest.mark.parametrize("devices", [1, 8])
def test_two_tasks_are_learned_and_each_loss_is_seen(devices):
    trainer = make(devices)
    history = trainer.fit()
    assert {"age_loss", "sex_loss", "age_known", "accuracy"} <= set(history.names)
    assert history["loss"][-5:].mean() < 0.5 * history["loss"][:5].mean()

    result = trainer.evaluate(DATA)
    inputs, targets = DATA
    raw = trainer.predict(inputs, decode=lambda outputs: outputs)
    there = ~np.isnan(targets["age"])
    squares = (raw["age"] - targets["age"])[there] ** 2
    assert result.age_loss == pytest.approx(squares.mean(), rel=1e-4)
    assert result.age_known == pytest.approx(there.mean())
    own = -log_softmax(raw["sex"])[np.arange(ROWS), targets["sex"]]
    assert result.sex_loss == pytest.approx(own.mean(), rel=1e-4)
    total = squares.sum() / ROWS + 0.5 * own.mean()
    assert result.loss == pytest.approx(total, rel=1e-4)


def test_predictions_of_tasks_are_each_tasks_own_and_are_saved(tmp_path):
    trainer = make()
    trainer.fit(steps=2)
    inputs, _ = DATA
    predicted = trainer.predict(inputs)
    assert predicted["sex"].dtype == np.int32
    assert predicted["age"].dtype == np.float32
    trainer.save(tmp_path / "saved")
    opened = lepton.Trainer.open(tmp_path / "saved", model=TwoHeads, devices=1)
    again = opened.predict(inputs)
    np.testing.assert_array_equal(again["sex"], predicted["sex"])
    np.testing.assert_array_equal(again["age"], predicted["age"])


def test_the_metrics_of_tasks_follow_the_loss():
    recipe = make().recipe
    assert "age_known" in recipe.metrics
    plain = recipe.with_(loss=losses.sum_of({"sex": losses.cross_entropy}))
    assert set(plain.metrics) == {"accuracy", "sex_loss"}
    assert set(recipe.with_(loss=losses.cross_entropy).metrics) == {"accuracy"}


def test_a_task_that_is_not_there_is_named():
    loss = losses.sum_of({"sexe": losses.cross_entropy})
    with pytest.raises(lepton.ModelError, match="did you mean 'sex'"):
        make(loss=loss).fit(steps=1)


def test_counts_are_predicted_as_expected_counts():
    assert losses.decoder(losses.poisson)(jnp.zeros(2)).tolist() == [1, 1]
    missing = losses.without_missing(losses.cross_entropy)
    assert losses.decoder(missing)(jnp.eye(3)).tolist() == [0, 1, 2]
    assert losses.decoder(missing) is losses.decoder(missing)


def test_the_pages_example_of_tasks_runs_as_written():
    text = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    found = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    block = next(text for text in found if "sum_of" in text)
    changes, evaluation = block.split("trainer.evaluate")
    names = {"recipe": make().recipe.with_(metrics={})}
    exec(compile(changes, "docs/evaluation.md", "exec"), names)
    trainer = lepton.Trainer(names["recipe"], devices=1)
    fields = trainer.evaluate(DATA)._fields
    said = evaluation.partition("# ")[2].strip().split(", ")
    assert set(fields) == set(said)


def test_a_z_loss_is_the_square_of_the_logarithm_of_the_softmaxs_sum():
    plain = losses.weighted_cross_entropy(LOGITS, LABELS)
    ours = losses.weighted_cross_entropy(LOGITS, LABELS, z=0.5)

    sums = np.log(np.exp(np.asarray(LOGITS, np.float64)).sum(-1))
    np.testing.assert_allclose(ours - plain, 0.5 * sums**2, rtol=1e-5)
    with pytest.raises(lepton.RecipeError, match="z is -1"):
        losses.weighted_cross_entropy(LOGITS, LABELS, z=-1)

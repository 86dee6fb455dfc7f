"""Evaluation and prediction: each sample once, alone or in its own batch, by hand."""

import itertools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics
from flax import nnx

import lepton_jax as lepton
from lepton_jax.losses import cross_entropy
from lepton_jax.metrics import Metric

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROWS = 40
BATCH = 16
X = np.random.default_rng(0).normal(size=(ROWS, 4)).astype(np.float32)
Y = np.random.default_rng(1).integers(0, 3, ROWS).astype(np.int32)


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Several(Net):
    """Outputs of which one has its batch second, and one has none."""

    def __call__(self, x):
        logits = self.layer(x)
        return {"logits": logits, "weights": jnp.stack([logits, 2 * logits])}


class Mixing(Net):
    """Statistics of the batch, in evaluation too."""

    def __call__(self, x):
        return self.layer(x - x.mean(0))


class Attending(Net):
    """Each sample looks at all others of its batch."""

    def __call__(self, x):
        h = self.layer(x)
        return jax.nn.softmax(h @ h.T) @ h


class Queueing(Net):
    """Two experts with three places each; who comes later gets zeros."""

    def __call__(self, x):
        h = self.layer(x)
        chosen = jax.nn.one_hot(h[:, :2].argmax(-1), 2)
        place = (jnp.cumsum(chosen, axis=0) * chosen).sum(-1)
        return jnp.where(
            (place <= 3)[:, None],
            h,
            0,
        )


def make(devices=1, **fields):
    defaults = {
        "model": Net,
        "loss": cross_entropy,
        "optimizer": optax.sgd(0.1),
        "batch_size": BATCH,
        "train": (X, Y),
    }
    return lepton.Trainer(devices=devices, **defaults | fields)


def raw(outputs):
    return outputs


def by_batches(function, *arrays):
    """The mean of a function of batches of 16, 16 and 8 rows, by their rows."""
    edges = [*range(0, len(arrays[0]), BATCH), len(arrays[0])]
    total = 0.0
    for start, stop in itertools.pairwise(edges):
        rows = [jnp.asarray(a[start:stop]) for a in arrays]
        total += float(function(*rows)) * (stop - start)
    return total / len(arrays[0])


def programs(trainer, name):
    return sum(c.program == name for c in trainer.program.compilations)


# ---- losses ----


def contrastive(outputs, targets):
    """Each sample against all of its batch: which of them is itself?"""
    return cross_entropy(outputs @ outputs.T, jnp.arange(len(outputs)))


def mean_contrastive(outputs, targets):
    return contrastive(outputs, targets).mean()


def cross_entropy_of_groups(outputs, targets):
    """The loss of a sample is that of the hardest one in its batch."""
    return jnp.full(len(targets), cross_entropy(outputs, targets).max())


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize(
    "loss", [contrastive, mean_contrastive, cross_entropy_of_groups]
)
def test_a_loss_over_pairs_sees_no_filling_rows(loss, devices):
    trainer = make(devices, loss=loss)
    outputs = trainer.predict(X, decode=raw)
    expected = by_batches(
        lambda o, t: jnp.mean(loss(o, t)),
        outputs,
        Y,
    )
    assert trainer.evaluate((X, Y)).loss == pytest.approx(expected, rel=1e-5)
    assert programs(trainer, "evaluate") == 2

    alone = float(jnp.mean(loss(jnp.asarray(outputs[32:]), Y[32:])))
    assert trainer.evaluate((X[32:], Y[32:])).loss == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "devices"),
    [
        (3, 8),
        (16, 1),
        (17, 1),
        (40, 8),
    ],
)
def test_grain_data_sets_are_evaluated_like_arrays(rows, devices):
    trainer = make(devices, loss=contrastive)
    pairs = list(
        zip(
            X[:rows],
            Y[:rows],
            strict=True,
        )
    )
    outputs = trainer.predict(X[:rows], decode=raw)
    expected = by_batches(lambda o: contrastive(o, None).mean(), outputs)
    of_grain = trainer.evaluate(grain.MapDataset.source(pairs)).loss
    assert of_grain == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate((X[:rows], Y[:rows])).loss == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize(
    "model",
    [
        Mixing,
        Attending,
        Queueing,
    ],
)
@pytest.mark.parametrize("devices", [1, 8])
def test_a_model_that_mixes_samples_sees_no_filling_rows(model, devices):
    trainer = make(devices, model=model)
    trainer.fit(steps=1)
    params = jax.tree.map(np.asarray, trainer.state.params)
    net = model(nnx.Rngs(0))
    net.layer.kernel[...] = params["layer"]["kernel"]
    net.layer.bias[...] = params["layer"]["bias"]

    edges = [
        (0, 16),
        (16, 32),
        (32, 40),
    ]
    outputs = np.concatenate([net(X[a:b]) for a, b in edges])
    np.testing.assert_allclose(
        trainer.predict(X, decode=raw),
        outputs,
        atol=1e-5,
    )
    expected = float(cross_entropy(outputs, Y).mean())
    assert trainer.evaluate((X, Y)).loss == pytest.approx(expected, rel=1e-5)


def test_where_samples_stay_apart_the_last_batch_costs_no_compilation():
    trainer = make(
        metrics={"accuracy": lepton.metrics.accuracy, "f1": lepton.metrics.f1}
    )
    trainer.evaluate((X, Y))
    trainer.predict(X)
    assert programs(trainer, "evaluate") == 1
    assert programs(trainer, "predict") == 1


def test_a_loss_with_weights_keeps_its_weights():
    def weighted(outputs, targets):
        return cross_entropy(outputs, targets), (targets > 0).astype(jnp.float32)

    trainer = make(loss=weighted)
    each = cross_entropy(jnp.asarray(trainer.predict(X, decode=raw)), Y)
    expected = float(each[Y > 0].mean())
    assert trainer.evaluate((X, Y)).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["loss", "metric"])
def test_an_evaluation_of_nothing_says_so(name):
    def ignored(outputs, targets):
        return cross_entropy(outputs, targets), (targets > 0).astype(jnp.float32)

    fields = {"loss": ignored} if name == "loss" else {"metrics": {"metric": ignored}}
    trainer = make(**fields)
    with pytest.raises(lepton.DataError, match=f"{name!r} gives its samples are all 0"):
        trainer.evaluate((X[:5], np.zeros(5, np.int32)))
    assert trainer.evaluate((X, Y)).loss > 0


# ---- metrics ----


def scalar_f1(outputs, targets):
    found = outputs.argmax(-1) == 1
    labelled = targets == 1
    return 2 * (found & labelled).sum() / (found.sum() + labelled.sum())


def scalar_r2(outputs, targets):
    values = outputs[:, 0]
    spread = jnp.square(targets - targets.mean()).sum()
    return 1 - jnp.square(targets - values).sum() / spread


def scalar_accuracy(outputs, targets):
    return (outputs.argmax(-1) == targets).mean()


def errors(outputs, targets):
    return (outputs.argmax(-1) != targets).sum()


def scalar_perplexity(outputs, targets):
    return jnp.exp(cross_entropy(outputs, targets).mean())


@pytest.mark.parametrize(
    ("rows", "devices"),
    [
        (7, 8),
        (16, 1),
        (40, 1),
        (40, 8),
    ],
)
def test_a_scalar_metric_is_that_of_the_whole_test_set(rows, devices):
    metrics = {
        "f1": scalar_f1,
        "r2": scalar_r2,
        "accuracy": scalar_accuracy,
        "errors": errors,
        "rooted": Metric(
            lambda o, t: jnp.square(o[:, 0] - t).mean(),
            jnp.sqrt,
        ),
        "perplexity": scalar_perplexity,
    }
    trainer = make(devices, metrics=metrics)
    assert trainer.fit(steps=2)["f1"].shape == (2,)
    found = trainer.evaluate((X[:rows], Y[:rows]))
    outputs = jnp.asarray(trainer.predict(X[:rows], decode=raw))
    for name, metric in metrics.items():
        finish = getattr(metric, "finish", raw)
        expected = float(finish(getattr(metric, "values", metric)(outputs, Y[:rows])))
        assert getattr(found, name) == pytest.approx(expected, rel=1e-5, abs=1e-6), name


def test_a_first_batch_that_is_perfect_does_not_hide_that_f1_is_no_mean():
    # in the first batch F1 is 1, and so is that of any part of it
    labels = np.array([1] * 16 + [0] * 20 + [1] * 4, np.int32)
    inputs = np.where(labels == 1, 1.0, -1.0).astype(np.float32)
    inputs[20:30] *= -1

    class Threshold(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return jnp.stack([-x, x], axis=-1) * self.scale

    trainer = make(
        model=Threshold,
        train=(inputs, labels),
        metrics={"f1": scalar_f1},
    )
    expected = sklearn.metrics.f1_score(labels, inputs > 0)
    assert trainer.evaluate((inputs, labels)).f1 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("rows", "devices"),
    [
        (16, 1),
        (37, 8),
        (333, 1),
    ],
)
def test_f1_and_auc_of_classes_agree_with_scikit_learn(rows, devices):
    rng = np.random.default_rng(rows)
    inputs = rng.normal(size=(rows, 4)).astype(np.float32)
    labels = rng.integers(0, 3, rows).astype(np.int32)
    metrics = {"f1": lepton.metrics.f1, "auc": lepton.metrics.auc}
    trainer = make(
        devices,
        metrics=metrics,
        train=(inputs, labels),
    )
    logits = trainer.predict(inputs, decode=raw)
    found = trainer.evaluate((inputs, labels))
    expected = sklearn.metrics.f1_score(
        labels,
        logits.argmax(1),
        average="macro",
    )
    assert found.f1 == pytest.approx(expected, rel=1e-5)
    shares = np.exp(logits.astype(np.float64))
    shares /= shares.sum(1, keepdims=True)
    area = sklearn.metrics.roc_auc_score(
        labels,
        shares,
        multi_class="ovr",
    )
    assert found.auc == pytest.approx(area, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "devices"),
    [
        (11, 8),
        (64, 1),
        (250, 8),
    ],
)
def test_f1_and_auc_of_a_logit_agree_with_scikit_learn(rows, devices):
    rng = np.random.default_rng(rows)
    # rounded, so that scores are tied
    inputs = rng.normal(size=(rows, 4)).round().astype(np.float32)
    labels = (rng.random(rows) < 0.3).astype(np.float32)
    labels[:2] = 0, 1

    class Logit(Net):
        def __call__(self, x):
            return x[:, 0] + 0 * self.layer(x)[:, 0]

    trainer = make(
        devices,
        model=Logit,
        loss=lepton.losses.binary_cross_entropy,
        train=(inputs, labels),
        metrics={"f1": lepton.metrics.f1, "auc": lepton.metrics.auc},
    )
    found = trainer.evaluate((inputs, labels))
    expected = sklearn.metrics.f1_score(labels, inputs[:, 0] > 0)
    assert found.f1 == pytest.approx(expected, rel=1e-5)
    area = sklearn.metrics.roc_auc_score(labels, inputs[:, 0])
    assert found.auc == pytest.approx(area, rel=1e-5)


@pytest.mark.parametrize("rows", [9, 40])
def test_r2_agrees_with_scikit_learn_far_from_zero(rows):
    rng = np.random.default_rng(rows)
    inputs = rng.normal(size=(rows, 4)).astype(np.float32)
    targets = (1000 + inputs[:, :3] + 0.3 * rng.normal(size=(rows, 3))).astype(
        np.float32
    )

    class Shifted(Net):
        def __call__(self, x):
            return 1000 + x[:, :3] + 0 * self.layer(x)

    loss = lepton.losses.squared_error
    metrics = {"r2": lepton.metrics.r2}
    trainer = make(
        model=Shifted,
        loss=loss,
        train=(inputs, targets),
        metrics=metrics,
    )
    found = trainer.evaluate((inputs, targets)).r2
    predicted = trainer.predict(inputs)
    assert found == pytest.approx(
        sklearn.metrics.r2_score(targets, predicted), rel=1e-4
    )


def test_f1_of_two_classes_by_argmax_and_of_classes_that_do_not_occur():
    logits = np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 2, 50)
    for scores, classes in (
        (logits, "binary"),
        (np.pad(logits, ((0, 0), (0, 3))), "macro"),
    ):
        means = {
            k: v.mean(0) for k, v in lepton.metrics.f1.values(scores, labels).items()
        }
        expected = sklearn.metrics.f1_score(
            labels,
            scores.argmax(1),
            average=classes,
        )
        assert float(lepton.metrics.f1.finish(means)) == pytest.approx(
            expected, rel=1e-5
        )


def test_several_sums_are_recorded_over_all_micro_batches():
    def moments(outputs, targets):
        return {"square": jnp.square(outputs), "plain": outputs}

    spread = Metric(moments, lambda m: (m["square"] - m["plain"] ** 2).mean())
    pair = Metric(
        lambda o, t: (o[:, 0], o[:, 1], t),
        lambda m: m[0] + m[1] * m[2],
    )
    metrics = {
        "spread": spread,
        "pair": pair,
        "f1": lepton.metrics.f1,
    }
    whole = make(
        metrics=metrics,
        shuffle=False,
        steps_per_call=1,
    )
    parts = make(
        metrics=metrics,
        shuffle=False,
        micro_batches=4,
        steps_per_call=2,
    )
    outputs = whole.predict(X[:BATCH], decode=raw)
    history = whole.fit(steps=3)
    other = parts.fit(steps=3)
    assert history["spread"][0] == pytest.approx(outputs.var(0).mean(), rel=1e-4)
    means = outputs.mean(0)
    product = means[0] + means[1] * Y[:BATCH].mean()
    assert history["pair"][0] == pytest.approx(product, rel=1e-4)
    for name in ("loss", *metrics):
        np.testing.assert_allclose(
            other[name],
            history[name],
            rtol=1e-4,
            err_msg=name,
        )


@pytest.mark.parametrize("rows", [5, 16, 40])
def test_several_sums_count_each_sample_once_in_an_evaluation(rows):
    spread = Metric(
        lambda o, t: {"square": jnp.square(o), "plain": o},
        lambda m: (m["square"] - m["plain"] ** 2).mean(),
    )
    trainer = make(8, metrics={"spread": spread})
    outputs = trainer.predict(X[:rows], decode=raw)
    found = trainer.evaluate((X[:rows], Y[:rows])).spread
    assert found == pytest.approx(outputs.var(0).mean(), rel=1e-4)


def test_a_metric_of_the_whole_set_that_does_not_fit_is_refused_before_it_begins(
    monkeypatch,
):
    from lepton_jax.planner.program import evaluation as evaluating

    monkeypatch.setattr(evaluating, "MOST_GATHERED", 40 * 16 - 1)
    with pytest.raises(
        lepton.DataError, match=r"'f1' is no mean over samples.* all 40"
    ):
        make(metrics={"f1": scalar_f1}).evaluate((X, Y))
    monkeypatch.setattr(
        evaluating,
        "MOST_GATHERED",
        40 * 16 + 8 * 16,
    )
    make(metrics={"f1": scalar_f1}).evaluate((X, Y))


# ---- predictions ----


@pytest.mark.parametrize(
    ("rows", "devices"),
    [
        (1, 1),
        (16, 8),
        (40, 1),
        (40, 8),
    ],
)
def test_outputs_are_joined_along_the_dim_that_holds_the_batch(rows, devices):
    trainer = make(
        devices,
        model=Several,
        loss=lambda o, t: cross_entropy(o["logits"], t),
    )
    found = trainer.predict(X[:rows])
    kernel, bias = (
        np.asarray(trainer.state.params["layer"][k]) for k in ("kernel", "bias")
    )
    logits = X[:rows] @ kernel + bias
    np.testing.assert_allclose(
        found["logits"],
        logits,
        atol=1e-5,
    )
    np.testing.assert_allclose(
        found["weights"],
        [logits, 2 * logits],
        atol=1e-5,
    )


def test_a_batch_dim_may_be_last_or_hold_several_rows_of_a_sample():
    trainer = make()
    logits = trainer.predict(X, decode=raw)
    np.testing.assert_allclose(
        trainer.predict(X, decode=lambda o: o.T),
        logits.T,
        rtol=1e-6,
    )
    flat = trainer.predict(
        X,
        decode=lambda o: o.reshape(-1),
    )
    np.testing.assert_allclose(
        flat,
        logits.reshape(-1),
        rtol=1e-6,
    )


def test_what_has_no_batch_dim_is_returned_where_one_batch_holds_all():
    trainer = make()
    logits = trainer.predict(X[:9], decode=raw)
    total = trainer.predict(
        X[:9],
        decode=lambda o: {"all": o, "mean": o.mean()},
    )
    assert total["mean"] == pytest.approx(logits.mean(), rel=1e-5)
    np.testing.assert_allclose(
        trainer.predict(
            X[:9],
            decode=lambda o: o @ o.T,
        ),
        logits @ logits.T,
        rtol=1e-4,
    )
    for decode, path in (
        (lambda o: {"all": o, "mean": o.mean()}, "mean"),
        (lambda o: [o, o @ o.T], "1"),
        (lambda o: {"table": jnp.arange(3)}, "table"),
        (lambda o: (o - o.mean(0)).T.reshape(-1), "of the model"),
    ):
        with pytest.raises(
            lepton.ModelError, match=f"the prediction {path}.*40 inputs"
        ):
            trainer.predict(X, decode=decode)


def test_a_decode_over_the_batch_sees_its_own_batch_alone():
    trainer = make()
    logits = trainer.predict(X, decode=raw)
    centred = [
        logits[a:b] - logits[a:b].mean(0) for a, b in ((0, 16), (16, 32), (32, 40))
    ]
    found = trainer.predict(
        X,
        decode=lambda o: o - o.mean(0),
    )
    np.testing.assert_allclose(
        found,
        np.concatenate(centred),
        atol=1e-5,
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_predict_does_not_turn_nan_into_a_class(devices):
    trainer = make(devices)
    inputs = X[:20].copy()
    inputs[[17, 19]] = np.nan
    with pytest.raises(
        lepton.DataError, match=r"2 of 20 inputs(.|\n)*rows 17, 19"
    ) as caught:
        trainer.predict(inputs)
    assert "decode=lambda outputs: outputs" in caught.value.remedy
    shown = trainer.predict(inputs, decode=raw)
    assert np.flatnonzero(np.isnan(shown).any(1)).tolist() == [17, 19]


def test_nan_is_looked_for_where_it_would_be_hidden_and_nowhere_else():
    trainer = make(
        model=Several,
        loss=lambda o, t: cross_entropy(o["logits"], t),
    )
    inputs = X[:20].copy()
    inputs[3] = np.nan
    with pytest.raises(lepton.DataError, match="rows 3"):
        trainer.predict(
            inputs,
            decode=lambda o: {"label": o["weights"][0].argmax(-1)},
        )
    # the logits show it
    both = trainer.predict(
        inputs,
        decode=lambda o: {"label": o["logits"].argmax(-1), "logits": o["logits"]},
    )
    assert np.isnan(both["logits"][3]).all()
    # outputs that the labels are not made of
    labels = trainer.predict(
        inputs,
        decode=lambda o: jnp.arange(o["logits"].shape[0]),
    )
    assert labels.shape == (20,)
    # a row of NaN that only fills the last batch is the first one
    inputs = X.copy()
    trainer.predict(inputs)

"""Mistakes made in a notebook: rows for `test_bad_inputs.py`."""

from __future__ import annotations

from functools import cache, partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from bad_inputs import Bad, write
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    LeptonError,
    ModelError,
    NoCheckpointError,
    PlanError,
    RecipeError,
)
from lepton_jax.losses import binary_cross_entropy, cross_entropy, huber, squared_error

X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = np.arange(16, dtype=np.int32) % 3


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, outputs: int = 3):
        self.layer = nnx.Linear(4, outputs, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)


class Printing(Net):
    def __call__(self, x):
        jax.debug.print("{}", x.mean(), ordered=True)
        return self.layer(x)


class Creating(Net):
    def __call__(self, x):
        self.seen = nnx.BatchStat(x.mean())
        return self.layer(x)


class Growing(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.last = nnx.Variable(jnp.zeros(3))

    def __call__(self, x):
        self.last.set_value(self.layer(x))
        return self.last.get_value()


class Counting(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.count = nnx.Param(jnp.int32(3))


class Hollow(Net):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.hollow = nnx.Param(jnp.zeros((0, 3)))


class Empty(nnx.Module):
    def __call__(self, x):
        return x


class EmptyLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return x


class Silent(Net):
    def __call__(self, x):
        self.layer(x)


class Total(Net):
    def __call__(self, x):
        return self.layer(x).sum()


class Choosing(Net):
    def __call__(self, x):
        return self.layer(x).argmax(-1)


class Greedy(Net):
    def __call__(self, x, mask):
        return self.layer(x * mask)


class Branching(Net):
    def __call__(self, x):
        return self.layer(x) if x.mean() > 0 else x


class Uncallable(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 3, rngs=rngs)


class ByName(Net):
    def __call__(self, *, image):
        return self.layer(image)


class ByNames(Net):
    def __call__(self, *, image, mask):
        return self.layer(image * mask)


class Cached(linen.Module):
    @linen.compact
    def __call__(self, x, cache, deterministic=True):
        return linen.Dense(3)(x + cache)


class RequiringFlag(Net):
    def __call__(self, x, causal: bool):
        return self.layer(x)


class Ambiguous(linen.Module):
    """One value draws, the other one writes."""

    @linen.compact
    def __call__(self, x, phase=True):
        x = linen.BatchNorm(use_running_average=phase)(x)
        return linen.Dense(3)(linen.Dropout(0.5, deterministic=not phase)(x))


class Sower(linen.Module):
    @linen.compact
    def __call__(self, x):
        self.sow("losses", "size", jnp.square(x).mean())
        return linen.Dense(3)(x)


class Pair(Net):
    def __call__(self, x):
        return self.layer(x), x


class Looking(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(2, 3, rngs=rngs)

    def __call__(self, x):
        return self.table(x[:, 0])


class Refusing:
    """A container of another library, such as a tensor that needs a gradient."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach() first")


def looking() -> lepton.Trainer:
    return trainer(model=Looking, train=(Y[:, None] % 2, Y))


def trainer(*recipes, run_dir=None, devices=1, **changes) -> lepton.Trainer:
    fields = (
        {
            "model": Net,
            "loss": cross_entropy,
            "optimizer": optax.adam,
            "learning_rate": 0.1,
            "train": (X, Y),
            "batch_size": 8,
            "steps": 2,
        }
        if not recipes
        else {}
    )
    return lepton.Trainer(
        *recipes, run_dir=run_dir, devices=devices, **fields | changes
    )


def fit(**changes):
    """Return what provokes the row: a fit with these fields."""
    return lambda folder: trainer(**changes).fit()


@cache
def ready() -> lepton.Trainer:
    trained = trainer()
    trained.fit()
    return trained


def settled(act):
    """Return what provokes the row: an act on a trained model, and on a folder."""
    return lambda folder: act(ready(), folder)


def elements(*pairs):
    return grain.MapDataset.source(list(pairs) or list(zip(X, Y, strict=True)))


def spoiled(x, index, value):
    x = x.copy()
    x[index] = value
    return x


HERE = "bad_notebooks.py:"
REGRESSION = {"model": partial(Net, outputs=1), "train": (X, Y.astype(np.float32))}

RECIPES = [
    Bad(
        "trainer-without-fields",
        lambda _: lepton.Trainer(model=Net),
        RecipeError,
        place="Trainer",
        remedy="optimizer=...",
        what="loss and optimizer not given",
    ),
    Bad(
        "trainer-of-a-path",
        lambda _: trainer("recipes/digits_cnn.py"),
        RecipeError,
        place="Trainer",
        remedy="Recipe",
        what="a str",
    ),
    Bad(
        "trainer-of-a-model",
        lambda _: trainer(Net),
        RecipeError,
        place="Trainer",
        remedy="model=",
        what="rngs",
    ),
    Bad(
        "trainer-of-a-failing-recipe",
        lambda _: trainer(lambda: 1 // 0),
        RecipeError,
        place=HERE,
        remedy="Recipe",
        what="ZeroDivisionError",
    ),
    Bad(
        "trainer-of-a-function-of-3",
        lambda _: trainer(lambda: 3),
        RecipeError,
        place="Trainer",
        remedy="Recipe",
        what="int",
    ),
    Bad(
        "field-unknown",
        fit(batchsize=8),
        RecipeError,
        place="Recipe",
        remedy="batch_size",
        what="did you mean 'batch_size'",
    ),
    Bad(
        "metric-named-loss",
        fit(metrics={"loss": cross_entropy}),
        RecipeError,
        place="Recipe.metrics",
        remedy="something else",
        what="'loss'",
    ),
    Bad(
        "metric-not-callable",
        fit(metrics={"a": 3}),
        RecipeError,
        place="Recipe.metrics",
        remedy="a function",
        what="'a' is 3",
    ),
    Bad(
        "metric-name-not-a-string",
        fit(metrics={1: cross_entropy}),
        RecipeError,
        place="Recipe.metrics",
        remedy="a name",
        what="metric 1",
    ),
    Bad(
        "metrics-as-list",
        fit(metrics=["accuracy"]),
        RecipeError,
        place="Recipe.metrics",
        remedy="a dict",
        what="list",
    ),
    Bad(
        "best-names-no-metric",
        fit(metrics={"accuracy": lepton.metrics.accuracy}, best="acuracy"),
        RecipeError,
        place="Recipe.best",
        remedy="accuracy, loss",
        what="did you mean 'accuracy'",
    ),
    Bad(
        "best-not-a-string",
        fit(best=3),
        RecipeError,
        place="Recipe.best",
        remedy="loss",
        what="3",
    ),
    Bad(
        "best-without-test-data",
        fit(best="-loss"),
        RecipeError,
        place="Recipe.best",
        remedy="set Recipe.test",
        what="'-loss'",
    ),
    Bad(
        "loss-not-callable",
        fit(loss="mse"),
        RecipeError,
        place="Recipe.loss",
        remedy="a function",
        what="'mse'",
    ),
    Bad(
        "model-not-callable",
        fit(model=3),
        RecipeError,
        place="Recipe.model",
        remedy="its factory",
        what="3",
    ),
    Bad(
        "preprocess-not-callable",
        fit(preprocess=3),
        RecipeError,
        place="Recipe.preprocess",
        remedy="a function",
        what="3",
    ),
    Bad(
        "decode-not-callable",
        fit(decode=3),
        RecipeError,
        place="Recipe.decode",
        remedy="a function",
        what="3",
    ),
    Bad(
        "controller-not-of-policies",
        fit(controller=(3,)),
        RecipeError,
        place="Recipe.controller",
        remedy="Policy",
        what="3",
    ),
    Bad(
        "batch-size-with-fraction",
        fit(batch_size=8.0),
        RecipeError,
        place="Recipe.batch_size",
        remedy="1 or more",
        what="8.0",
    ),
    Bad(
        "keep-none",
        fit(keep=0),
        RecipeError,
        place="Recipe.keep",
        remedy="1 or more",
        what="0",
    ),
    Bad(
        "clip-norm-negative",
        fit(clip_norm=-1.0),
        RecipeError,
        place="Recipe.clip_norm",
        remedy="positive",
        what="-1.0",
    ),
    Bad(
        "seed-as-text",
        fit(seed="0"),
        RecipeError,
        place="Recipe.seed",
        remedy="seed=0",
        what="'0'",
    ),
    Bad(
        "optimizer-not-optax",
        fit(optimizer="adam"),
        RecipeError,
        place="Recipe.optimizer",
        remedy="optax.adamw",
        what="str",
    ),
    Bad(
        "optimizer-returns-no-optax",
        fit(optimizer=lambda rate: rate),
        RecipeError,
        place="Recipe.optimizer",
        remedy="optax.adamw",
        what="float",
    ),
    Bad(
        "optimizer-fails",
        fit(optimizer=lambda rate: 1 // 0),
        RecipeError,
        place=HERE,
        remedy="learning rate",
        what="ZeroDivisionError",
    ),
    Bad(
        "optimizer-wants-more",
        fit(optimizer=lambda rate, momentum: rate),
        RecipeError,
        place="Recipe.optimizer",
        remedy="learning rate",
        what="momentum",
    ),
    Bad(
        "optimizer-wants-a-line-search",
        fit(optimizer=optax.lbfgs),
        RecipeError,
        place="Recipe.optimizer",
        remedy="without a line search",
        what="value_fn",
    ),
    Bad(
        "learning-rate-not-given",
        fit(learning_rate=None),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="set learning_rate",
    ),
    Bad(
        "learning-rate-given-twice",
        fit(optimizer=optax.adam(0.1)),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="optimizer=optax.",
    ),
    Bad(
        "learning-rate-as-text",
        fit(learning_rate="0.1"),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="1e-3",
        what="'0.1'",
    ),
    Bad(
        "schedule-returns-nothing",
        fit(learning_rate=lambda step: None),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="one number",
        what="None",
    ),
    Bad(
        "schedule-returns-a-vector",
        fit(learning_rate=lambda step: jnp.ones(2)),
        RecipeError,
        place="Recipe.learning_rate",
        remedy="one number",
        what="float32[2]",
    ),
    Bad(
        "schedule-fails",
        fit(learning_rate=lambda step: {}[0]),
        RecipeError,
        place=HERE,
        remedy="function of the step",
        what="KeyError",
    ),
    Bad(
        "no-budget-in-fit",
        fit(steps=None),
        RecipeError,
        place="Recipe.steps",
        remedy="epochs=...",
        what="no budget",
    ),
    Bad(
        "fit-of-no-steps",
        lambda _: trainer().fit(steps=0),
        RecipeError,
        place="Recipe.steps",
        remedy="1 or more",
        what="0",
    ),
    Bad(
        "fit-of-negative-epochs",
        lambda _: trainer().fit(epochs=-1),
        RecipeError,
        place="Recipe.epochs",
        remedy="positive",
        what="-1",
    ),
    Bad(
        "fit-of-too-many-steps",
        lambda _: trainer().fit(steps=10**30),
        RecipeError,
        place="Recipe.steps",
        remedy="at most",
        what="1000000",
    ),
    Bad(
        "fit-of-too-many-epochs",
        lambda _: trainer().fit(epochs=1e300),
        RecipeError,
        place="Recipe.steps",
        remedy="at most",
        what="steps",
    ),
    Bad(
        "fit-of-batches-of-none",
        lambda _: trainer().fit(batch_size=0),
        RecipeError,
        place="Recipe.batch_size",
        remedy="1 or more",
        what="0",
    ),
    Bad(
        "devices-more-than-live",
        fit(devices=9),
        PlanError,
        place="platform cpu",
        remedy="fewer",
        what="9 devices",
    ),
    Bad(
        "devices-as-text",
        fit(devices="2"),
        PlanError,
        place="devices",
        remedy="whole number",
        what="'2'",
    ),
    Bad(
        "topology-unknown",
        lambda _: trainer().plan("h20:8"),
        PlanError,
        place="h20:8",
        remedy="the catalogue has",
        what="did you mean 'h200'",
    ),
    Bad(
        "topology-malformed",
        lambda _: trainer().plan("v5p:4x"),
        PlanError,
        place="v5p:4x",
        remedy="v5p:4x4x4",
        what="form",
    ),
    Bad(
        "topology-of-none",
        lambda _: lepton.topology("cpu:0"),
        PlanError,
        place="cpu:0",
        remedy="cpu:8",
        what="form",
    ),
    Bad(
        "topology-is-a-number",
        lambda _: trainer().plan(8),
        PlanError,
        place="Trainer.plan",
        remedy="h200:8",
        what="8",
    ),
    Bad(
        "plan-is-no-plan",
        lambda _: lepton.Plan.from_json('{"topology": 3}'),
        PlanError,
        place="plan.json",
        remedy="plan anew",
    ),
    Bad(
        "labels-unknown",
        fit(optimizer=lambda r: optax.partition({"a": optax.adam(r)}, {"layer": "b"})),
        RecipeError,
        place="Recipe.optimizer",
        remedy="layer/kernel",
        what="['b']",
    ),
    Bad(
        "labels-for-another-model",
        fit(
            optimizer=lambda r: optax.partition({"a": optax.adam(r)}, {"encoder": "a"})
        ),
        RecipeError,
        place="Recipe.optimizer",
        remedy="layer/kernel",
        what="encoder",
    ),
    Bad(
        "mask-for-another-model",
        fit(optimizer=lambda r: optax.adamw(r, mask={"params": True})),
        RecipeError,
        place="Recipe.optimizer",
        remedy="layer/bias, layer/kernel",
        what="params",
    ),
    Bad(
        "mask-of-a-missing-name",
        fit(optimizer=lambda r: optax.adamw(r, mask=lambda p: {"layer": p["encoder"]})),
        RecipeError,
        place=HERE,
        remedy="layer/kernel",
        what="KeyError: 'encoder'",
    ),
    Bad(
        "mask-of-nothing",
        fit(
            optimizer=optax.adamw(
                0.1, mask={"layer": {"bias": False, "kernel": False}}
            ),
            learning_rate=None,
        ),
        RecipeError,
        place="Recipe.optimizer",
        remedy="layer/kernel",
        what="matches no parameter",
    ),
    Bad(
        "mask-by-values",
        fit(
            optimizer=lambda r: optax.adamw(
                r, mask=lambda p: {"layer": bool(p["layer"]["bias"].any())}
            )
        ),
        RecipeError,
        place=HERE,
        remedy="names, shapes or dtypes",
        what="values",
    ),
    Bad(
        "optimizer-wants-a-hessian",
        fit(optimizer=optax.contrib.sophia),
        RecipeError,
        place="Recipe.optimizer",
        remedy="second-order",
        what="obj_fn",
    ),
    Bad(
        "optimizer-wants-each-gradient",
        fit(
            optimizer=lambda r: optax.chain(
                optax.contrib.differentially_private_aggregate(1.0, 1.0, key=0),
                optax.sgd(r),
            )
        ),
        RecipeError,
        place="Recipe.optimizer",
        remedy="leave out",
        what="gradient of each sample",
    ),
    Bad(
        "optimizer-wants-a-gradient-function",
        fit(
            optimizer=lambda r: optax.contrib.sam(
                optax.sgd(r), optax.sgd(0.1), opaque_mode=True
            )
        ),
        RecipeError,
        place="Recipe.optimizer",
        remedy="e.g. optimizer=",
        what="grad_fn",
    ),
    Bad(
        "schedule-as-a-number",
        fit(
            optimizer=lambda r: optax.sgd(float(r)),
            learning_rate=optax.linear_schedule(0.1, 0, 9),
        ),
        RecipeError,
        place=HERE,
        remedy="scale_by_learning_rate",
        what="looks at it as at a number",
    ),
    Bad(
        "schedule-as-a-number-in-a-wrapper",
        fit(
            optimizer=lambda r: optax.apply_if_finite(
                optax.chain(optax.scale_by_adam(), optax.scale(-r)), 3
            ),
            learning_rate=optax.linear_schedule(0.1, 0, 9),
        ),
        RecipeError,
        place="Recipe.optimizer",
        remedy="scale_by_learning_rate",
        what="wrapper",
    ),
    Bad(
        "policy-moves-a-finished-schedule-free",
        fit(
            optimizer=optax.contrib.schedule_free_sgd(0.1),
            learning_rate=None,
            controller=lepton.controllers.warmup(),
        ),
        RecipeError,
        place="Recipe.optimizer",
        remedy="with Recipe.learning_rate",
        what="ScheduleFree",
    ),
    Bad(
        "evaluate-params-not-callable",
        fit(evaluate_params=3),
        RecipeError,
        place="Recipe.evaluate_params",
        remedy="a function",
        what="3",
    ),
    Bad(
        "evaluate-params-fails",
        fit(evaluate_params=lambda state, params: 1 // 0),
        RecipeError,
        place=HERE,
        remedy="-> params",
        what="ZeroDivisionError",
    ),
    Bad(
        "evaluate-params-returns-a-part",
        fit(
            evaluate_params=lambda state, params: {
                "layer": {"bias": params["layer"]["bias"]}
            }
        ),
        RecipeError,
        place="Recipe.evaluate_params",
        remedy="-> params",
        what="'layer/kernel'",
    ),
    Bad(
        "evaluate-params-of-another-shape",
        fit(
            evaluate_params=lambda state, params: {
                "layer": {name: x.sum() for name, x in params["layer"].items()}
            }
        ),
        RecipeError,
        place="Recipe.evaluate_params",
        remedy="-> params",
        what="returned ()",
    ),
]

DATA = [
    Bad(
        "no-training-data",
        fit(train=None),
        DataError,
        place="Trainer.fit",
        remedy="set Recipe.train",
    ),
    Bad(
        "no-test-data",
        lambda _: trainer().evaluate(),
        DataError,
        place="Trainer.evaluate",
        remedy="set Recipe.test",
    ),
    Bad(
        "lengths-differ",
        fit(train=(X, Y[:5])),
        DataError,
        place="Arrays",
        remedy="one row per sample",
        what="inputs has 16, targets has 5",
    ),
    Bad(
        "no-samples",
        fit(train=(X[:0], Y[:0])),
        DataError,
        place="Arrays",
        remedy="at least one sample",
    ),
    Bad(
        "no-targets",
        fit(train=(X, None)),
        DataError,
        place="Recipe.train",
        remedy="(inputs, targets)",
    ),
    Bad(
        "three-parts",
        fit(train=(X, Y, Y)),
        DataError,
        place="data",
        remedy="(inputs, targets)",
        what="tuple of 3",
    ),
    Bad(
        "a-generator",
        fit(train=((x, y) for x, y in zip(X, Y, strict=True))),
        DataError,
        place="data",
        remedy="(inputs, targets)",
        what="generator",
    ),
    Bad(
        "dtype-object",
        fit(train=(X.astype(object), Y)),
        DataError,
        place="inputs",
        remedy="numbers",
        what="object",
    ),
    Bad(
        "dtype-text",
        fit(train=(X, Y.astype(str))),
        DataError,
        place="targets",
        remedy="numbers",
        what="<U",
    ),
    Bad(
        "ragged-lists",
        fit(train=([[1.0, 2.0], [3.0]], [0, 1])),
        DataError,
        place="inputs",
        remedy="equal lengths",
    ),
    Bad(
        "a-single-number",
        fit(train=(3.0, Y)),
        DataError,
        place="inputs",
        remedy="one row per sample",
        what="3.0",
    ),
    Bad(
        "keys-not-strings",
        fit(train=({0: X}, Y)),
        DataError,
        place="inputs",
        remedy="by a string",
        what="[0]",
    ),
    Bad(
        "float64-out-of-range",
        fit(train=(spoiled(X.astype(np.float64), (3, 1), 1e300), Y)),
        DataError,
        place="inputs",
        remedy="scale",
        what="1e+300",
    ),
    Bad(
        "int64-out-of-range",
        fit(train=(X, spoiled(Y.astype(np.int64), 3, 2**40))),
        DataError,
        place="targets",
        remedy="map them",
        what=str(2**40),
    ),
    Bad(
        "labels-out-of-range",
        fit(train=(X, Y + 1)),
        DataError,
        place="first in sample 2: 3",
        remedy="more outputs",
        what="outside 0 to 2",
    ),
    Bad(
        "labels-negative",
        fit(train=(X, Y - 1)),
        DataError,
        place="first in sample 0: -1",
        remedy="fix the labels",
        what="6 samples",
    ),
    Bad(
        "test-labels-out-of-range",
        fit(test=(X, Y + 1)),
        DataError,
        place="test data",
        remedy="fix the labels",
    ),
    Bad(
        "labels-as-floats",
        fit(train=(X, Y.astype(np.float32))),
        ModelError,
        place="softmax_cross_entropy",
        remedy="give targets",
        what="targets float32[8]",
    ),
    Bad(
        "labels-one-hot",
        fit(train=(X, np.eye(3, dtype=np.int32)[Y])),
        ModelError,
        place="softmax_cross_entropy",
        remedy="give targets",
        what="targets int32[8, 3]",
    ),
    Bad(
        "targets-crossed-squared",
        fit(loss=squared_error, **REGRESSION),
        ModelError,
        place="squared_error",
        remedy="give targets",
        what="outputs float32[8, 1] and targets float32[8]",
    ),
    Bad(
        "targets-crossed-binary",
        fit(loss=binary_cross_entropy, **REGRESSION),
        ModelError,
        place="sigmoid",
        remedy="pass y[:, None]",
        what="(8, 8)",
    ),
    Bad(
        "targets-crossed-huber",
        fit(loss=huber, **REGRESSION),
        ModelError,
        place="huber",
        remedy="pass y[:, None]",
        what="(8, 8)",
    ),
    Bad(
        "targets-crossed-by-hand",
        fit(loss=lambda o, t: (o - t) ** 2, **REGRESSION),
        ModelError,
        place=HERE,
        remedy="pass y[:, None]",
        what="(8, 8)",
    ),
    Bad(
        "targets-crossed-in-a-metric",
        fit(
            loss=lambda o, t: (o[:, 0] - t) ** 2,
            metrics={"gap": lambda o, t: abs(o - t)},
            **REGRESSION,
        ),
        ModelError,
        place=HERE,
        remedy="pass y[:, None]",
        what="(8, 8)",
    ),
    Bad(
        "test-of-other-shape",
        fit(test=(X[:, :3], Y)),
        DataError,
        place="test data",
        remedy="trained on",
        what="float32[3]",
    ),
    Bad(
        "evaluate-other-dtype",
        settled(lambda t, _: t.evaluate((X.astype(np.int32), Y))),
        DataError,
        place="test data",
        remedy="dtypes",
        what="int32[4]; the model was traced for float32[4]",
    ),
    Bad(
        "evaluate-without-targets",
        settled(lambda t, _: t.evaluate(lepton.data.Arrays(X))),
        DataError,
        place="test data",
        remedy="shapes",
        what="absent",
    ),
    Bad(
        "predict-other-shape",
        settled(lambda t, _: t.predict(X[:, :3])),
        DataError,
        place="inputs",
        remedy="shapes",
        what="float32[3]",
    ),
    Bad(
        "predict-one-sample",
        settled(lambda t, _: t.predict(X[0])),
        DataError,
        place="inputs",
        remedy="shapes",
        what="float32[]",
    ),
    Bad(
        "predict-nothing",
        settled(lambda t, _: t.predict(X[:0])),
        DataError,
        place="Arrays",
        remedy="at least one sample",
    ),
    Bad(
        "predict-by-name",
        settled(lambda t, _: t.predict({"x": X})),
        DataError,
        place="inputs",
        remedy="shapes",
        what="x float32[4]; the model was traced for float32[4]",
    ),
    Bad(
        "predict-before-all",
        lambda _: trainer(train=None).predict(X),
        DataError,
        place="Trainer",
        remedy="call fit or load",
        what="not known",
    ),
    Bad(
        "grain-of-no-pairs",
        fit(train=elements(*X)),
        DataError,
        place="Recipe.train",
        remedy="a pair (inputs, targets)",
        what="ndarray",
    ),
    Bad(
        "grain-of-nothing",
        fit(train=elements().slice(slice(0, 0))),
        DataError,
        place="",
        remedy="at least one sample",
        what="empty",
    ),
    Bad(
        "grain-of-ragged-elements",
        fit(train=elements((X[0], Y[0]), (X[1, :2], Y[1]))),
        DataError,
        place="Recipe.train",
        remedy="of one shape",
        what="shape",
    ),
    Bad(
        "grain-that-fails",
        fit(train=elements().map(lambda pair: (pair[0], 1 // int(1 - pair[1])))),
        DataError,
        place=HERE,
        remedy="the data set",
        what="ZeroDivisionError",
    ),
    Bad(
        "grain-iterated-dry",
        fit(train=elements().to_iter_dataset(), steps=3),
        DataError,
        place="Recipe.train",
        remedy=".repeat()",
        what="after 16 samples",
    ),
    Bad(
        "grain-iterated-empty",
        fit(train=elements().slice(slice(0, 0)).to_iter_dataset()),
        DataError,
        place="Recipe.train",
        remedy="at least one sample",
        what="empty",
    ),
    Bad(
        "grain-iterated-by-epochs",
        fit(train=elements().to_iter_dataset(), steps=None, epochs=1),
        RecipeError,
        place="Recipe.steps",
        remedy="set steps=...",
        what="length is not known",
    ),
    Bad(
        "grain-iterated-as-test",
        fit(test=elements().to_iter_dataset()),
        DataError,
        place="test data",
        remedy="grain.MapDataset",
        what="no end",
    ),
    Bad(
        "number-not-finite",
        fit(train=(spoiled(X, (5, 2), np.nan), Y)),
        DivergedError,
        place="1 samples, first in 5",
        remedy="leave out these samples",
        what="is nan",
    ),
    Bad(
        "target-not-finite",
        fit(
            train=(X, spoiled(np.ones((16, 1), np.float32), 3, np.inf)),
            loss=squared_error,
            model=partial(Net, outputs=1),
        ),
        DivergedError,
        place="first in 3",
        remedy="leave out these",
        what="is inf",
    ),
    Bad(
        "events-missing",
        lambda folder: lepton.monitor.read_events(folder),
        DataError,
        place="events.jsonl",
        remedy="name a run folder",
    ),
    Bad(
        "schema-is-no-schema",
        lambda _: lepton.data.Schema.from_json("[]"),
        DataError,
        place="Schema",
        remedy="to_json",
    ),
    Bad(
        "labels-negative-from-grain",
        fit(train=elements(*zip(X, Y - 2, strict=True)), shuffle=False),
        DataError,
        place="first in sample 0: -2",
        remedy="fix the labels",
        what="outside 0 to 2",
    ),
    Bad(
        "labels-negative-from-a-source",
        fit(train=lepton.data.Source((X, Y - 1))),
        DataError,
        place="first in sample data:0:",
        remedy="values, labels >= 0",
        what="outside 0 to 2",
    ),
    Bad(
        "labels-out-of-range-in-a-loss-of-ones-own",
        fit(loss=lambda o, t: 0.5 * cross_entropy(o, t), train=(X, Y - 1)),
        DataError,
        place="training data, first in sample 0: -1",
        remedy="fix the labels",
        what="3 classes",
    ),
    Bad(
        "labels-beyond-one-hot",
        fit(
            loss=lambda o, t: -(jax.nn.one_hot(t, 3) * jax.nn.log_softmax(o)).sum(-1),
            train=(X, Y + 1),
        ),
        DataError,
        place="first in sample 2: 3",
        remedy="more outputs",
        what="below 3",
    ),
    Bad(
        "ids-beyond-the-table",
        fit(model=Looking, train=(Y[:, None], Y)),
        DataError,
        place="first in sample 2: 2",
        remedy="give 'table/embedding' more rows",
        what="which has 2 rows",
    ),
    Bad(
        "ids-beyond-the-table-in-predict",
        lambda _: looking().predict(Y[:, None]),
        DataError,
        place="inputs, first in sample 2: 2",
        remedy="more rows",
        what="5 samples have inputs outside 0 to 1",
    ),
    Bad(
        "predict-hides-nan",
        settled(lambda t, _: t.predict(spoiled(X, (11, 0), np.nan))),
        DataError,
        place="inputs, rows 11",
        remedy="decode=lambda outputs: outputs",
        what="1 of 16 inputs",
    ),
    Bad(
        "evaluate-without-weight",
        lambda _: trainer(loss=lambda o, t: (cross_entropy(o, t), t > 0)).evaluate(
            (X, 0 * Y)
        ),
        DataError,
        place="evaluation",
        remedy="samples that count",
        what="nothing in the test data has weight",
    ),
    Bad(
        "container-that-refuses",
        fit(train=(Refusing(), Y)),
        DataError,
        place="inputs",
        remedy="x.detach().cpu().numpy()",
        what="RuntimeError: call detach() first",
    ),
]

MODELS = [
    Bad(
        "factory-fails",
        fit(model=lambda rngs: 1 // 0),
        ModelError,
        place=HERE,
        remedy="return a Flax module",
        what="ZeroDivisionError",
    ),
    Bad(
        "factory-returns-nothing",
        fit(model=lambda rngs: None),
        ModelError,
        place="Recipe.model",
        remedy="flax.nnx.Module",
        what="NoneType",
    ),
    Bad(
        "factory-returns-a-class",
        fit(model=lambda: Net),
        ModelError,
        place="Recipe.model",
        remedy="flax.nnx.Module",
    ),
    Bad(
        "factory-wants-more",
        fit(model=nnx.Linear),
        ModelError,
        place="Recipe.model",
        remedy="take rngs, or nothing",
        what="in_features",
    ),
    Bad(
        "model-without-parameters",
        fit(model=Empty),
        ModelError,
        place="Empty",
        remedy="nnx.Param",
        what="no parameters",
    ),
    Bad(
        "linen-without-parameters",
        fit(model=EmptyLinen()),
        ModelError,
        place="EmptyLinen",
        remedy="nnx.Param",
        what="no parameters",
    ),
    Bad(
        "parameter-that-is-empty",
        fit(model=Hollow),
        ModelError,
        place="Hollow",
        remedy="at least 1",
        what="'hollow' has shape (0, 3)",
    ),
    Bad(
        "model-of-no-width",
        fit(model=partial(Net, outputs=0)),
        ModelError,
        place="",
        remedy="at least 1",
    ),
    Bad(
        "parameter-of-integers",
        fit(model=Counting),
        ModelError,
        place="Counting",
        remedy="floating-point",
        what="'count' is int32",
    ),
    Bad(
        "variable-created-at-call",
        fit(model=Creating),
        ModelError,
        place="Creating",
        remedy="in __init__",
        what="'seen'",
    ),
    Bad(
        "variable-changes-shape",
        fit(model=Growing),
        ModelError,
        place="Growing",
        remedy="keep shape",
        what="float32[3] to float32[8, 3]",
    ),
    Bad(
        "model-returns-nothing",
        fit(model=Silent),
        ModelError,
        place="Silent.__call__",
        remedy="return the outputs",
        what="None",
    ),
    Bad(
        "model-returns-a-scalar",
        fit(model=Total),
        ModelError,
        place="Total.__call__",
        remedy="batch dim first",
        what="float32[]",
    ),
    Bad(
        "model-returns-labels",
        fit(model=Choosing),
        ModelError,
        place="Recipe.model",
        remedy="logits",
        what="int32[8]",
    ),
    Bad(
        "model-wants-more",
        fit(model=Greedy),
        ModelError,
        place="Greedy.__call__",
        remedy='{"x": ..., "mask": ...}',
        what="requires 'mask'",
    ),
    Bad(
        "model-not-callable-on-data",
        fit(model=Uncallable),
        ModelError,
        place="Uncallable.__call__",
        remedy="one array",
        what="__call__",
    ),
    Bad(
        "model-takes-other-names",
        fit(train=({"image": X}, Y)),
        ModelError,
        place="Net.__call__",
        remedy="by name",
        what="image float32[8, 4]",
    ),
    Bad(
        "model-branches-on-values",
        fit(model=Branching),
        ModelError,
        place=HERE,
        remedy="one array",
        what="bool",
    ),
    Bad(
        "model-of-other-width",
        fit(train=(X[:, :3], Y)),
        ModelError,
        place=HERE,
        remedy="one array",
        what="float32[8, 3]",
    ),
    Bad(
        "loss-fails",
        fit(loss=lambda o, t: o @ t),
        ModelError,
        place=HERE,
        remedy="give targets",
        what="outputs float32[8, 3]",
    ),
    Bad(
        "loss-wants-more",
        fit(loss=lambda o, t, weights: o),
        ModelError,
        place=HERE,
        remedy="give targets",
        what="weights",
    ),
    Bad(
        "loss-of-fewer-samples",
        fit(loss=lambda o, t: cross_entropy(o, t)[:3]),
        ModelError,
        place=HERE,
        remedy="one value per sample",
        what="(3,) for a batch of 8",
    ),
    Bad(
        "loss-returns-nothing",
        fit(loss=lambda o, t: None),
        ModelError,
        place=HERE,
        remedy="real numbers",
        what="NoneType",
    ),
    Bad(
        "loss-returns-a-dict",
        fit(loss=lambda o, t: {"loss": o}),
        ModelError,
        place=HERE,
        remedy="real numbers",
        what="dict",
    ),
    Bad(
        "loss-returns-three",
        fit(loss=lambda o, t: (o, o, o)),
        ModelError,
        place=HERE,
        remedy="real numbers",
        what="float32[8, 3]",
    ),
    Bad(
        "loss-weights-of-other-shape",
        fit(loss=lambda o, t: (cross_entropy(o, t), t[:, None])),
        ModelError,
        place=HERE,
        remedy="one shape",
        what="(float32[8], int32[8, 1])",
    ),
    Bad(
        "loss-complex",
        fit(loss=lambda o, t: o.sum(-1) * 1j),
        ModelError,
        place=HERE,
        remedy="real numbers",
        what="complex64[8]",
    ),
    Bad(
        "loss-without-gradient",
        fit(loss=lambda o, t: o.argmax(-1) != t),
        ModelError,
        place=HERE,
        remedy="is a metric",
        what="bool[8]",
    ),
    Bad(
        "metric-broadcasts",
        fit(
            loss=lambda o, t: cross_entropy(o, t[:, 0]),
            train=(X, Y[:, None]),
            metrics={"accuracy": lepton.metrics.accuracy},
        ),
        ModelError,
        place="accuracy",
        remedy="give targets",
        what="targets int32[8, 1]",
    ),
    Bad(
        "metric-fails",
        fit(metrics={"a": lambda o, t: o[:, 7:].max(1)}),
        ModelError,
        place=HERE,
        remedy="give targets",
        what="outputs",
    ),
    Bad(
        "preprocess-fails",
        fit(preprocess=lambda x: x @ jnp.ones((7, 7))),
        ModelError,
        place=HERE,
        remedy="shapes",
        what="preprocess",
    ),
    Bad(
        "decode-fails",
        settled(lambda t, _: t.predict(X, decode=lambda o: o @ o)),
        ModelError,
        place=HERE,
        remedy="shapes",
        what="predicting",
    ),
    Bad(
        "model-takes-inputs-by-name",
        fit(model=ByName),
        ModelError,
        place="ByName.__call__",
        remedy='{"image": ...}',
        what="'image' by name",
    ),
    Bad(
        "model-takes-two-by-name",
        fit(model=ByNames),
        ModelError,
        place="ByNames.__call__",
        remedy='{"image": ..., "mask": ...}',
        what="'mask'",
    ),
    Bad(
        "model-lacks-a-named-input",
        fit(model=ByNames, train=({"image": X}, Y)),
        ModelError,
        place="ByNames.__call__",
        remedy='{"image": ..., "mask": ...}',
        what="requires 'mask'",
    ),
    Bad(
        "model-misspells-an-input",
        fit(model=ByNames, train=({"imag": X, "mask": X}, Y)),
        ModelError,
        place="ByNames.__call__",
        remedy="name them",
        what="did you mean 'image'",
    ),
    Bad(
        "model-requires-a-cache",
        fit(model=Cached()),
        ModelError,
        place="Cached.__call__",
        remedy="a default",
        what="requires 'cache'",
    ),
    Bad(
        "boolean-that-shows-nothing",
        fit(model=RequiringFlag),
        ModelError,
        place="RequiringFlag.__call__",
        remedy="Recipe.train_argument",
        what="'causal'",
    ),
    Bad(
        "boolean-that-is-ambiguous",
        fit(model=Ambiguous()),
        ModelError,
        place="Ambiguous.__call__",
        remedy="'not phase'",
        what="draws 1 times and writes nothing if it is True",
    ),
    Bad(
        "train-argument-misspelt",
        fit(model=RequiringFlag, train_argument="casual"),
        ModelError,
        place="RequiringFlag.__call__",
        remedy="causal",
        what="did you mean 'causal'",
    ),
    Bad(
        "train-argument-is-an-input",
        fit(train_argument="x"),
        ModelError,
        place="Net.__call__",
        remedy="leave train_argument out",
        what="'x'",
    ),
    Bad(
        "train-argument-is-no-name",
        fit(train_argument=True),
        RecipeError,
        place="Recipe.train_argument",
        remedy="not frozen",
        what="True",
    ),
    Bad(
        "train-argument-and-another-boolean",
        fit(model=RequiringFlag, train_argument=None),
        ModelError,
        place="RequiringFlag.__call__",
        remedy="give it a default",
        what="no random numbers",
    ),
    Bad(
        "auxiliary-of-nothing",
        fit(auxiliary={"losses": 1.0}),
        ModelError,
        place="Net",
        remedy="self.sow",
        what="'losses'",
    ),
    Bad(
        "auxiliary-misspelt",
        fit(model=Sower(), auxiliary={"losss": 1.0}),
        ModelError,
        place="Sower",
        remedy="losses",
        what="did you mean 'losses'",
    ),
    Bad(
        "auxiliary-as-list",
        fit(auxiliary=["losses"]),
        RecipeError,
        place="Recipe.auxiliary",
        remedy="a dict",
        what="list",
    ),
    Bad(
        "auxiliary-weight-as-text",
        fit(auxiliary={"losses": "1"}),
        RecipeError,
        place="Recipe.auxiliary",
        remedy="0.01",
        what="'1'",
    ),
    Bad(
        "outputs-in-a-tuple",
        fit(model=Pair),
        ModelError,
        place="softmax_cross_entropy",
        remedy="(outputs[0], targets)",
        what="float32[8, 3]",
    ),
    Bad(
        "metric-finishes-with-a-matrix",
        fit(
            metrics={
                "confusion": lepton.metrics.Metric(
                    lambda o, t: {"pairs": o[:, :, None] * o[:, None]},
                    lambda means: means["pairs"],
                )
            }
        ),
        ModelError,
        place=HERE,
        remedy="use predict",
        what="finish of the metric 'confusion' returned float32[3, 3]",
    ),
    Bad(
        "metric-finish-fails",
        fit(
            metrics={
                "f": lepton.metrics.Metric(
                    lambda o, t: {"a": o}, lambda means: means["b"]
                )
            }
        ),
        ModelError,
        place=HERE,
        remedy="what `values` returns",
        what="KeyError",
    ),
    Bad(
        "metric-sums-without-batch",
        fit(
            metrics={
                "f": lepton.metrics.Metric(
                    lambda o, t: {"a": o.mean(0)}, lambda means: means["a"].sum()
                )
            }
        ),
        ModelError,
        place=HERE,
        remedy="batch dim first",
        what="float32[3] as 'a' for a batch of 8",
    ),
    Bad(
        "metric-of-several-sums-that-finishes-nowhere",
        fit(metrics={"f": lambda o, t: {"a": o}}),
        ModelError,
        place=HERE,
        remedy="Metric(values, finish)",
        what="dict",
    ),
    Bad(
        "predict-what-has-no-samples",
        settled(lambda t, _: t.predict(X, decode=lambda o: {"sum": o.sum()})),
        ModelError,
        place="Trainer.predict",
        remedy="decode=lambda outputs:",
        what="the prediction sum float32[]",
    ),
    Bad(
        "predict-pairs",
        settled(lambda t, _: t.predict(X, decode=lambda o: o @ o.T)),
        ModelError,
        place="Trainer.predict",
        remedy="at most 8 inputs",
        what="dims 0 and 1 both follow",
    ),
    Bad(
        "prints-in-order-on-several-devices",
        fit(model=Printing, devices=2),
        PlanError,
        place=HERE,
        remedy="--devices 1",
        what="ordered=True can't run on 2 devices",
    ),
]

FOLDERS = [
    Bad(
        "save-nothing",
        lambda folder: trainer().save(folder / "saved"),
        CheckpointError,
        place="saved",
        remedy="call fit or load",
    ),
    Bad(
        "save-onto-a-foreign-folder",
        settled(lambda t, folder: t.save(write(folder / "notes" / "a.txt", "").parent)),
        CheckpointError,
        place="notes",
        remedy="another folder",
        what="something else",
    ),
    Bad(
        "save-onto-a-run",
        settled(
            lambda t, folder: (
                write(folder / "a" / "recipe.json", "{}")
                and t.save(write(folder / "a" / "events.jsonl", "").parent)
            )
        ),
        CheckpointError,
        place="a",
        remedy="another folder",
        what="something else",
    ),
    Bad(
        "save-onto-a-file",
        settled(lambda t, folder: t.save(write(folder / "a", ""))),
        CheckpointError,
        place="a",
        remedy="another folder",
    ),
    Bad(
        "save-below-a-file",
        settled(lambda t, folder: t.save(write(folder / "a", "") / "b")),
        CheckpointError,
        place="a/b",
        remedy="another folder",
        what="Not a directory",
    ),
    Bad(
        "load-nothing",
        lambda folder: trainer().load(folder / "saved"),
        NoCheckpointError,
        place="saved",
        remedy="folder of a run",
        what="no committed checkpoint",
    ),
    Bad(
        "load-a-file",
        lambda folder: trainer().load(write(folder / "a", "")),
        NoCheckpointError,
        place="a",
        remedy="folder of a run",
    ),
    Bad(
        "load-a-step-that-is-not-there",
        settled(lambda t, folder: t.load(t.save(folder / "a"), step=9)),
        CheckpointError,
        place="checkpoints",
        remedy="the steps 2",
        what="step 9",
    ),
    Bad(
        "load-another-model",
        settled(
            lambda t, folder: trainer(model=partial(Net, outputs=5)).load(
                t.save(folder / "a")
            )
        ),
        CheckpointError,
        place="checkpoints/2",
        remedy="model and optimizer",
        what="params/layer/kernel: the checkpoint has float32[4, 3], the model"
        " float32[4, 5]",
    ),
    Bad(
        "load-without-shapes",
        settled(
            lambda t, folder: (
                write(t.save(folder / "a") / "recipe.json", "[]")
                and trainer(train=None).load(folder / "a")
            )
        ),
        CheckpointError,
        place="a",
        remedy="folder of a run",
        what="recipe.json",
    ),
    Bad(
        "resume-without-folder",
        lambda _: trainer().resume(),
        CheckpointError,
        place="Trainer",
        remedy="run_dir",
    ),
    Bad(
        "run-folder-taken-by-a-file",
        lambda folder: trainer(run_dir=write(folder / "a", "")).fit(),
        LeptonError,
        place="a/events.jsonl",
        remedy="another run folder",
    ),
    Bad(
        "checkpoints-are-a-file",
        lambda folder: trainer(
            run_dir=write(folder / "a" / "checkpoints", "").parent
        ).fit(),
        CheckpointError,
        place="checkpoints",
        remedy="move the file away",
        what="File exists",
    ),
    Bad(
        "journal-is-a-directory",
        lambda folder: (
            (folder / "a" / "events.jsonl").mkdir(parents=True)
            or trainer(run_dir=folder / "a").fit()
        ),
        LeptonError,
        place="events.jsonl",
        remedy="another run folder",
        what="Is a directory",
    ),
    Bad(
        "journal-on-a-full-disk",
        lambda folder: (
            (folder / "events.jsonl").symlink_to("/dev/full")
            or trainer(run_dir=folder).fit()
        ),
        LeptonError,
        place="events.jsonl",
        remedy="make room",
        what="No space left",
    ),
]

NOTEBOOKS = RECIPES + DATA + MODELS + FOLDERS

"""The recipe: all that is to be trained, as a frozen dataclass of real objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from lepton_jax import losses
from lepton_jax.errors import RecipeError, nearest

PRECISIONS = ("float32", "bfloat16", "float16", "fp8", "int8")
# Steps are counted in int32 on the devices, seeds are uint32 (jax.random.key).
MOST_STEPS = 2**31 - 1
MOST_SEED = 2**32 - 1
COUNTS = (
    "batch_size",
    "micro_batches",
    "steps_per_call",
    "evaluate_every",
    "save_every",
    "log_every",
    "keep",
    "steps",
)
# Counts that are needed; the others may be None.
NEEDED_COUNTS = ("batch_size", "keep")
# Names of records, which a metric can't have.
TAKEN = ("loss", "learning_rate", "loss_scale", "step")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what a run computes.

    A sample is a pair (inputs, targets). `inputs` is an array handed to the model as
    its only argument, or a dict of arrays handed to it as keyword arguments. Batches
    carry a leading batch dim.

    Attributes:
      model: a Flax NNX factory taking `rngs` (a class will do), or a Linen module, its
        class or a factory of it.
      loss: (outputs, targets) to one value per sample: shape (batch, ...), averaged
        over all its dims; or to a pair (values, weights) for a weighted mean; or to a
        scalar that is the batch's mean already. How each is put together over a test
        set: docs/evaluation.md.
      optimizer: an Optax transformation; or a function of the learning rate that
        returns one, such as `optax.adamw`.
      learning_rate: a number or an Optax schedule, given to `optimizer` if that is a
        function. Only then can it be shown in the report. A schedule is read at the
        optimizer's own count of updates (docs/optimizers.md).
      evaluate_params: (optimizer_state, params) to the parameters to evaluate, predict
        and serve with; training goes on from its own. None: the averages of a policy
        that keeps them; of schedule-free optimizers, `optax.lookahead` and
        `optax.contrib.sam` the weights that they are for; else what is trained.
      train: samples to train on: a pair of arrays, a `lepton_jax.data.Arrays`, a Grain
        data set of pairs, or a `lepton_jax.data` mixture: sources that are filtered,
        mapped, mixed and packed (docs/data.md).
      test: samples to evaluate on, in the same forms.
      metrics: name to a function like `loss`, or to a `lepton_jax.metrics.Metric`.
        Those that a loss of several tasks implies come along (`losses.sum_of`).
      preprocess: inputs to the model's inputs, in JAX; part of every compiled program
        (e.g. uint8 pixels to floats). An `augment.Augmented` also changes samples at
        random in training.
      decode: the model's outputs to what `predict` returns. None: what the loss implies
        (`losses.decoder`).
      preparation: the way from raw rows to inputs, a `lepton_jax.data.prepare.Serving`.
        It is saved with the model, and `predict` and `evaluate` take raw rows then.
      baseline: cheap methods that the network has to beat, functions (train, test) to a
        `lepton_jax.baselines.Baseline`, or one of them. They are fitted after a
        launched run, or by `Trainer.baseline()`. None: `baselines.majority`.
      train_argument: the Boolean argument of the model's call that says that it trains,
        e.g. "active"; "not frozen" for one that is True outside of training. None: it
        has a usual name, or is found by what it does (docs/models.md).
      auxiliary: what the model sows, by collection (Linen) or type of variable (NNX),
        with the weight with which it is added to the loss in training, e.g. {"losses":
        0.01}. The training loss that is recorded holds it; an evaluation's does not.
      controller: policies that adapt the strategy to what is measured, e.g.
        `controllers.adaptive()`, or a tuple of them. Without any: plain Optax, to the
        bit.
      epochs: passes over `train`. Batches run on over an epoch's end, so that each is
        full and every sample is consumed once an epoch; the last batch of the run is
        filled up from one epoch more.
      steps: optimizer updates; if given, instead of `epochs`.
      batch_size: samples per optimizer update, over all devices.
      micro_batches: parts in which a batch passes through the model; gradients are
        summed. None: one, or as many as it takes to fit into memory.
      steps_per_call: steps that one XLA call runs. None: the plan chooses by the cost
        of a step.
      clip_norm: greatest global norm of the gradient. None: no clipping.
      precision: "float32"; "bfloat16" (float32 master weights); "float16" (the same,
        with dynamic loss scaling); "fp8" and "int8" (bfloat16, and in training the
        products of large kernels of 8 bits, forward and backward: for GPUs and TPUs
        that have them; others emulate them, see docs/scale.md).
      seed: of initial parameters, dropout and shuffling.
      shuffle: a new order of `train` for each epoch, from `seed`; False keeps the
        data's own.
      evaluate_every: steps between evaluations on `test`. None: an epoch's.
      save_every: steps between checkpoints. None: at each evaluation.
      log_every: steps between reports of the losses that the devices have finished by
        then; a report never waits for them. None: about four times a second.
      keep: how many of the latest checkpoints stay.
      best: evaluation metric by which one more checkpoint, the best, stays: "accuracy",
        or "-loss" for lowest first.
      name: of the run.
    """

    model: Any
    loss: Callable[..., Any]
    optimizer: Any
    learning_rate: float | Callable[[Any], Any] | None = None
    evaluate_params: Callable[[Any, Any], Any] | None = None
    train: Any = None
    test: Any = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Callable[[Any], Any] | None = None
    decode: Callable[[Any], Any] | None = None
    preparation: Any = None
    baseline: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    train_argument: str | None = None
    auxiliary: Mapping[str, float] = field(default_factory=dict)
    controller: tuple = ()
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 128
    micro_batches: int | None = None
    steps_per_call: int | None = None
    clip_norm: float | None = None
    precision: str = "float32"
    seed: int = 0
    shuffle: bool = True
    evaluate_every: int | None = None
    save_every: int | None = None
    log_every: int | None = None
    keep: int = 3
    best: str | None = None
    name: str = "run"

    def __post_init__(self):
        for name, value in vars(self).copy().items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())

        for name in COUNTS:
            _check_count(name, getattr(self, name))
        _check_steps(self.steps)
        for name in ("epochs", "clip_norm"):
            _check_positive(name, getattr(self, name))
        _check_rate(self.learning_rate)
        _check_precision(self.precision)
        _check_micro_batches(self.micro_batches, self.batch_size)
        _check_functions(self)
        _check_metrics(self.metrics)
        object.__setattr__(self, "metrics", _with_implied(self))
        _check_preparation(self.preparation)
        _check_baseline(self.baseline)
        _check_train_argument(self.train_argument)
        _check_auxiliary(self.auxiliary)
        _check_controller(self.controller)
        for name, kind in (("name", str), ("shuffle", bool)):
            _check_type(name, getattr(self, name), kind)
        _check_seed(self.seed)
        _check_best(self.best, self.metrics)

    def with_(self, **changes: Any) -> Recipe:
        """Return a copy with some fields changed.

        Raises:
          RecipeError: there is no such field, or a value can't be.
        """
        names = {field.name for field in fields(self)}
        for name in changes:
            if name not in names:
                raise RecipeError(
                    f"Recipe has no field {name!r}{nearest(name, names)}",
                    where="Recipe",
                    remedy=f"the fields are {', '.join(sorted(names))}",
                )
        return replace(self, **changes)


# ---- checks of the fields ----


def _check_count(name: str, value: Any) -> None:
    if value is None and name not in NEEDED_COUNTS:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise RecipeError(
            f"{name} is {value!r}; it must be a whole number of at least 1",
            where=f"Recipe.{name}",
            remedy=f"set {name} to 1 or more",
        )


def _check_steps(steps: int | None) -> None:
    if (steps or 0) > MOST_STEPS:
        raise RecipeError(
            f"the run would have {steps} steps",
            where="Recipe.steps",
            remedy=(
                f"set steps, or epochs, for at most {MOST_STEPS} steps; stop sooner"
                " with Ctrl-C"
            ),
        )


def _check_positive(name: str, value: Any) -> None:
    if value is not None and not (_is_number(value) and value > 0):
        raise RecipeError(
            f"{name} is {value!r}; it must be a number above 0",
            where=f"Recipe.{name}",
            remedy=f"set {name} to a positive number, or leave it out",
        )


def _check_rate(rate: Any) -> None:
    if rate is None or callable(rate):
        return
    if not (_is_number(rate) and rate >= 0):
        raise RecipeError(
            f"learning_rate is {rate!r}; it must be a number of at least 0, or an"
            " Optax schedule",
            where="Recipe.learning_rate",
            remedy="give e.g. 1e-3 or optax.cosine_decay_schedule(...)",
        )


def _check_precision(precision: Any) -> None:
    if precision not in PRECISIONS:
        raise RecipeError(
            f"precision {precision!r} is not"
            f" known{nearest(str(precision), PRECISIONS)}",
            where="Recipe.precision",
            remedy=f"use one of {', '.join(PRECISIONS)}",
        )


def _check_micro_batches(micro_batches: int | None, batch_size: int) -> None:
    if batch_size % (micro_batches or 1):
        raise RecipeError(
            f"batch_size {batch_size} does not divide into"
            f" {micro_batches} micro-batches",
            where="Recipe.micro_batches",
            remedy="let micro_batches divide batch_size",
        )


def _check_functions(recipe: Recipe) -> None:
    remedies = {
        "model": "give a Flax module or its factory",
        "loss": "give a function (outputs, targets) -> one value per sample",
        "evaluate_params": (
            "give a function (optimizer_state, params) -> params, e.g. "
            "optax.contrib.schedule_free_eval_params, or leave it out"
        ),
        "preprocess": "give a function of a batch, or leave it out",
        "decode": "give a function of a batch, or leave it out",
    }
    for name, remedy in remedies.items():
        value = getattr(recipe, name)
        is_left_out = value is None and name not in ("model", "loss")
        if not is_left_out and not callable(value):
            raise RecipeError(
                f"{name} is {value!r}, which can't be called",
                where=f"Recipe.{name}",
                remedy=remedy,
            )


def _check_controller(controller: Any) -> None:
    if not _are_policies(controller):
        raise RecipeError(
            f"controller is {controller!r}",
            where="Recipe.controller",
            remedy=(
                "give a tuple of lepton_jax.controllers.Policy, such as"
                " controllers.adaptive(), or leave it out"
            ),
        )


def _are_policies(given: Any) -> bool:
    """Whether this is a policy, or policies in tuples or lists."""
    if callable(getattr(given, "update", None)):
        return True
    return isinstance(given, tuple | list) and all(map(_are_policies, given))


def _check_type(
    name: str,
    value: Any,
    kind: type,
) -> None:
    if not isinstance(value, kind):
        raise RecipeError(
            f"{name} is {value!r}; it must be a {kind.__name__}",
            where=f"Recipe.{name}",
            remedy=f"set {name} to a {kind.__name__}",
        )


def _check_seed(seed: Any) -> None:
    is_whole = isinstance(seed, int) and not isinstance(seed, bool)
    if not is_whole or not 0 <= seed <= MOST_SEED:
        raise RecipeError(
            f"seed is {seed!r}; it must be a whole number from 0 to {MOST_SEED}",
            where="Recipe.seed",
            remedy="set e.g. seed=0",
        )


def _check_best(best: Any, metrics: Mapping[str, Any]) -> None:
    known = {"loss", *metrics}
    if best is not None and str(best).removeprefix("-") not in known:
        raise RecipeError(
            f"best names {best!r}, which is no metric{nearest(str(best), known)}",
            where="Recipe.best",
            remedy=f"use one of {', '.join(sorted(known))}, with '-' for lowest",
        )


def _check_metrics(metrics: Any) -> None:
    if not isinstance(metrics, Mapping):
        raise RecipeError(
            f"metrics is a {type(metrics).__name__}",
            where="Recipe.metrics",
            remedy=(
                'give a dict of name to function, e.g. {"accuracy":'
                " lepton_jax.metrics.accuracy}"
            ),
        )
    for name, metric in metrics.items():
        if name in TAKEN:
            raise RecipeError(
                f"metric name {name!r} is taken",
                where="Recipe.metrics",
                remedy="call the metric something else",
            )
        function = getattr(metric, "values", metric)
        if not isinstance(name, str) or not callable(function):
            raise RecipeError(
                f"metric {name!r} is {metric!r}",
                where="Recipe.metrics",
                remedy=(
                    "give a name as a string, and a function (outputs, targets) -> one"
                    " value per sample"
                ),
            )


def _with_implied(recipe: Recipe) -> Mapping[str, Any]:
    """Return the metrics, with those that the loss brings along: each task's loss."""
    implied = losses.implied_metrics(recipe.loss)
    own = {n: m for n, m in recipe.metrics.items() if not losses.is_implied(m)}
    if len(own) == len(recipe.metrics) and not implied:
        return recipe.metrics
    return own | {name: m for name, m in implied.items() if name not in own}


def _check_preparation(preparation: Any) -> None:
    if preparation is not None and not hasattr(preparation, "arrays"):
        raise RecipeError(
            f"preparation is a {type(preparation).__name__}, which takes no raw rows",
            where="Recipe.preparation",
            remedy="give what Prepared.serving(...) returned, or leave it out",
        )


def _check_baseline(baseline: Any) -> None:
    functions = baseline if isinstance(baseline, list | tuple) else [baseline]
    if baseline is not None and not all(map(callable, functions)):
        raise RecipeError(
            f"baseline is {baseline!r}",
            where="Recipe.baseline",
            remedy=(
                "give a function (train, test) -> lepton_jax.baselines.Baseline, a"
                " tuple of them, or leave it out"
            ),
        )


def _check_train_argument(name: Any) -> None:
    if name is None:
        return
    argument = name.removeprefix("not ").strip() if isinstance(name, str) else ""
    if not argument.isidentifier():
        raise RecipeError(
            f"train_argument is {name!r}",
            where="Recipe.train_argument",
            remedy=(
                'name an argument of the model, e.g. "active", or "not frozen" for one '
                "that is True outside of training"
            ),
        )


def _check_auxiliary(auxiliary: Any) -> None:
    remedy = 'give a dict of name to weight, e.g. {"losses": 0.01}'
    if not isinstance(auxiliary, Mapping):
        kind = type(auxiliary).__name__
        raise RecipeError(
            f"auxiliary is a {kind}", where="Recipe.auxiliary", remedy=remedy
        )
    for name, weight in auxiliary.items():
        if not isinstance(name, str) or not _is_number(weight):
            raise RecipeError(
                f"auxiliary {name!r} has the weight {weight!r}",
                where="Recipe.auxiliary",
                remedy=remedy,
            )


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value)

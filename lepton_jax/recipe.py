"""What to train: a frozen dataclass of real objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from lepton_jax.errors import RecipeError, nearest

PRECISIONS = ("float32", "bfloat16", "float16")


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
      preprocess: inputs to the model's inputs, in JAX; part of every compiled program
        (e.g. uint8 pixels to floats).
      decode: the model's outputs to what `predict` returns. None: what the loss implies
        (`losses.decoder`).
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
        with dynamic loss scaling).
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
        for name in (
            "batch_size",
            "micro_batches",
            "steps_per_call",
            "evaluate_every",
            "save_every",
            "log_every",
            "keep",
            "steps",
        ):
            value = getattr(self, name)
            optional = value is None and name not in ("batch_size", "keep")
            if not optional and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise RecipeError(
                    f"{name} is {value!r}; it must be a whole number of at least 1",
                    where=f"Recipe.{name}",
                    remedy=f"set {name} to 1 or more",
                )
        if (self.steps or 0) >= 2**31:
            raise RecipeError(
                f"the run would have {self.steps} steps",
                where="Recipe.steps",
                remedy=(
                    "set steps, or epochs, for at most 2147483647 steps; stop sooner"
                    " with Ctrl-C"
                ),
            )
        for name in ("epochs", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not (_number(value) and value > 0):
                raise RecipeError(
                    f"{name} is {value!r}; it must be a number above 0",
                    where=f"Recipe.{name}",
                    remedy=f"set {name} to a positive number, or leave it out",
                )
        rate = self.learning_rate
        if (
            rate is not None
            and not callable(rate)
            and not (_number(rate) and rate >= 0)
        ):
            raise RecipeError(
                f"learning_rate is {rate!r}; it must be a number of at least 0, or an"
                " Optax schedule",
                where="Recipe.learning_rate",
                remedy="give e.g. 1e-3 or optax.cosine_decay_schedule(...)",
            )
        if self.precision not in PRECISIONS:
            raise RecipeError(
                f"precision {self.precision!r} is not"
                f" known{nearest(str(self.precision), PRECISIONS)}",
                where="Recipe.precision",
                remedy=f"use one of {', '.join(PRECISIONS)}",
            )
        if self.batch_size % (self.micro_batches or 1):
            raise RecipeError(
                f"batch_size {self.batch_size} does not divide into"
                f" {self.micro_batches} micro-batches",
                where="Recipe.micro_batches",
                remedy="let micro_batches divide batch_size",
            )
        for name in ("model", "loss"):
            if not callable(getattr(self, name)):
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}, which can't be called",
                    where=f"Recipe.{name}",
                    remedy=(
                        "give a Flax module or its factory"
                        if name == "model"
                        else (
                            "give a function (outputs, targets) -> one value per sample"
                        )
                    ),
                )
        if self.evaluate_params is not None and not callable(self.evaluate_params):
            raise RecipeError(
                f"evaluate_params is {self.evaluate_params!r}, which can't be called",
                where="Recipe.evaluate_params",
                remedy=(
                    "give a function (optimizer_state, params) -> params, e.g. "
                    "optax.contrib.schedule_free_eval_params, or leave it out"
                ),
            )
        for name in ("preprocess", "decode"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}, which can't be called",
                    where=f"Recipe.{name}",
                    remedy="give a function of a batch, or leave it out",
                )
        _check_metrics(self.metrics)
        _check_train_argument(self.train_argument)
        _check_auxiliary(self.auxiliary)
        if not _policies(self.controller):
            raise RecipeError(
                f"controller is {self.controller!r}",
                where="Recipe.controller",
                remedy=(
                    "give a tuple of lepton_jax.controllers.Policy, such as"
                    " controllers.adaptive(), or leave it out"
                ),
            )
        for name, kind in (("name", str), ("shuffle", bool)):
            if not isinstance(getattr(self, name), kind):
                raise RecipeError(
                    f"{name} is {getattr(self, name)!r}; it must be a {kind.__name__}",
                    where=f"Recipe.{name}",
                    remedy=f"set {name} to a {kind.__name__}",
                )
        if isinstance(self.seed, bool) or not (
            isinstance(self.seed, int) and 0 <= self.seed < 2**32
        ):
            raise RecipeError(
                f"seed is {self.seed!r}; it must be a whole number from 0 to"
                " 4294967295",
                where="Recipe.seed",
                remedy="set e.g. seed=0",
            )
        known = {"loss", *self.metrics}
        if self.best is not None and str(self.best).removeprefix("-") not in known:
            raise RecipeError(
                f"best names {self.best!r}, which is no"
                f" metric{nearest(str(self.best), known)}",
                where="Recipe.best",
                remedy=f"use one of {', '.join(sorted(known))}, with '-' for lowest",
            )

    def with_(self, **changes: Any) -> Recipe:
        """A copy with some fields changed; an unknown name is an error that suggests
        the nearest.
        """
        names = {f.name for f in fields(self)}
        for name in changes:
            if name not in names:
                raise RecipeError(
                    f"Recipe has no field {name!r}{nearest(name, names)}",
                    where="Recipe",
                    remedy=f"the fields are {', '.join(sorted(names))}",
                )
        return replace(self, **changes)


def _policies(given: Any) -> bool:
    """Whether this is a policy, or policies in tuples or lists."""
    return callable(getattr(given, "update", None)) or (
        isinstance(given, tuple | list) and all(map(_policies, given))
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
        if name in ("loss", "learning_rate", "loss_scale", "step"):
            raise RecipeError(
                f"metric name {name!r} is taken",
                where="Recipe.metrics",
                remedy="call the metric something else",
            )
        if not isinstance(name, str) or not callable(getattr(metric, "values", metric)):
            raise RecipeError(
                f"metric {name!r} is {metric!r}",
                where="Recipe.metrics",
                remedy=(
                    "give a name as a string, and a function (outputs, targets) -> one"
                    " value per sample"
                ),
            )


def _check_train_argument(name: Any) -> None:
    if name is None:
        return
    if (
        not isinstance(name, str)
        or not name.removeprefix("not ").strip().isidentifier()
    ):
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
        if not isinstance(name, str) or not _number(weight):
            raise RecipeError(
                f"auxiliary {name!r} has the weight {weight!r}",
                where="Recipe.auxiliary",
                remedy=remedy,
            )


def _number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
    )

"""Sizes, times and metrics of models, to compare small ones with large ones."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lepton_jax.baselines.comparison import less_is_better
from lepton_jax.errors import SettingError, nearest
from lepton_jax.ship.artifact.tracing import traced

# Rows of the batch that is timed. Assumption: a server's batch under load.
ROWS = 64
# Seconds that a timing takes at most, and its fewest calls (assumptions: a median of
# fewer is noise).
SECONDS = 1.0
FEWEST_CALLS = 5
MOST_CALLS = 200
MILLISECONDS = 1e3


def size_of(trainer: Any) -> int:
    """Return the bytes of the weights that a model predicts with, as they are stored.

    Args:
      trainer: with the model.
    """
    weights = traced(trainer).weights
    return sum(array.nbytes for array in weights.values())


def latency_of(
    trainer: Any,
    rows: int = ROWS,
    seconds: float = SECONDS,
) -> float:
    """Return the median milliseconds in which a compiled model predicts a batch.

    Weights and inputs lie on the device; the time is until the outputs do, too.

    Args:
      trainer: with the model.
      rows: of the batch.
      seconds: that the timing takes at most, compiling not counted.
    """
    return latencies_of([trainer], rows, seconds)[0]


def latencies_of(
    trainers: Sequence[Any],
    rows: int = ROWS,
    seconds: float = SECONDS,
) -> list[float]:
    """Return the median milliseconds of several models, which are called in turns.

    What slows the machine down for a while slows all of them.

    Args:
      trainers: with the models.
      rows: of the batch.
      seconds: for each model, at most.
    """
    calls = [_compiled(trainer, rows) for trainer in trainers]
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds * len(calls)
    for number in range(MOST_CALLS):
        if time.perf_counter() > end and number >= FEWEST_CALLS:
            break
        for own, call in zip(times, calls, strict=True):
            began = time.perf_counter()
            call()
            own.append(time.perf_counter() - began)
    return [MILLISECONDS * statistics.median(own) for own in times]


def metric_name(
    trainer: Any,
    asked: str | None = None,
) -> str:
    """Return the metric by which models are compared.

    Args:
      trainer: with the recipe.
      asked: by the user; None: `Recipe.best`, else the first metric, else the loss.

    Raises:
      SettingError: the recipe has no such metric.
    """
    recipe = trainer.recipe
    known = [*recipe.metrics, "loss"]
    if asked is None:
        return str(recipe.best).removeprefix("-") if recipe.best else known[0]
    if asked not in known:
        raise SettingError(
            f"the recipe has no metric {asked!r}{nearest(asked, known)}",
            where="metric",
            remedy=f"use one of {', '.join(known)}",
        )
    return asked


def metric_of(
    trainer: Any,
    name: str,
    data: Any,
) -> float:
    """Return a metric of a model on some samples.

    Args:
      trainer: with the model.
      name: of the metric.
      data: samples with targets.
    """
    measured = trainer.evaluate(data)
    names = ["loss", *trainer.recipe.metrics]
    return float(measured[names.index(name)])


def keeps(
    name: str,
    value: float,
    whole: float,
    share: float,
) -> bool:
    """Whether a metric is as good as asked for.

    Args:
      name: of the metric, which says whether less of it is better.
      value: of the small model.
      whole: of the model that it was made of.
      share: of `whole` that is to be kept, from 0 to 1.

    >>> keeps("accuracy", 0.986, 0.99, 0.995), keeps("rmse", 1.2, 1.0, 0.9)
    (True, False)
    """
    slack = (1 - share) * abs(whole)
    if less_is_better(name):
        return value <= whole + slack
    return value >= whole - slack


# ---- internals ----


def _compiled(trainer: Any, rows: int) -> Callable[[], None]:
    """Return a function that predicts a batch of zeros, and waits for it."""
    model = traced(trainer)
    weights = jax.device_put(model.weights)
    inputs = {}
    for name, shape in model.inputs.items():
        batch = np.zeros((rows, *shape.shape[1:]), shape.dtype)
        inputs[name] = jax.device_put(batch)
    run = jax.jit(model.run).lower(weights, inputs).compile()

    def call() -> None:
        jax.block_until_ready(run(weights, inputs))

    call()
    return call

"""Permutation importance: how much worse the metric is with a column out of order.

Breiman 2001, "Random Forests", section 10; Fisher et al. 2019, "All Models are Wrong,
but Many are Useful", for any model. A column that says the same as another one shows
less than it would by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.baselines.comparison import less_is_better
from lepton_jax.data import Arrays
from lepton_jax.errors import DataError, ModelError
from lepton_jax.ship.artifact.signature import INPUTS
from lepton_jax.ship.explain.subject import PICTURE_DIMS, subject_of
from lepton_jax.ship.shrink.measuring import metric_name, metric_of

METHOD = "permutation_importance"
REPEATS = 5  # orders of each column; scikit-learn's default
ROWS = 2000  # of the test set; assumption: an importance of 1 % shows among them


class Importance(NamedTuple):
    """Importance of a column.

    Attributes:
      column: its name, or "inputs[3]".
      mean: by how much the metric is worse without it, over the orders.
      deviation: standard deviation over the orders.
    """

    column: str
    mean: float
    deviation: float


def permutation_importance(
    trainer: Any,
    data: Any = None,
    *,
    metric: str | None = None,
    repeats: int = REPEATS,
    seed: int = 0,
) -> list[Importance]:
    """Return the importance of each column of the inputs, the largest first.

    Args:
      trainer: with the model.
      data: samples with targets; None: the recipe's test rows, at most 2,000.
      metric: its name; None: `Recipe.best`, or the first.
      repeats: orders of each column.
      seed: of the orders.

    Raises:
      DataError: there are no samples in memory, or they are pictures.
      ModelError: the model is an artifact.
      SettingError: there is no such metric.
    """
    if hasattr(trainer, "manifest"):
        raise ModelError(
            "an artifact has no metric",
            where=METHOD,
            remedy="give the trainer that it was made of",
        )
    samples = _samples(trainer, data, seed)
    name = metric_name(trainer, metric)
    sign = -1 if less_is_better(name) else 1
    whole = metric_of(trainer, name, samples)
    columns = subject_of(trainer).names
    draw = np.random.default_rng(seed)
    found = []
    for column, at in _columns(samples, columns):
        falls = []
        for _ in range(repeats):
            mixed = _mixed(samples, at, draw)
            falls.append(sign * (whole - metric_of(trainer, name, mixed)))
        mean = float(np.mean(falls))
        found.append(Importance(column, mean, float(np.std(falls))))
    return sorted(found, key=lambda one: -one.mean)


# ---- internals ----

Place = tuple[str, int | None]  # (input, column of it; None: it is a vector)


def _samples(
    trainer: Any,
    data: Any,
    seed: int,
) -> Arrays:
    samples = trainer.recipe.test if data is None else data
    if isinstance(samples, tuple):
        samples = Arrays(*samples)
    if not isinstance(samples, Arrays) or samples.targets is None:
        raise DataError(
            "there are no samples in memory to put out of order",
            where=METHOD,
            remedy="give (inputs, targets)",
        )
    if any(array.ndim >= PICTURE_DIMS for array in _inputs(samples).values()):
        raise DataError(
            "a pixel by itself says nothing: the inputs are pictures",
            where=METHOD,
            remedy='explain rows by "occlusion" or "integrated_gradients"',
        )
    if data is None and len(samples) > ROWS:
        draw = np.random.default_rng(seed)
        rows = np.sort(draw.permutation(len(samples))[:ROWS])
        samples = Arrays(*samples.take(rows))
    return samples


def _inputs(samples: Arrays) -> dict[str, np.ndarray]:
    inputs = samples.inputs
    return inputs if isinstance(inputs, dict) else {INPUTS: inputs}


def _columns(
    samples: Arrays,
    names: dict[str, tuple[str, ...]],
) -> Iterator[tuple[str, Place]]:
    for name, array in _inputs(samples).items():
        if array.ndim == 1:
            yield name, (name, None)
            continue
        known = names.get(name)
        for at in range(array.shape[1]):
            yield (known[at] if known else f"{name}[{at}]"), (name, at)


def _mixed(
    samples: Arrays,
    place: Place,
    draw: np.random.Generator,
) -> Arrays:
    """Return samples with one column in another order."""
    name, at = place
    inputs = dict(_inputs(samples))
    array = inputs[name].copy()
    order = draw.permutation(len(array))
    if at is None:
        array = array[order]
    else:
        array[:, at] = array[order, at]
    inputs[name] = array
    is_single = not isinstance(samples.inputs, dict)
    return Arrays(array if is_single else inputs, samples.targets)

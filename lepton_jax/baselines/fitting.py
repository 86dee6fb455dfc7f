"""Rows to fit a cheap method on, and rows held out of them to choose a setting by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.baselines.baseline import NotHere, Samples
from lepton_jax.baselines.features import Features

HELD_OUT = 0.2  # of the training rows, to choose a setting by; assumption
# Cells of a table from which on several threads pay. With 480 rows of 3,072 features a
# step of L-BFGS takes 4 ms of one thread, and 35 ms of the time of two that share their
# cores with other work; where the two meet was not measured (assumption).
FEWEST_CELLS = 5_000_000
SEED = 0  # of the draws: the same data give the same baseline


class Fitting(NamedTuple):
    """Training rows as features and targets, and the features of the test rows.

    Attributes:
      inputs: float32 (rows, features).
      targets: as those of `Samples`, (rows,).
      test: float32 (test rows, features).
      said: how many rows these are, in words.
    """

    inputs: np.ndarray
    targets: np.ndarray
    test: np.ndarray
    said: str


def fitting(train: Samples, test: Samples, most: Callable[[int], int]) -> Fitting:
    """Return features of training and test rows.

    Args:
      train: classes, yes or no, or quantities, one a row.
      test: rows to answer for.
      most: count of features to the training rows that are worth their time.

    Raises:
      NotHere: there is not one target a row, or there are too many features.
    """
    if train.task == "other":
        raise NotHere("the targets are neither classes nor quantities")
    targets = train.targets.reshape(
        len(train),
        -1,
    )
    if targets.shape[1] != 1:
        raise NotHere(f"there are {targets.shape[1]} targets a row")
    features = Features(train)
    rows = sample(
        len(train),
        most(features.count),
    )
    inputs = jax.tree.map(
        lambda leaf: leaf[rows],
        train.inputs,
    )
    said = f"{len(rows):,} training rows"
    if len(rows) < train.total:
        said = f"{len(rows):,} of {train.total:,} training rows, drawn at random"
    return Fitting(
        features.of(inputs),
        targets[rows, 0],
        features.of(test.inputs),
        said,
    )


def sample(rows: int, most: int) -> np.ndarray:
    """Return the numbers of at most so many rows, ascending."""
    if rows <= most:
        return np.arange(rows)
    return np.sort(np.random.default_rng(SEED).permutation(rows)[:most])


def chosen(
    settings: Sequence[Any],
    fit: Callable[[Any, np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]],
    score: Callable[[np.ndarray, np.ndarray], float],
    data: Fitting,
    most: int,
) -> Any:
    """Return the setting that scores best on rows held out of the training rows.

    Args:
      settings: to choose from.
      fit: (setting, inputs, targets) to a function of inputs to answers.
      score: (answers, targets) to a number, more of which is better.
      data: the rows.
      most: rows that are looked at.
    """
    order = np.random.default_rng(SEED).permutation(len(data.inputs))[:most]
    held = order[
        : max(
            1,
            round(HELD_OUT * len(order)),
        )
    ]
    rest = order[len(held) :]

    def scored(setting: Any) -> float:
        answer = fit(
            setting,
            data.inputs[rest],
            data.targets[rest],
        )
        return score(
            answer(data.inputs[held]),
            data.targets[held],
        )

    return max(settings, key=scored)


@contextlib.contextmanager
def few_threads(cells: int) -> Iterator[None]:
    """Let linear algebra on little data run in one thread, inside the block.

    Args:
      cells: rows times features.
    """
    from threadpoolctl import threadpool_limits  # scikit-learn depends on it

    with threadpool_limits(1 if cells < FEWEST_CELLS else None):
        yield


def hits(answers: np.ndarray, targets: np.ndarray) -> float:
    """Return the share of rows whose most likely class is theirs."""
    return float((answers.argmax(axis=1) == targets).mean())


def nearness(answers: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean squared error, negative."""
    return -float(np.square(answers - targets).mean())

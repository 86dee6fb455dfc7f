"""Gradient boosting without the columns that look too good to be true.

A result far above what a table's honest columns allow has one of two causes, and both
show in the columns:

    late     one column answers alone as well as all do, and without it the error is
             several times as large: it may be known only after the answer. On the
             Titanic, the number of the life boat.
    shared   a column whose values are rare, but are in training and in test: rows that
             belong together, such as those of one ticket, whose answers agree.

What is left without such columns is what a network has to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples
from lepton_jax.baselines.boosting import Columns, answered, columns_of
from lepton_jax.baselines.fitting import HELD_OUT, SEED, sample

# Assumptions: a second of one core for each fit, and a column that stands out does so
# on a few thousand rows.
MOST_ROWS = 4000
MOST_LOOKED_AT = 4  # columns, those that answer best alone
LATE = (
    2.5  # times the error without a late column; Titanic: 5 for the boat, 1.5 for sex
)
ALONE = 1.5  # times the error of all columns that a late column alone may have
MOST_SHARING = 5  # rows with one value of a shared column, in the mean; assumption
LEAST_SHARING = 20  # test rows that share a value: fewer tell nothing; assumption
DEVIATIONS = 3.0  # standard deviations of the agreement beyond chance


def without_suspects(
    train: Samples,
    test: Samples,
    names: Any = None,
) -> Baseline:
    """Fit gradient boosting without suspicious columns, and name these.

    Args:
      train: classes, yes or no, or quantities, one a row.
      test: rows to answer for.
      names: of the columns, in the form of the inputs: a list, or a dict of them; None:
        they have numbers.

    Raises:
      NotHere: no column is suspicious, there is not one target a row, or the inputs
        are no table.
      ImportError: scikit-learn is not installed.
    """
    import sklearn  # noqa: F401  before the work, if it is missing

    if train.task == "other" or train.targets.size != len(train):
        raise NotHere("there is not one class or quantity a row")
    columns = columns_of(train.inputs)
    tested = columns_of(test.inputs)
    late = _late(train, columns)
    shared = _shared(train, columns, tested)
    suspects = {*late, *shared}
    every = range(columns.width)
    left = [number for number in every if number not in suspects]
    if len(left) == columns.width:
        raise NotHere("no column looks too good to be true")
    if not left:
        raise NotHere("no column is left without those that look too good to be true")

    known = _named(names, columns.width)
    rows = sample(len(train), MOST_ROWS)
    outputs = answered(
        train,
        test,
        columns.only(left, rows),
        tested.only(left),
        rows,
    )
    reasons = [
        f"{known[number]}, which alone answers as well as all" for number in late
    ]
    reasons += [
        f"{known[number]}, which rows of training and test share" for number in shared
    ]
    name = f"alarm: gradient boosting without {'; '.join(reasons)}"
    return Baseline(name, f"on {len(rows):,} training rows", outputs)


# ---- internals ----


def _late(train: Samples, columns: Columns) -> list[int]:
    """Return the columns that answer alone as well as all do."""
    draw = np.random.default_rng(SEED)
    order = draw.permutation(len(train))[:MOST_ROWS]
    count = max(1, round(HELD_OUT * len(order)))
    held = order[:count]
    rest = order[count:]

    def error(numbers: Sequence[int]) -> float:
        outputs = answered(
            train,
            train,
            columns.only(numbers, rest),
            columns.only(numbers, held),
            rest,
        )
        return _error(train, outputs, held)

    every = list(range(columns.width))
    if len(every) < 2 or not len(rest):
        return []
    floor = 1 / len(held)  # of an error that no row shows
    whole = error(every) + floor
    alone = {number: error([number]) + floor for number in every}
    looked_at = sorted(every, key=alone.__getitem__)[:MOST_LOOKED_AT]
    return [
        number
        for number in looked_at
        if alone[number] < ALONE * whole
        and error([other for other in every if other != number]) > LATE * whole
    ]


def _error(
    train: Samples,
    outputs: np.ndarray,
    rows: np.ndarray,
) -> float:
    """Return the share of wrong classes, or of a quantity's variance that is left."""
    targets = train.targets.reshape(len(train))[rows]
    if train.task == "quantities":
        spread = float(np.var(targets)) or 1.0
        squared = np.square(outputs.reshape(-1) - targets)
        return float(squared.mean()) / spread
    if train.task == "classes":
        return float((outputs.argmax(-1) != targets).mean())
    given = outputs.reshape(-1) > 0
    return float((given != targets).mean())


def _shared(
    train: Samples,
    columns: Columns,
    tested: Columns,
) -> list[int]:
    """Return the columns whose rare values rows of both sides share, with answers."""
    if train.task == "quantities":
        return []
    targets = train.targets.reshape(-1).astype(int)
    return [
        number
        for number in np.flatnonzero(columns.is_coded).tolist()
        if _is_shared(columns.table[:, number], tested.table[:, number])
        and _agree(columns.table[:, number], targets)
    ]


def _is_shared(values: np.ndarray, tested: np.ndarray) -> bool:
    """Whether the values are rare, and yet in training and in test."""
    known, counts = np.unique(values, return_counts=True)
    most = known[counts.argmax()]  # it may stand for "missing"
    others = len(known) - 1
    if others < 1 or (values != most).sum() > MOST_SHARING * others:
        return False
    shared = np.isin(tested, known) & (tested != most)
    return bool(shared.sum() >= LEAST_SHARING)


def _agree(
    values: np.ndarray,
    targets: np.ndarray,
) -> bool:
    """Whether the other rows with a row's value foretell its class.

    A row is answered with the most frequent class of these others. That is right more
    often than the most frequent class of all such rows, beyond chance.
    """
    known, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
    votes = np.zeros((len(known), targets.max() + 1))
    np.add.at(votes, (codes, targets), 1)
    rows = (counts[codes] > 1) & (codes != counts.argmax())
    count = int(rows.sum())
    if not count:
        return False
    others = votes[codes[rows]]
    own = targets[rows]
    others[np.arange(count), own] -= 1
    shares = np.bincount(own, minlength=votes.shape[1]) / count
    # a tie goes to the class that is more frequent
    right = (others + shares / 2).argmax(axis=1) == own
    chance = shares.max()
    variance = max(chance * (1 - chance), 1 / count)
    deviation = np.sqrt(variance / count)
    return bool(right.mean() - chance > DEVIATIONS * deviation)


def _named(names: Any, count: int) -> list[str]:
    flat = jax.tree.leaves(names)
    known = [repr(name) for name in flat]
    if len(known) == count:
        return known
    return [f"column {number}" for number in range(count)]

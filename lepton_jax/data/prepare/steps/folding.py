"""Parts of rows, each of which is the test once: which rows are in which.

Rows of a class lie in the order of their hashes and are dealt out as equal runs. Where
a class does not divide, the next class goes on with the fold after, so that the folds
stay equal too; 4 and 3 rows in 3 folds:

    class a   4 rows   folds 0 0 | 1 | 2      the fourth row went to fold 0
    class b   3 rows   folds 0 | 1 | 2        so b begins with fold 1: its run is 1
    in all                                    3, 2 and 2 rows
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.errors import DataError

FEWEST = 2  # folds: with one there is nothing to train on


class Run(NamedTuple):
    """Rows of a class in the order of their hashes that are the test of a fold.

    Attributes:
      start: the first of them.
      stop: the one after the last.
    """

    start: int
    stop: int


def check(step: Any) -> None:
    """Check a step's arguments `folds`, `fold` and the shares with them.

    Raises:
      DataError: they can't be.
    """
    where = type(step).__name__
    if step.folds is None:
        if step.fold:
            raise DataError(
                f"fold is {step.fold!r}, but there are no folds",
                where=where,
                remedy="give the count too, such as folds=10",
            )
        return
    if not _is_whole(step.folds) or step.folds < FEWEST:
        raise DataError(
            f"folds is {step.folds!r}",
            where=where,
            remedy="give a whole number of at least 2",
        )
    if not _is_whole(step.fold) or not 0 <= step.fold < step.folds:
        raise DataError(
            f"fold is {step.fold!r} of {step.folds}",
            where=where,
            remedy=f"give a whole number from 0 to {step.folds - 1}",
        )
    if step.test:
        raise DataError(
            f"both test={step.test:g} and folds={step.folds} are given",
            where=where,
            remedy="leave test out: the test is one of the folds",
        )
    if step.validation >= 1 - 1 / step.folds:
        raise DataError(
            f"validation is {step.validation:g}, which leaves nothing to train on",
            where=where,
            remedy=f"give less than {1 - 1 / step.folds:g}",
        )


def runs(sizes: Sequence[int], folds: int, fold: int) -> list[Run]:
    """Return each class's run of rows that are the test of a fold.

    Args:
      sizes: rows of each class.
      folds: how many there are.
      fold: which one.
    """
    found = []
    dealt = 0
    for size in sizes:
        numbers = np.arange(dealt, dealt + size) % folds
        counts = np.bincount(numbers, minlength=folds)
        start = int(counts[:fold].sum())
        found.append(
            Run(
                start,
                start + int(counts[fold]),
            )
        )
        dealt += size
    return found


def after(run: Run, size: int, count: int) -> list[Run]:
    """Return the runs of `count` rows after a run, which go on at the first row.

    >>> after(Run(6, 8), 10, 4)
    [Run(start=8, stop=10), Run(start=0, stop=2)]
    """
    count = min(
        count,
        size - (run.stop - run.start),
    )
    stop = min(size, run.stop + count)
    rest = count - (stop - run.stop)
    return [
        Run(
            run.stop,
            stop,
        ),
        Run(0, rest),
    ]


def of_groups(sizes: np.ndarray, folds: int) -> np.ndarray:
    """Return the fold of each group: the largest first, each to the smallest fold.

    No fold is larger than 4/3 of the best largest one can be (R. Graham, SIAM Journal
    on Applied Mathematics 17, 1969).

    Args:
      sizes: rows of each group, in a fixed order.
      folds: how many there are.
    """
    smallest = [(0, fold) for fold in range(folds)]
    fold_of = np.zeros(
        len(sizes),
        np.int64,
    )
    for group in np.argsort(
        -sizes.astype(np.int64),
        kind="stable",
    ):
        rows, fold = smallest[0]
        fold_of[group] = fold
        heapq.heapreplace(
            smallest,
            (rows + int(sizes[group]), fold),
        )
    return fold_of


def check_enough(step: Any, count: int, what: str) -> None:
    """Raise DataError if there are fewer rows, or groups, than folds."""
    if count < step.folds:
        raise DataError(
            f"there are {count} {what} for {step.folds} folds",
            where=type(step).__name__,
            remedy=f"ask for at most {count} folds",
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(
        value,
        bool,
    )

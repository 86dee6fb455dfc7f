"""Gradient boosting of trees, as scikit-learn has it, with its defaults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples
from lepton_jax.baselines.fitting import sample
from lepton_jax.baselines.logistic import LEAST

# Values of a category that the trees can tell apart (scikit-learn's own limit); columns
# with more are split by their codes, which go by frequency.
MOST_VALUES = 255
# Rows times columns that are fitted on: some 20 s of one core (measured with Adult's
# 14 columns by benchmarks/peers/adult_hgb.py: 450,000 cells in 1 s).
MOST_CELLS = 10_000_000
MOST_COLUMNS = 2000  # of a table; assumption: with more they are pixels or words
SEED = 0  # of the rows by which the number of trees is chosen

Loss = Literal["squared_error", "poisson"]
Answer = Callable[[np.ndarray], np.ndarray]


class Columns(NamedTuple):
    """A table of numbers, of which some are categories.

    Attributes:
      table: float64 (rows, columns), NaN where a number is missing.
      is_category: of each column, whether trees split it as a category.
      is_coded: whether it holds whole numbers that may stand for categories.
    """

    table: np.ndarray
    is_category: np.ndarray
    is_coded: np.ndarray

    @property
    def width(self) -> int:
        """Count of columns."""
        return self.table.shape[1]

    def only(
        self,
        numbers: Sequence[int],
        rows: Any = slice(None),
    ) -> Columns:
        """Return some columns, of some rows."""
        numbers = list(numbers)
        return Columns(
            self.table[rows][:, numbers],
            self.is_category[numbers],
            self.is_coded[numbers],
        )


def boosting(train: Samples, test: Samples, loss: Loss = "squared_error") -> Baseline:
    """Fit histogram gradient boosting, with the defaults of scikit-learn.

    Numbers may have gaps, and categories are split as such (Ke et al. 2017, LightGBM).
    Trees need no scaling and few settings, so that on tables they are what a network
    has to beat (Grinsztajn et al. 2022, "Why do tree-based models still outperform deep
    learning on typical tabular data?").

    Args:
      train: classes, yes or no, or quantities: one target a row, or several quantities.
      test: rows to answer for.
      loss: of quantities; "poisson" for counts.

    Raises:
      NotHere: the targets are none of these, or the inputs are no table.
      ImportError: scikit-learn is not installed.
    """
    import sklearn  # noqa: F401  before the work, if it is missing

    columns = columns_of(train.inputs)
    rows = sample(len(train), MOST_CELLS // columns.width)
    outputs = answered(
        train,
        test,
        columns.only(range(columns.width), rows),
        columns_of(test.inputs),
        rows,
        loss,
    )
    said = f"on {len(rows):,} training rows with scikit-learn's defaults"
    return Baseline("gradient boosting", said, outputs)


def answered(
    train: Samples,
    test: Samples,
    known: Columns,
    tested: Columns,
    rows: np.ndarray,
    loss: Loss = "squared_error",
) -> np.ndarray:
    """Fit some training rows, and return a model's outputs for others.

    Args:
      train: the rows, of which some are fitted.
      test: rows that say the outputs' shape.
      known: columns of the fitted rows.
      tested: columns of the rows to answer for.
      rows: numbers of the fitted rows.
      loss: of quantities.

    Raises:
      NotHere: the targets are neither classes nor quantities, or several classes a row.
    """
    if train.task == "other":
        raise NotHere("the targets are neither classes nor quantities")
    targets = train.targets.reshape(len(train), -1)[rows]
    shape = (len(tested.table), *test.targets.shape[1:])
    if train.task == "quantities":
        models = [_fit(known, column, loss) for column in targets.T]
        answers = [model(tested.table) for model in models]
        outputs = np.stack(answers, axis=-1)
        return outputs.astype(np.float32).reshape(shape)
    if targets.shape[1] != 1:
        raise NotHere(f"there are {targets.shape[1]} targets a row")
    classes = max(2, train.classes)
    labels = targets[:, 0].astype(int)
    shares = _fit(known, labels, classes=classes)(tested.table)
    logs = np.log(np.maximum(shares, LEAST))
    logs = logs.astype(np.float32)
    if train.task == "classes":
        return logs
    logits = logs[:, 1] - logs[:, 0]
    return logits.reshape(shape)


def columns_of(inputs: Any) -> Columns:
    """Return the columns of a model's inputs.

    Raises:
      NotHere: the inputs are no table.
    """
    parts = []
    is_category = []
    is_coded = []
    for leaf in map(np.asarray, jax.tree.leaves(inputs)):
        if leaf.ndim > 2:
            raise NotHere("the inputs are no table")
        part = leaf.reshape(len(leaf), -1).astype(np.float64)
        part[~np.isfinite(part)] = np.nan
        parts.append(part)
        is_whole = leaf.dtype.kind in "iub"
        is_small = part.max(axis=0, initial=0) < MOST_VALUES
        is_category.append(is_small & is_whole)
        is_coded.append(np.full_like(is_small, is_whole))
    table = np.concatenate(parts, axis=1)
    if table.shape[1] > MOST_COLUMNS:
        raise NotHere(f"the inputs have {table.shape[1]:,} columns")
    return Columns(
        table,
        np.concatenate(is_category),
        np.concatenate(is_coded),
    )


# ---- internals ----


def _fit(
    columns: Columns,
    targets: np.ndarray,
    loss: str = "",
    classes: int = 0,
) -> Answer:
    """Fit one model; answer with quantities, or with probabilities by class."""
    from sklearn.ensemble import (
        HistGradientBoostingClassifier,
        HistGradientBoostingRegressor,
    )

    settings: dict[str, Any] = {
        "categorical_features": columns.is_category,
        "random_state": SEED,
    }
    if not classes:
        model = HistGradientBoostingRegressor(loss=loss, **settings)
        return model.fit(columns.table, targets).predict
    known = np.unique(targets)
    if len(known) == 1:
        certain = np.eye(classes)[known]
        return lambda rows: certain.repeat(len(rows), axis=0)
    fitted = HistGradientBoostingClassifier(**settings).fit(columns.table, targets)

    def shares(rows: np.ndarray) -> np.ndarray:
        placed = np.zeros((len(rows), classes))
        placed[:, known] = fitted.predict_proba(rows)
        return placed

    return shares

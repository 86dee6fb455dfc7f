"""Gradient boosting of trees, as scikit-learn has it, with its defaults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples
from lepton_jax.baselines.fitting import sample
from lepton_jax.baselines.logistic import outputs_of

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

    if train.task == "other":
        raise NotHere("the targets are neither classes nor quantities")
    columns, is_category = _columns(train.inputs)
    rows = sample(len(columns), MOST_CELLS // columns.shape[1])
    targets = train.targets.reshape(len(train), -1)[rows]
    fit = partial(
        _fit,
        inputs=columns[rows],
        is_category=is_category,
    )
    tested, _ = _columns(test.inputs)
    said = f"on {len(rows):,} training rows with scikit-learn's defaults"
    if train.task == "quantities":
        answers = [fit(targets=column, loss=loss)(tested) for column in targets.T]
        outputs = np.stack(answers, axis=-1).astype(np.float32)
        shape = (len(test), *test.targets.shape[1:])
        return Baseline("gradient boosting", said, outputs.reshape(shape))
    if targets.shape[1] != 1:
        raise NotHere(f"there are {targets.shape[1]} targets a row")
    classes = max(2, train.classes)
    shares = fit(targets=targets[:, 0].astype(int), classes=classes)(tested)
    return Baseline("gradient boosting", said, outputs_of(shares, train, test))


def _fit(
    inputs: np.ndarray,
    is_category: np.ndarray,
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
        "categorical_features": is_category,
        "random_state": SEED,
    }
    if not classes:
        model = HistGradientBoostingRegressor(loss=loss, **settings)
        return model.fit(inputs, targets).predict
    known = np.unique(targets)
    fitted = HistGradientBoostingClassifier(**settings).fit(inputs, targets)

    def shares(rows: np.ndarray) -> np.ndarray:
        placed = np.zeros((len(rows), classes))
        placed[:, known] = fitted.predict_proba(rows)
        return placed

    return shares


def _columns(inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return a table (rows, columns), and which columns are categories.

    Raises:
      NotHere: the inputs are no table.
    """
    parts = []
    kinds = []
    for leaf in map(np.asarray, jax.tree.leaves(inputs)):
        if leaf.ndim > 2:
            raise NotHere("the inputs are no table")
        part = leaf.reshape(len(leaf), -1).astype(np.float64)
        part[~np.isfinite(part)] = np.nan
        parts.append(part)
        is_whole = leaf.dtype.kind in "iub"
        few = part.max(axis=0, initial=0) < MOST_VALUES
        kinds.append(few & is_whole)
    table = np.concatenate(parts, axis=1)
    if table.shape[1] > MOST_COLUMNS:
        raise NotHere(f"the inputs have {table.shape[1]:,} columns")
    return table, np.concatenate(kinds)

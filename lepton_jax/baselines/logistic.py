"""Logistic regression for classes, ridge regression for quantities."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

from lepton_jax.baselines.baseline import Baseline, Samples
from lepton_jax.baselines.fitting import (
    chosen,
    few_threads,
    fitting,
    hits,
    nearness,
)

# Inverse strengths of the penalty to choose from, by scikit-learn's scale, where 1 is
# the default.
STRENGTHS = (0.01, 0.1, 1.0, 10.0)
RIDGE = (0.1, 1.0, 10.0, 100.0)  # strengths of the ridge penalty to choose from
ITERATIONS = 100  # of L-BFGS, scikit-learn's default; what is left changes few answers
# Rows times features that are fitted on: some 20 s of one core with ten classes.
# Assumption: a linear model learns no more from more rows.
MOST_CELLS = 10_000_000
MOST_TO_CHOOSE = 5000  # rows by which the strength is chosen; assumption
LEAST = 1e-7  # of a probability, before its logarithm

Answer = Callable[[np.ndarray], np.ndarray]


def logistic(train: Samples, test: Samples) -> Baseline:
    """Fit a linear model; its strength of penalty is chosen on held-out rows.

    Numbers are standardized, categories get a column for each frequent value, pixels
    are scaled to 0 to 1.

    Args:
      train: classes, yes or no, or quantities, one a row.
      test: rows to answer for.

    Raises:
      NotHere: the targets are none of these, or there are too many features.
      ImportError: scikit-learn is not installed.
    """
    import sklearn  # noqa: F401  before the work, if it is missing

    data = fitting(
        train,
        test,
        lambda features: MOST_CELLS // features,
    )
    if train.task == "quantities":
        strength = chosen(RIDGE, _ridge, nearness, data, MOST_TO_CHOOSE)
        outputs = _ridge(
            strength,
            data.inputs,
            data.targets,
        )(data.test)
        shape = (len(test), *test.targets.shape[1:])
        fitted = f"on {data.said}, penalty {strength:g}"
        return Baseline("ridge regression", fitted, outputs.reshape(shape))
    strength = chosen(STRENGTHS, _regression, hits, data, MOST_TO_CHOOSE)
    shares = _regression(
        strength,
        data.inputs,
        data.targets,
    )(data.test)
    fitted = f"on {data.said}, C = {strength:g}"
    return Baseline(
        "logistic regression",
        fitted,
        outputs_of(shares, train, test),
    )


def outputs_of(shares: np.ndarray, train: Samples, test: Samples) -> np.ndarray:
    """Return probabilities (rows, classes) as a model's outputs."""
    logs = np.log(
        np.maximum(
            shares,
            LEAST,
        )
    ).astype(np.float32)
    if train.task != "binary":
        return logs
    return (logs[:, 1] - logs[:, 0]).reshape(test.targets.shape)


def _regression(
    strength: float,
    inputs: np.ndarray,
    targets: np.ndarray,
) -> Answer:
    """Fit a logistic regression; answer with probabilities by the class's number."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    known = np.unique(targets).astype(int)
    count = max(2, known.max() + 1)

    def spread(shares: np.ndarray) -> np.ndarray:
        placed = np.zeros((len(shares), count))
        placed[:, known] = shares
        return placed

    if len(known) == 1:
        return lambda rows: spread(np.ones((len(rows), 1)))
    model = LogisticRegression(C=strength, max_iter=ITERATIONS)
    with few_threads(inputs.size), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(inputs, targets.astype(int))
    return lambda rows: spread(model.predict_proba(rows))


def _ridge(strength: float, inputs: np.ndarray, targets: np.ndarray) -> Answer:
    """Fit a ridge regression."""
    from sklearn.linear_model import Ridge

    model = Ridge(alpha=strength).fit(
        inputs,
        targets,
    )
    return model.predict

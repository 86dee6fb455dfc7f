"""Logistic regression and a factorization machine on numbers and coded categories.

Both minimize the log loss plus half of a strength times the squares of
their weights, by L-BFGS on all rows at once; the strength is the one of a few that has
the least log loss on a held-out fifth of the training rows. The features are those of
`lepton_jax.models.FactorizationMachine`: numbers, marks of the missing ones, and a
weight for each value of a category.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples

# Strengths to choose from: scikit-learn's 1 / C; those of the vectors' squares.
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0)
VECTOR_STRENGTHS = (3.0, 10.0, 30.0, 100.0)
DIM = 4  # of the vectors; assumption: small data have no use for more
START = 0.1  # standard deviation of the vectors' entries at the start; assumption
ITERATIONS = 200  # of L-BFGS; assumption
HELD_OUT = 0.2  # of the training rows, to choose by


class Features(NamedTuple):
    """Rows as both methods take them.

    Attributes:
      marked: float32 (rows, 2 * numbers).
      codes: int32 (rows, categories), each category with a range of its own.
    """

    marked: Any
    codes: Any


def linear_clicks(train: Samples, test: Samples) -> Baseline:
    """Fit a logistic regression.

    Args:
      train: "numbers" and "categories" among the inputs, targets 0 and 1.
      test: the same.

    Raises:
      NotHere: the samples are others.
    """
    logits, strengths = _chosen(train, test, itertools.product(STRENGTHS, (None,)))
    fitted = f"on {len(train):,} rows, C = {1 / strengths[0]:.3g}"
    return Baseline("logistic regression", fitted, logits)


def factorization_machine(train: Samples, test: Samples) -> Baseline:
    """Fit a factorization machine (Rendle 2010); see `linear_clicks`."""
    grid = itertools.product(STRENGTHS[1:4], VECTOR_STRENGTHS)
    logits, strengths = _chosen(train, test, grid)
    fitted = (
        f"on {len(train):,} rows, {DIM} dims, penalties {strengths[0]:g} and"
        f" {strengths[1]:g}"
    )
    return Baseline("factorization machine", fitted, logits)


# ---- internals ----


def _chosen(train: Samples, test: Samples, grid: Any) -> tuple[np.ndarray, Any]:
    """Return the test rows' logits with the best strengths, and these."""
    is_clicks = isinstance(train.inputs, dict) and np.ndim(train.targets) == 1
    if not is_clicks or not set(train.inputs) <= {"numbers", "categories"}:
        raise NotHere("the samples are not numbers and categories with a click or none")
    rows, tested, size = _features(train, test)
    targets = np.asarray(train.targets, np.float32)

    order = np.random.default_rng(0).permutation(len(train))
    held = order[: round(HELD_OUT * len(train))]
    rest = order[len(held) :]

    def held_loss(strengths: Any) -> float:
        logits = _fit(_take(rows, rest), targets[rest], size, strengths)
        values = logits(_take(rows, held))
        return float(
            np.logaddexp(0, np.where(targets[held] > 0, -values, values)).mean()
        )

    best = min(grid, key=held_loss)
    return _fit(rows, targets, size, best)(tested), best


def _features(train: Samples, test: Samples) -> tuple[Features, Features, int]:
    """Return both parts' features, and how many values the categories have."""
    parts = []
    sizes: Sequence[int] = ()
    for rows in (train, test):
        codes = rows.inputs.get("categories", np.zeros((len(rows), 0)))
        numbers = rows.inputs.get("numbers", np.zeros((len(rows), 0), np.float32))
        marked = np.concatenate([np.nan_to_num(numbers), np.isnan(numbers)], axis=1)
        parts.append((np.float32(marked), np.int32(codes)))
    both = np.concatenate([codes for _, codes in parts])
    sizes = (both.max(axis=0, initial=-1) + 1).tolist()
    starts = np.asarray([0, *itertools.accumulate(sizes)][: len(sizes)], np.int32)
    first, second = (Features(marked, codes + starts) for marked, codes in parts)
    return first, second, sum(sizes)


def _take(rows: Features, index: np.ndarray) -> Features:
    return Features(rows.marked[index], rows.codes[index])


def _fit(rows: Features, targets: np.ndarray, size: int, strengths: Any) -> Any:
    """Return the fitted function of features to logits."""
    count = rows.marked.shape[1] + size
    start = {"bias": jnp.zeros(()), "weights": jnp.zeros(count)}
    if strengths[1] is not None:
        key = jax.random.key(0)
        start["vectors"] = START * jax.random.normal(key, (count, DIM))
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    given = jnp.asarray(strengths[0]), jnp.asarray(strengths[1] or 0.0)
    objective = jax.jit(jax.value_and_grad(partial(_objective, unravel=unravel)))

    def value(x: np.ndarray) -> tuple[float, np.ndarray]:
        total, gradient = objective(jnp.float32(x), rows, targets, given)
        return float(total), np.float64(gradient)

    options = {"maxiter": ITERATIONS}
    found = minimize(
        value, np.float64(flat), jac=True, method="L-BFGS-B", options=options
    )
    fitted = unravel(jnp.float32(found.x))
    return lambda rows: np.asarray(_logits(fitted, rows))


def _objective(
    flat: Any, rows: Features, targets: Any, strengths: Any, unravel: Any
) -> Any:
    parameters = unravel(flat)
    logits = _logits(parameters, rows)
    losses = jnp.logaddexp(0, jnp.where(targets > 0, -logits, logits))
    squares = strengths[0] * jnp.square(parameters["weights"]).sum()
    if "vectors" in parameters:
        squares += strengths[1] * jnp.square(parameters["vectors"]).sum()
    return losses.sum() + squares / 2


def _logits(parameters: dict[str, Any], rows: Features) -> Any:
    numbers = rows.marked.shape[1]
    weights = parameters["weights"]
    logits = parameters["bias"] + rows.marked @ weights[:numbers]
    logits = logits + weights[numbers:][rows.codes].sum(1)
    if "vectors" not in parameters:
        return logits
    vectors = parameters["vectors"]
    of_numbers = rows.marked[..., None] * vectors[:numbers]
    features = jnp.concatenate([of_numbers, vectors[numbers:][rows.codes]], axis=1)
    products = jnp.square(features.sum(1)) - jnp.square(features).sum(1)
    return logits + products.sum(-1) / 2

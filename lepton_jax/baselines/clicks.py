"""Logistic regression and a factorization machine on numbers and coded categories.

Both minimize the log loss plus half of a strength times the squares of
their weights, by L-BFGS on all rows at once; the strength is the one of a few that has
the least log loss on a held-out fifth of the training rows. The features are those of
`lepton_jax.models.FactorizationMachine`: numbers, marks of the missing ones, and a
weight for each value of a category.
"""

from __future__ import annotations

import itertools
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
        logits_of = _fit(_take(rows, rest), targets[rest], size, strengths)
        logits = logits_of(_take(rows, held))
        against = np.where(targets[held] > 0, -logits, logits)
        return float(np.logaddexp(0, against).mean())

    best = min(grid, key=held_loss)
    return _fit(rows, targets, size, best)(tested), best


def _features(train: Samples, test: Samples) -> tuple[Features, Features, int]:
    """Return both parts' features, and how many values the categories have."""
    parts = [_blocks(train), _blocks(test)]
    codes = np.concatenate([part.codes for part in parts])
    sizes = codes.max(axis=0, initial=-1) + 1
    starts = np.cumsum(sizes) - sizes
    own = [part._replace(codes=part.codes + starts.astype(np.int32)) for part in parts]
    return own[0], own[1], int(sizes.sum())


def _blocks(rows: Samples) -> Features:
    nothing = np.zeros((len(rows), 0), np.float32)
    numbers = rows.inputs.get("numbers", nothing)
    codes = rows.inputs.get("categories", nothing)
    missing = np.isnan(numbers)
    marked = np.concatenate([np.nan_to_num(numbers), missing], axis=1)
    return Features(np.float32(marked), np.int32(codes))


def _take(rows: Features, index: np.ndarray) -> Features:
    return Features(rows.marked[index], rows.codes[index])


def _fit(rows: Features, targets: np.ndarray, size: int, strengths: Any) -> Any:
    """Return the fitted function of features to logits.

    The parameters are one vector: a bias, a weight for each feature, and `DIM` more for
    each if there are vectors.
    """
    dim = 0 if strengths[1] is None else DIM
    count = rows.marked.shape[1] + size
    draw = np.random.default_rng(0)
    start = np.zeros(1 + count + count * dim)
    start[1 + count :] = START * draw.normal(size=count * dim)
    given = (float(strengths[0]), float(strengths[1] or 0))

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        total, slope = _objective(np.float32(flat), rows, targets, given, dim)
        return float(total), np.asarray(slope, np.float64)

    options = {"maxiter": ITERATIONS}
    found = minimize(value, start, jac=True, method="L-BFGS-B", options=options)
    fitted = np.float32(found.x)
    return lambda rows: np.asarray(_logits(fitted, rows, dim))


@partial(jax.jit, static_argnames="dim")
@jax.value_and_grad
def _objective(
    flat: jax.Array,
    rows: Features,
    targets: jax.Array,
    strengths: tuple[jax.Array, jax.Array],
    dim: int,
) -> jax.Array:
    logits = _logits(flat, rows, dim)
    against = jnp.where(targets > 0, -logits, logits)
    count = (len(flat) - 1) // (1 + dim)
    weights = jnp.square(flat[1 : 1 + count]).sum()
    vectors = jnp.square(flat[1 + count :]).sum()
    penalty = strengths[0] * weights + strengths[1] * vectors
    return jnp.logaddexp(0, against).sum() + penalty / 2


@partial(jax.jit, static_argnames="dim")
def _logits(flat: jax.Array, rows: Features, dim: int) -> jax.Array:
    count = (len(flat) - 1) // (1 + dim)
    numbers = rows.marked.shape[1]
    weights = flat[1 : 1 + count]
    logits = flat[0] + rows.marked @ weights[:numbers]
    logits = logits + weights[numbers:][rows.codes].sum(1)
    if not dim:
        return logits

    vectors = flat[1 + count :].reshape(count, dim)
    of_numbers = rows.marked[..., None] * vectors[:numbers]
    of_codes = vectors[numbers:][rows.codes]
    features = jnp.concatenate([of_numbers, of_codes], axis=1)
    products = jnp.square(features.sum(1)) - jnp.square(features).sum(1)
    return logits + products.sum(-1) / 2

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


class Strengths(NamedTuple):
    """What is held against the parameters' squares.

    Attributes:
      weights: of the features' weights.
      vectors: of the features' vectors; None: they have none.
    """

    weights: float
    vectors: float | None = None


def linear_clicks(train: Samples, test: Samples) -> Baseline:
    """Fit a logistic regression.

    Args:
      train: "numbers" and "categories" among the inputs, targets 0 and 1.
      test: the same.

    Raises:
      NotHere: the samples are others.
    """
    grid = [Strengths(strength) for strength in STRENGTHS]
    logits, strengths = _chosen(train, test, grid)
    fitted = f"on {len(train):,} rows, C = {1 / strengths.weights:.3g}"
    return Baseline("logistic regression", fitted, logits)


def factorization_machine(train: Samples, test: Samples) -> Baseline:
    """Fit a factorization machine (Rendle 2010); see `linear_clicks`."""
    both = itertools.product(
        STRENGTHS[1:4],
        VECTOR_STRENGTHS,
    )
    grid = [Strengths(*pair) for pair in both]
    logits, strengths = _chosen(train, test, grid)
    fitted = (
        f"on {len(train):,} rows, {DIM} dims, penalties {strengths.weights:g} and"
        f" {strengths.vectors:g}"
    )
    return Baseline("factorization machine", fitted, logits)


# ---- internals ----


def _chosen(
    train: Samples,
    test: Samples,
    grid: Sequence[Strengths],
) -> tuple[np.ndarray, Strengths]:
    """Return the test rows' logits with the best strengths, and these."""
    has_names = isinstance(train.inputs, dict)
    is_known = has_names and set(train.inputs) <= {"numbers", "categories"}
    if not is_known or np.ndim(train.targets) != 1:
        raise NotHere("the samples are not numbers and categories with a click or none")
    rows, tested, size = _features(train, test)
    targets = np.asarray(train.targets, np.float32)

    generator = np.random.default_rng(0)
    order = generator.permutation(len(train))
    count = round(HELD_OUT * len(train))
    held = order[:count]
    rest = order[count:]
    known = _take(rows, rest)
    asked = _take(rows, held)

    def held_loss(strengths: Strengths) -> float:
        logits_of = _fit(
            known,
            targets[rest],
            size,
            strengths,
        )
        losses = _losses(logits_of(asked), targets[held])
        return float(losses.mean())

    best = min(grid, key=held_loss)
    logits_of = _fit(rows, targets, size, best)
    return logits_of(tested), best


def _features(
    train: Samples,
    test: Samples,
) -> tuple[Features, Features, int]:
    """Return both parts' features, and how many values the categories have."""
    known = _blocks(train)
    asked = _blocks(test)
    codes = np.concatenate([known.codes, asked.codes])
    largest = codes.max(axis=0, initial=-1)
    sizes = largest + 1
    starts = np.cumsum(sizes) - sizes
    own = (codes + starts).astype(np.int32)
    return (
        known._replace(codes=own[: len(train)]),
        asked._replace(codes=own[len(train) :]),
        int(sizes.sum()),
    )


def _blocks(rows: Samples) -> Features:
    nothing = np.zeros((len(rows), 0))
    numbers = rows.inputs.get("numbers", nothing)
    codes = rows.inputs.get("categories", nothing)
    missing = np.isnan(numbers)
    values = np.nan_to_num(numbers)
    marked = np.concatenate([values, missing], axis=1)
    return Features(
        np.float32(marked),
        np.int32(codes),
    )


def _take(
    rows: Features,
    index: np.ndarray,
) -> Features:
    return Features(
        rows.marked[index],
        rows.codes[index],
    )


def _fit(
    rows: Features,
    targets: np.ndarray,
    size: int,
    strengths: Strengths,
) -> Any:
    """Return the fitted function of features to logits.

    The parameters are one vector: a bias, a weight for each feature, and `DIM` more for
    each if there are vectors.
    """
    # only here: nobody else pays for it
    from scipy.optimize import minimize

    dim = 0 if strengths.vectors is None else DIM
    count = rows.marked.shape[1] + size
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=count * dim)
    weights = np.zeros(1 + count)
    start = np.concatenate([weights, START * vectors])
    given = Strengths(
        float(strengths.weights),
        float(strengths.vectors or 0),
    )

    def value(flat: np.ndarray) -> tuple[float, np.ndarray]:
        total, slope = _objective(
            np.float32(flat),
            rows,
            targets,
            given,
            dim,
        )
        return float(total), np.asarray(slope, np.float64)

    found = minimize(
        value,
        start,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": ITERATIONS},
    )
    fitted = np.float32(found.x)

    def logits_of(rows: Features) -> np.ndarray:
        return np.asarray(_logits(fitted, rows, dim))

    return logits_of


def _losses(logits: Any, targets: Any) -> Any:
    """Return the log loss of each row."""
    signs = 1 - 2 * (targets > 0)
    return jnp.logaddexp(0, signs * logits)


def _parts(flat: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
    """Return the features' weights (count,) and their vectors (count, dim)."""
    count = (len(flat) - 1) // (1 + dim)
    weights = flat[1 : 1 + count]
    vectors = flat[1 + count :]
    return weights, vectors.reshape(count, dim)


@partial(jax.jit, static_argnames="dim")
@jax.value_and_grad
def _objective(
    flat: jax.Array,
    rows: Features,
    targets: jax.Array,
    strengths: Any,
    dim: int,
) -> jax.Array:
    logits = _logits(flat, rows, dim)
    losses = _losses(logits, targets)
    weights, vectors = _parts(flat, dim)
    of_weights = jnp.square(weights).sum()
    of_vectors = jnp.square(vectors).sum()
    penalty = strengths.weights * of_weights
    penalty = penalty + strengths.vectors * of_vectors
    return losses.sum() + penalty / 2


@partial(jax.jit, static_argnames="dim")
def _logits(
    flat: jax.Array,
    rows: Features,
    dim: int,
) -> jax.Array:
    numbers = rows.marked.shape[1]
    codes = numbers + rows.codes
    weights, vectors = _parts(flat, dim)
    logits = flat[0] + rows.marked @ weights[:numbers]
    logits = logits + weights[codes].sum(1)
    if not dim:
        return logits

    of_numbers = rows.marked[..., None] * vectors[:numbers]
    features = jnp.concatenate(
        [of_numbers, vectors[codes]],
        axis=1,
    )
    of_sums = jnp.square(features.sum(1))
    products = of_sums - jnp.square(features).sum(1)
    return logits + products.sum(-1) / 2

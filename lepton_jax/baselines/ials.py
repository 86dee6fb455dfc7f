"""Matrix factorization of who used what, by alternating least squares, in JAX.

The objective of Hu et al. 2008, "Collaborative Filtering for Implicit Feedback
Datasets", as Rendle et al. 2022, "Revisiting the Performance of iALS on Item
Recommendation Benchmarks" (section 2), write it: with the vectors w of users and h of
items, S the observed pairs, and N how many pairs a row has,

    sum over S of (w.h - 1)^2
      + unobserved * sum over all pairs of (w.h)^2
      + regularization * sum over rows of (N + unobserved * others) * |row|^2

With the items fixed, the best vector of each user is the solution of dim equations:

    (sum of h h' over the user's items + unobserved * H'H + weight * I) w = sum of h

H'H is computed once for all users, so a pass costs time by the observed pairs and not
by all of them. Rows of about the same count are solved together: each block is filled
up to the longest of its rows, with items of weight 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.baselines.baseline import Baseline, Samples
from lepton_jax.baselines.pairs import Pairs, ranking

# Settings that Rendle et al. 2022 found for MovieLens 1M and 20M lie around these; that
# they suit small data is an assumption.
DIM = 64
PASSES = 12
UNOBSERVED = 0.1
REGULARIZATION = 0.01
SPREAD = 0.1  # standard deviation of the first vectors' norm; Rendle et al.

# Observed pairs that are solved together, filling included: 2^16 vectors of 64 floats
# are 16 MB. Assumption.
BLOCK_PAIRS = 2**16
MOST_ROWS = 2**10  # of a block: as many square matrices of dim x dim


class Factors(NamedTuple):
    """Vectors whose products are the scores.

    Attributes:
      users: float32 (users, dim).
      items: float32 (items, dim).
    """

    users: jax.Array
    items: jax.Array


def ials(
    train: Samples,
    test: Samples,
    *,
    dim: int = DIM,
    passes: int = PASSES,
    unobserved: float = UNOBSERVED,
    regularization: float = REGULARIZATION,
    items: int | None = None,
    shown: np.ndarray | None = None,
) -> Baseline:
    """Rank all items by the products of factors.

    Args:
      train: users, and as targets the items that they used.
      test: users to rank items for.
      dim: of the vectors.
      passes: over users and items.
      unobserved: weight of the pairs that were not observed.
      regularization: weight of the vectors' norms.
      items: how many items there are; None: as many as the model's outputs.
      shown: items that are candidates; None: all.
    """
    pairs = Pairs.of(train, items)
    factors = factorize(
        pairs,
        dim=dim,
        passes=passes,
        unobserved=unobserved,
        regularization=regularization,
    )
    last = pairs.user_count - 1
    users = np.minimum(test.inputs["user"], last)
    of_users = np.asarray(factors.users)
    of_items = np.asarray(factors.items)
    scores = of_users[users] @ of_items.T
    fitted = (
        f"{passes} passes over {len(pairs.users):,} pairs, {dim} dims, weight"
        f" {unobserved:g} for what was not observed"
    )
    ranked = ranking(scores, pairs, test, shown)
    return Baseline("iALS", fitted, ranked)


def factorize(
    pairs: Pairs,
    *,
    dim: int = DIM,
    passes: int = PASSES,
    unobserved: float = UNOBSERVED,
    regularization: float = REGULARIZATION,
    seed: int = 0,
) -> Factors:
    """Fit the factors of observed pairs.

    Args:
      pairs: who used what.
      dim: of the vectors.
      passes: over users and items.
      unobserved: weight of the pairs that were not observed.
      regularization: weight of the vectors' norms.
      seed: of the first vectors.
    """
    keys = jax.random.split(jax.random.key(seed))
    users = _drawn(keys[0], pairs.user_count, dim)
    items = _drawn(keys[1], pairs.item_count, dim)

    solve = partial(
        _solved,
        unobserved=unobserved,
        regularization=regularization,
    )
    user_blocks = _blocks(
        pairs.users,
        pairs.items,
        pairs.user_count,
    )
    item_blocks = _blocks(
        pairs.items,
        pairs.users,
        pairs.item_count,
    )
    of_users = list(user_blocks)
    of_items = list(item_blocks)
    for _ in range(passes):
        users = solve(users, items, of_users)
        items = solve(items, users, of_items)
    return Factors(users, items)


class Block(NamedTuple):
    """Rows that are solved together.

    Attributes:
      rows: int32 (rows,), positions of the rows that are solved.
      others: int32 (rows, longest), positions of what each was observed with.
      weights: float32 (rows, longest), 0 for filling.
    """

    rows: np.ndarray
    others: np.ndarray
    weights: np.ndarray


# ---- internals ----


def _drawn(
    key: jax.Array,
    count: int,
    dim: int,
) -> jax.Array:
    """Return the first vectors (count, dim)."""
    spread = SPREAD / dim**0.5
    return spread * jax.random.normal(key, (count, dim))


def _blocks(
    own: np.ndarray,
    others: np.ndarray,
    count: int,
) -> Iterator[Block]:
    """Yield the rows in blocks of about the same number of pairs.

    The width of a block is a power of two, so that there are few shapes to compile.
    """
    order = np.argsort(own, kind="stable")
    sizes = np.bincount(own, minlength=count)
    starts = np.cumsum(sizes) - sizes
    others = others[order]
    doublings = np.ceil(np.log2(np.maximum(sizes, 1)))
    widths = 2 ** doublings.astype(int)
    for width in np.unique(widths):
        rows = np.flatnonzero(widths == width)
        fitting = max(1, BLOCK_PAIRS // int(width))
        height = min(MOST_ROWS, fitting, len(rows))
        places = np.arange(width)
        for start in range(0, len(rows), height):
            part = rows[start : start + height]
            # the last block is filled up with rows that are solved twice
            part = np.resize(part, height)
            is_there = places < sizes[part, None]
            columns = starts[part, None] + places
            columns[~is_there] = 0
            found = others[columns]
            yield Block(
                part.astype(np.int32),
                found.astype(np.int32),
                is_there.astype(np.float32),
            )


def _solved(
    vectors: jax.Array,
    fixed: jax.Array,
    blocks: list[Block],
    *,
    unobserved: float,
    regularization: float,
) -> jax.Array:
    """Return the vectors after each row was solved for the fixed ones."""
    shared = unobserved * fixed.T @ fixed
    for block in blocks:
        solved = _solve(
            fixed,
            shared,
            block.others,
            block.weights,
            unobserved,
            regularization,
        )
        place = vectors.at[block.rows]
        vectors = place.set(solved)
    return vectors


@jax.jit
def _solve(
    fixed: jax.Array,
    shared: jax.Array,
    others: jax.Array,
    weights: jax.Array,
    unobserved: float,
    regularization: float,
) -> jax.Array:
    """Return the best vectors (rows, dim) of a block's rows."""
    found = fixed[others] * weights[..., None]
    squares = jnp.einsum("rld,rle->rde", found, found)
    rows, dim = fixed.shape
    counts = weights.sum(1) + unobserved * rows
    penalties = regularization * counts
    diagonal = jnp.eye(dim) * penalties[:, None, None]
    left = squares + shared + diagonal
    right = found.sum(1)[..., None]
    factor = jax.scipy.linalg.cho_factor(left)
    solved = jax.scipy.linalg.cho_solve(factor, right)
    return solved[..., 0]

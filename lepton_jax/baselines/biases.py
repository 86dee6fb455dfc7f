"""How a user rates, and how an item is rated: biases alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples

# A bias of n ratings is drawn to 0 by weight / (n + weight). Koren 2008, "Factorization
# Meets the Neighborhood", section 2.1, draws with such constants; these were chosen on
# a validation tenth of MovieLens latest small.
USER_WEIGHT = 5.0
ITEM_WEIGHT = 4.0


def biases(
    train: Samples,
    test: Samples,
    *,
    user_weight: float = USER_WEIGHT,
    item_weight: float = ITEM_WEIGHT,
) -> Baseline:
    """Predict the mean rating plus a bias of the user and one of the item.

    Both are fitted at once, by ridge regression: an exact solution of sparse equations.

    Args:
      train: "user" and "item" among the inputs, and ratings (rows,) as targets.
      test: the same.
      user_weight: of the squares of the users' biases.
      item_weight: of the squares of the items' biases.

    Raises:
      NotHere: the samples are others.
    """
    # only here: nobody else pays for sparse equations
    from scipy import sparse
    from scipy.sparse.linalg import spsolve

    has_names = isinstance(train.inputs, dict)
    is_pair = has_names and {"user", "item"} <= set(train.inputs)
    if not is_pair or np.ndim(train.targets) != 1:
        raise NotHere("the samples are not a user and an item with a rating")
    users = _count("user", train, test)
    items = _count("item", train, test)
    mean = train.targets.mean(dtype=np.float64)

    known = _one_hot(train, users, items)
    weights = np.repeat(
        [user_weight, item_weight],
        [users, items],
    )
    squares = known.T @ known
    squares += sparse.diags_array(weights)
    right = known.T @ (train.targets - mean)
    solution = spsolve(squares.tocsc(), right)

    asked = _one_hot(test, users, items)
    outputs = mean + asked @ solution
    fitted = f"by ridge regression on {len(train):,} ratings"
    return Baseline("biases alone", fitted, np.float32(outputs))


def _count(name: str, train: Samples, test: Samples) -> int:
    """Return how many users, or items, there are in both parts."""
    most = [rows.inputs[name].max() for rows in (train, test)]
    return 1 + int(max(most))


def _one_hot(
    rows: Samples,
    users: int,
    items: int,
) -> Any:
    """Return float64 (rows, users + items), sparse: two ones in each row."""
    from scipy import sparse

    user = rows.inputs["user"]
    item = users + rows.inputs["item"]
    columns = np.stack([user, item], axis=1).ravel()
    row = np.arange(len(rows))
    index = np.repeat(row, 2)
    ones = np.ones(columns.size)
    return sparse.csr_array(
        (ones, (index, columns)),
        shape=(len(rows), users + items),
    )

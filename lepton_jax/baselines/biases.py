"""How a user rates, and how an item is rated: biases alone."""

from __future__ import annotations

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import spsolve

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
    is_pair = isinstance(train.inputs, dict) and {"user", "item"} <= set(train.inputs)
    if not is_pair or np.ndim(train.targets) != 1:
        raise NotHere("the samples are not a user and an item with a rating")
    users = 1 + int(max(rows.inputs["user"].max() for rows in (train, test)))
    items = 1 + int(max(rows.inputs["item"].max() for rows in (train, test)))
    mean = train.targets.mean(dtype=np.float64)

    known = _one_hot(train, users, items)
    weights = np.repeat([user_weight, item_weight], [users, items])
    squares = known.T @ known + sparse.diags_array(weights)
    right = known.T @ (train.targets - mean)
    solution = spsolve(squares.tocsc(), right)

    outputs = mean + _one_hot(test, users, items) @ solution
    fitted = f"by ridge regression on {len(train):,} ratings"
    return Baseline("biases alone", fitted, np.float32(outputs))


def _one_hot(rows: Samples, users: int, items: int) -> sparse.csr_array:
    """Return float64 (rows, users + items): two ones in each row."""
    columns = np.stack([rows.inputs["user"], users + rows.inputs["item"]], axis=1)
    ones = np.ones(columns.size)
    index = np.repeat(np.arange(len(rows)), 2)
    shape = (len(rows), users + items)
    return sparse.csr_array((ones, (index, columns.ravel())), shape=shape)

"""Items that are used together: the nearest neighbours of what a user has used."""

from __future__ import annotations

import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples
from lepton_jax.baselines.pairs import Pairs, ranking

# The ranges that Dacrema et al. 2019 search are 5 to 1000 neighbours and a shrinkage
# of 0 to 1000; that these suit small data is an assumption.
NEIGHBOURS = 200
SHRINKAGE = 20.0

# Similarities are held as a square matrix of float32: 1.6 GB. Assumption.
MOST_ITEMS = 20_000


def item_knn(
    train: Samples,
    test: Samples,
    *,
    neighbours: int = NEIGHBOURS,
    shrinkage: float = SHRINKAGE,
    items: int | None = None,
    shown: np.ndarray | None = None,
) -> Baseline:
    """Rank all items by their similarity to those that the user has used.

    The similarity of two items is the cosine of their users, shrunk where few have
    used them: common / (sqrt(users of one) sqrt(users of the other) + shrinkage). See
    Dacrema et al. 2019, "Are We Really Making Much Progress?", section 3.2.

    Args:
      train: users, and as targets the items that they used.
      test: users to rank items for.
      neighbours: items whose similarity to an item counts; the others' is 0.
      shrinkage: added to the denominator.
      items: how many items there are; None: as many as the model's outputs.
      shown: items that are candidates; None: all.

    Raises:
      NotHere: there are more items than a square matrix of them can be held of.
    """
    pairs = Pairs.of(train, items)
    if pairs.item_count > MOST_ITEMS:
        raise NotHere(f"{pairs.item_count:,} items are more than {MOST_ITEMS:,}")
    used = pairs.matrix()
    near = similarities(used, neighbours, shrinkage)
    last = len(used) - 1
    users = np.minimum(test.inputs["user"], last)
    scores = used[users] @ near
    fitted = (
        f"{neighbours} neighbours by cosine, shrunk by {shrinkage:g}, of"
        f" {len(pairs.users):,} pairs"
    )
    ranked = ranking(scores, pairs, test, shown)
    return Baseline("ItemKNN", fitted, ranked)


def similarities(
    used: np.ndarray,
    neighbours: int,
    shrinkage: float,
) -> np.ndarray:
    """Return the similarity (items, items) of each row's item as a column's neighbour.

    Args:
      used: float32 (users, items), 1 where a user has used an item.
      neighbours: how many similarities of a column stay.
      shrinkage: added to the denominator.
    """
    common = used.T @ used
    norms = np.sqrt(np.diag(common))
    shrunk = np.outer(norms, norms) + shrinkage
    near = common / np.maximum(shrunk, 1e-6)
    np.fill_diagonal(near, 0)
    if neighbours < len(near):
        ordered = np.partition(near, -neighbours, axis=0)
        near[near < ordered[-neighbours]] = 0
    return near

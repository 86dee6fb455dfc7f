"""The items that most users have used."""

from __future__ import annotations

import numpy as np

from lepton_jax.baselines.baseline import Baseline, Samples
from lepton_jax.baselines.pairs import Pairs, ranking


def popularity(
    train: Samples,
    test: Samples,
    *,
    items: int | None = None,
    shown: np.ndarray | None = None,
) -> Baseline:
    """Rank all items by how many users have used them.

    Args:
      train: users, and as targets the items that they used.
      test: users to rank items for.
      items: how many items there are; None: as many as the model's outputs.
      shown: items that are candidates; None: all.
    """
    pairs = Pairs.of(train, items)
    count = pairs.item_count
    counts = np.bincount(pairs.items, minlength=count)
    # among equal counts chance decides, and not the items' numbers
    generator = np.random.default_rng(0)
    order = generator.random(count)
    row = np.float32(counts + order)
    scores = np.tile(row, (len(test), 1))
    fitted = f"counted in {len(pairs.users):,} pairs"
    ranked = ranking(scores, pairs, test, shown)
    return Baseline("popularity", fitted, ranked)

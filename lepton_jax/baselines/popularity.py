"""The items that most users have used."""

from __future__ import annotations

import numpy as np

from lepton_jax.baselines.baseline import Baseline, Samples
from lepton_jax.baselines.pairs import Pairs, ranking


def popularity(train: Samples, test: Samples) -> Baseline:
    """Rank all items by how many users have used them.

    Args:
      train: users, and as targets the items that they used.
      test: users to rank items for.
    """
    pairs = Pairs.of(train)
    counts = np.bincount(pairs.items, minlength=pairs.item_count)
    scores = np.tile(np.float32(counts), (len(test), 1))
    fitted = f"counted in {len(pairs.users):,} pairs"
    return Baseline("popularity", fitted, ranking(scores, pairs, test))

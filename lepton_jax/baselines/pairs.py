"""Observed pairs of users and items, as the rankings among the baselines take them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lepton_jax.baselines.baseline import NotHere, Samples

# Score of an item that a user has already used: below each other one, but finite, so
# that a loss of the scores is too.
SEEN = -1e9


@dataclass(frozen=True, eq=False)
class Pairs:
    """Who used what, each pair once.

    Attributes:
      users: int32 (pairs,).
      items: int32 (pairs,).
      user_count: how many users there may be.
      item_count: how many items there may be.
    """

    users: np.ndarray
    items: np.ndarray
    user_count: int
    item_count: int

    @classmethod
    def of(cls, train: Samples, items: int | None = None) -> Pairs:
        """Return the pairs of samples of a user and, as the target, an item.

        Args:
          train: the samples.
          items: how many items there are; None: as many as the model's outputs.

        Raises:
          NotHere: the samples are others.
        """
        count = items or train.classes
        has_users = isinstance(train.inputs, dict) and "user" in train.inputs
        if not (has_users and count):
            raise NotHere("the samples are not users with an item each")
        user = np.asarray(train.inputs["user"], np.int64)
        item = np.asarray(train.targets, np.int64)
        codes = np.unique(user * count + item)
        users = (codes // count).astype(np.int32)
        return cls(
            users,
            (codes % count).astype(np.int32),
            int(users[-1]) + 1,
            count,
        )

    def matrix(self) -> np.ndarray:
        """Return float32 (users, items), 1 where a pair was observed."""
        matrix = np.zeros((self.user_count, self.item_count), np.float32)
        matrix[self.users, self.items] = 1
        return matrix


def ranking(
    scores: np.ndarray,
    pairs: Pairs,
    test: Samples,
    shown: np.ndarray | None = None,
) -> np.ndarray:
    """Return scores (rows, items) in which what is not to be recommended comes last.

    Args:
      scores: float (rows, items).
      pairs: of training; what a row's user has used is not recommended again.
      test: the rows.
      shown: items that are candidates; None: all.
    """
    users = np.asarray(test.inputs["user"])
    scores = np.array(scores, np.float32)
    starts = np.searchsorted(pairs.users, np.arange(pairs.user_count + 1))
    for row, user in enumerate(users):
        if user < pairs.user_count:
            scores[row, pairs.items[starts[user] : starts[user + 1]]] = SEEN
    if shown is not None:
        hidden = np.ones(pairs.item_count, bool)
        hidden[shown] = False
        scores[:, hidden] = SEEN
    return scores

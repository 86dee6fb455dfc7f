"""A recommender of two towers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
from flax import nnx

from lepton_jax.models.mlp import MLP


class TwoTower(nnx.Module):
    """A score for a user and an item: the product of a vector of each.

    Each vector is an embedding through an MLP, a tower; see Covington et al. 2016,
    "Deep Neural Networks for YouTube Recommendations", and Yi et al. 2019, "Sampling-
    Bias-Corrected Neural Modeling for Large Corpus Item Recommendations", section 3.

    Args:
      users: rows of the users' embedding.
      items: rows of the items' embedding.
      dim: width of an embedding.
      hidden: widths of the hidden layers of each tower.
      width: width of the vectors that are multiplied.
      center: added to the score, so that ratings, say, need not be learned from 0.
      dropout: share of the hidden units dropped.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        users: int,
        items: int,
        *,
        dim: int = 64,
        hidden: Sequence[int] = (128,),
        width: int = 64,
        center: float = 0.0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.center = center
        embed = partial(nnx.Embed, rngs=rngs)
        self.users = embed(users, dim)
        self.items = embed(items, dim)
        widths = (dim, *hidden, width)
        self.user_tower = MLP(widths, dropout=dropout, rngs=rngs)
        self.item_tower = MLP(widths, dropout=dropout, rngs=rngs)

    def __call__(
        self,
        user: jax.Array,
        item: jax.Array,
    ) -> jax.Array:
        """Map users and items, int32 (batch,) each, to scores (batch,)."""
        user_vector = self.user_tower(self.users(user))
        item_vector = self.item_tower(self.items(item))
        return self.center + (user_vector * item_vector).sum(-1)

"""A recommender of two towers."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from lepton_jax.models.mlp import MLP


class TwoTower(nnx.Module):
    """A vector for the user and one for the item, each an embedding through an MLP;
    their product is the score.

    Covington et al. 2016, "Deep Neural Networks for YouTube Recommendations", and Yi et
    al. 2019, "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
    Recommendations", section 3.

    Args:
      users, items: rows of the embeddings.
      dim: width of an embedding.
      hidden: widths of the hidden layers of each tower.
      width: of the vectors that are multiplied.
      center: added to the score, so that e.g. ratings need not be learned from 0.
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
        self.users = nnx.Embed(users, dim, rngs=rngs)
        self.items = nnx.Embed(items, dim, rngs=rngs)
        self.user_tower = MLP(
            (dim, *hidden, width),
            dropout=dropout,
            rngs=rngs,
        )
        self.item_tower = MLP(
            (dim, *hidden, width),
            dropout=dropout,
            rngs=rngs,
        )

    def __call__(
        self,
        user: jax.Array,
        item: jax.Array,
    ) -> jax.Array:
        """Users and items, int32 (batch,) each, to scores (batch,)."""
        return self.center + (
            self.user_tower(self.users(user)) * self.item_tower(self.items(item))
        ).sum(-1)

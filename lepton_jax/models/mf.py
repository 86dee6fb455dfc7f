"""Matrix factorization with biases."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx


class MatrixFactorization(nnx.Module):
    """A rating: biases of user, item and session, plus a product of two vectors.

    See Koren et al. 2009, "Matrix Factorization Techniques for Recommender Systems",
    equations 4 and 5, and Koren 2009, "Collaborative Filtering with Temporal
    Dynamics", section 3.2, for a bias that a user has on one day: here, in a session.

    Several members, each with vectors of its own but with shared biases, give as many
    ratings, whose mean has a smaller error than each of them. In training it gives the
    rating of each member, and the loss is to be a mean of theirs
    (`lepton_jax.losses.of_members`). Outside of it it gives their mean.

    Args:
      users: rows of the users' embeddings.
      items: rows of the items' embeddings.
      dim: width of the vectors; 0 for biases alone.
      sessions: rows of the sessions' biases; 0 for none.
      members: how many pairs of vectors a user and an item have.
      center: added to each rating, such as the mean of the ratings.
      scale: standard deviation of the vectors' entries at the start; the biases start
        at 0.
      deterministic: whether ratings are the members' mean; False in training.
      rngs: stream `params`.

    Raises:
      ValueError: `members` is below 1.
    """

    def __init__(
        self,
        users: int,
        items: int,
        *,
        dim: int = 8,
        sessions: int = 0,
        members: int = 1,
        center: float = 0.0,
        scale: float = 0.1,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        if members < 1:
            raise ValueError(f"members is {members}; it must be at least 1")
        self.center = center
        self.members = members
        self.dim = dim
        self.deterministic = deterministic

        def biases(rows: int) -> nnx.Embed:
            zeros = nnx.initializers.zeros_init()
            return nnx.Embed(rows, 1, embedding_init=zeros, rngs=rngs)

        def vectors(rows: int) -> nnx.Embed:
            normal = nnx.initializers.normal(scale)
            return nnx.Embed(rows, members * dim, embedding_init=normal, rngs=rngs)

        self.user_biases = biases(users)
        self.item_biases = biases(items)
        self.session_biases = biases(sessions) if sessions else None
        self.user_vectors = vectors(users) if dim else None
        self.item_vectors = vectors(items) if dim else None

    def __call__(
        self,
        user: jax.Array,
        item: jax.Array,
        session: jax.Array | None = None,
    ) -> jax.Array:
        """Map users, items and sessions to ratings.

        Args:
          user: int32 (batch,).
          item: int32 (batch,).
          session: int32 (batch,), if the model has sessions.

        Returns:
          (batch, members) in training, else (batch,).
        """
        if (session is None) != (self.session_biases is None):
            raise ValueError(
                "the model and its inputs must both have sessions, or none"
            )
        biases = self.user_biases(user) + self.item_biases(item)
        if self.session_biases is not None and session is not None:
            biases = biases + self.session_biases(session)
        products = jnp.zeros((1, self.members))
        if self.user_vectors is not None and self.item_vectors is not None:
            by_member = (-1, self.members, self.dim)
            left = self.user_vectors(user).reshape(by_member)
            right = self.item_vectors(item).reshape(by_member)
            products = (left * right).sum(-1)
        ratings = self.center + biases + products
        return ratings.mean(axis=1) if self.deterministic else ratings

"""Two towers that rank all items for a user."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.mlp import MLP

# Score of what is no candidate. It is finite, so that a loss of it is too.
OUT = -1e9
LEAST_SQUARE = 1e-12  # of a vector's length, before its root is divided by
BITS = 32  # of a word in the table of what users have used

Negatives = Literal["all", "in_batch", "sampled"]


class Known(nnx.Variable):
    """What is known of users and items: part of the state, but not trained."""


class Retrieval(nnx.Module):
    """A ranking of all items for a user: the product of a vector of each.

    The user's vector is an embedding, plus a weighted mean of an embedding of the items
    used last, through an MLP if one is asked for. The item's is an embedding, plus the
    mean of the embeddings of its features (words of a title, genres), through another.
    An item that nobody has used has its features alone; to learn to live with that, the
    item's own embedding is left out now and then (Volkovs et al. 2017, "DropoutNet").

    In training it gives the score of the item that was used, and those of items that
    were not, the negatives:

    - "all": all items that anybody has used; a softmax over a catalogue of thousands.
    - "in_batch": the items of the other rows of the batch, with their scores less the
      logarithm of how often they turn up (Yi et al. 2019, "Sampling-Bias-Corrected
      Neural Modeling for Large Corpus Item Recommendations", equation 3; the
      frequencies are counted, not estimated).
    - "sampled": `samples` items drawn for the batch, each as likely.

    In evaluation it gives the score of each item, with those that the user has used
    already at -1e9.

    Args:
      users: rows of the users' embedding; 0 for none: new users come then with their
        history alone.
      items: how many items there are; indices from 0.
      dim: width of the embeddings and of the vectors.
      hidden: widths of the hidden layers of each tower; none: no MLP.
      history: how many items used last are looked at; 0 for none.
      tied: whether the items used last have the embedding that is ranked, so that what
        follows an item leads to it, too.
      features: for each item, the indices of its features, from 0.
      counts: for each item, how many training rows have it.
      used: for each user, the items that are not to be recommended.
      negatives: see above.
      samples: how many items are drawn, with "sampled".
      cosine: whether the vectors have length 1; their product is divided by
        `temperature` then.
      temperature: see `cosine`.
      popularity: whether items have a bias.
      dropout: share of the user's vector, and of the hidden units, dropped.
      item_dropout: share of the items whose own embedding is left out in training.
      deterministic: whether it ranks all items; False in training.
      rngs: streams `params`, and `dropout` and `negatives` where they are drawn.

    Raises:
      ValueError: the settings contradict each other.
    """

    def __init__(
        self,
        users: int,
        items: int,
        *,
        dim: int = 64,
        hidden: Sequence[int] = (),
        history: int = 0,
        tied: bool = False,
        features: Sequence[Sequence[int]] = (),
        counts: Sequence[int] = (),
        used: Sequence[Sequence[int]] = (),
        negatives: Negatives = "all",
        samples: int = 512,
        cosine: bool = False,
        temperature: float = 0.1,
        popularity: bool = True,
        dropout: float = 0.0,
        item_dropout: float = 0.0,
        deterministic: bool = False,
        rngs: nnx.Rngs,
    ):
        _check(users, items, history, features, counts, negatives)
        self.negatives = negatives
        self.samples = samples
        self.cosine = cosine
        self.temperature = temperature
        self.item_dropout = item_dropout
        self.deterministic = deterministic

        normal = nnx.initializers.normal(dim**-0.5)

        def embedding(rows: int) -> nnx.Embed:
            return nnx.Embed(rows, dim, embedding_init=normal, rngs=rngs)

        self.users = embedding(users) if users else None
        self.items = embedding(items)
        self.history = embedding(items) if history and not tied else None
        # by one over how long ago: the item used last counts most
        ago = -jnp.log(jnp.arange(1.0, history + 1))
        self.recency = nnx.Param(ago) if history else None
        table = _padded(features)
        self.features = embedding(int(table.max()) + 1) if table.size else None
        self.feature_table = Known(jnp.asarray(table)) if table.size else None
        zeros = nnx.initializers.zeros_init()
        biases = partial(nnx.Embed, items, 1, embedding_init=zeros, rngs=rngs)
        self.biases = biases() if popularity else None
        counted = np.asarray(counts if len(counts) else np.ones(items), np.float32)
        self.counts = Known(jnp.asarray(counted))
        self.used = Known(jnp.asarray(_bits(used, items))) if len(used) else None

        widths = (dim, *hidden, dim)
        self.user_tower = MLP(widths, dropout=dropout, rngs=rngs) if hidden else None
        self.item_tower = MLP(widths, dropout=dropout, rngs=rngs) if hidden else None
        self.dropout = dropout_layer(dropout, rngs)
        draws = negatives == "sampled" or item_dropout
        self.draws = rngs.negatives.fork() if draws else None

    def __call__(
        self,
        user: jax.Array,
        history: jax.Array | None = None,
        item: jax.Array | None = None,
    ) -> Any:
        """Score items for users.

        Args:
          user: int32 (batch,).
          history: int32 (batch, history), the item used last first; -1 for none.
          item: int32 (batch,), the item that was used: needed in training alone.

        Returns:
          In evaluation, scores (batch, items). In training {"own": (batch,) scores of
          `item`, "others": (batch, negatives)}.
        """
        vectors = self.user_vectors(user, history)
        if self.deterministic:
            scores = self._scores(vectors, jnp.arange(self.items.num_embeddings))
            return self._without_used(scores, user)
        if item is None:
            raise ValueError("training needs the item of each row")

        others, correction = self._candidates(item)
        scores = self._scores(vectors, others) - correction
        is_own = others == item[:, None]
        if self.negatives == "all":
            own = jnp.take_along_axis(scores, item[:, None], axis=1)[:, 0]
        elif self.negatives == "in_batch":
            own = jnp.diagonal(scores)
        else:
            own = self._pair_scores(vectors, item)
        return {"own": own, "others": jnp.where(is_own, OUT, scores)}

    def user_vectors(
        self,
        user: jax.Array,
        history: jax.Array | None = None,
    ) -> jax.Array:
        """Return the vectors (batch, dim) of users with their histories."""
        parts = [] if self.users is None else [self.users(user)]
        if self.recency is not None:
            if history is None:
                raise ValueError("the model needs the items that a user has used last")
            is_there = history >= 0
            weights = jnp.exp(self.recency[...]) * is_there
            weights = weights / jnp.maximum(weights.sum(-1, keepdims=True), 1e-6)
            table = self.items if self.history is None else self.history
            rows = table(jnp.where(is_there, history, 0))
            parts.append(jnp.einsum("bl,bld->bd", weights, rows))
        vectors = sum(parts[1:], parts[0])
        if self.dropout is not None:
            vectors = self.dropout(vectors)
        if self.user_tower is not None:
            vectors = self.user_tower(vectors)
        return _of_length_one(vectors) if self.cosine else vectors

    def item_vectors(self, item: jax.Array) -> jax.Array:
        """Return the vectors (count, dim) of items (count,)."""
        is_known = (self.counts[...][item] > 0).astype(jnp.float32)
        if self.item_dropout and not self.deterministic and self.draws is not None:
            stays = 1 - self.item_dropout
            is_kept = jax.random.bernoulli(self.draws(), stays, item.shape)
            is_known = is_known * is_kept
        vectors = self.items(item) * is_known[:, None]
        if self.features is not None and self.feature_table is not None:
            of_item = self.feature_table[...][item]
            is_there = (of_item >= 0).astype(jnp.float32)
            count = jnp.maximum(is_there.sum(-1, keepdims=True), 1)
            rows = self.features(jnp.maximum(of_item, 0))
            vectors = vectors + jnp.einsum("cf,cfd->cd", is_there / count, rows)
        if self.item_tower is not None:
            vectors = self.item_tower(vectors)
        return _of_length_one(vectors) if self.cosine else vectors

    # ---- internals ----

    def _scores(self, vectors: jax.Array, item: jax.Array) -> jax.Array:
        """Return the scores (batch, count) of items (count,)."""
        scores = vectors @ self.item_vectors(item).T
        return self._scaled(scores) + self._bias(item)

    def _pair_scores(self, vectors: jax.Array, item: jax.Array) -> jax.Array:
        """Return the scores (batch,) of an item for each user."""
        scores = (vectors * self.item_vectors(item)).sum(-1)
        return self._scaled(scores) + self._bias(item)

    def _scaled(self, scores: jax.Array) -> jax.Array:
        return scores / self.temperature if self.cosine else scores

    def _bias(self, item: jax.Array) -> Any:
        if self.biases is None:
            return 0.0
        # what nobody has used has a bias that was never learned
        return self.biases(item)[:, 0] * (self.counts[...][item] > 0)

    def _candidates(self, item: jax.Array) -> tuple[jax.Array, Any]:
        """Return the candidates (count,), and what their scores are lowered by."""
        counts = self.counts[...]
        unknown = jnp.where(counts > 0, 0.0, -OUT)
        if self.negatives == "all":
            return jnp.arange(len(counts)), unknown
        if self.negatives == "in_batch":
            share = jnp.maximum(counts[item], 1) / jnp.maximum(counts.sum(), 1)
            return item, jnp.log(share)
        assert self.draws is not None
        drawn = jax.random.randint(self.draws(), (self.samples,), 0, len(counts))
        # each drawn item stands for as many as were not drawn
        lower = jnp.log(self.samples / len(counts))
        return drawn, unknown[drawn] + lower

    def _without_used(self, scores: jax.Array, user: jax.Array) -> jax.Array:
        if self.used is None:
            return scores
        words = self.used[...][user]
        items = jnp.arange(scores.shape[-1])
        bits = words[:, items // BITS] >> (items % BITS).astype(jnp.uint32)
        return jnp.where(bits & 1, OUT, scores)


def best_items(scores: jax.Array, *, count: int) -> jax.Array:
    """Return the items with the best scores, int32 (batch, count), best first."""
    return jax.lax.top_k(scores, count)[1]


# ---- internals ----


def _check(
    users: int,
    items: int,
    history: int,
    features: Sequence[Sequence[int]],
    counts: Sequence[int],
    negatives: str,
) -> None:
    if not (users or history):
        raise ValueError("a user needs an embedding or a history")
    if negatives not in ("all", "in_batch", "sampled"):
        raise ValueError(f"negatives {negatives!r}: use all, in_batch or sampled")
    for name, given in (("features", features), ("counts", counts)):
        if len(given) not in (0, items):
            raise ValueError(f"{len(given)} {name} for {items} items")


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Return rows of indices as int32 (rows, longest), filled up with -1."""
    longest = max(map(len, rows), default=0)
    table = np.full((len(rows), longest), -1, np.int32)
    for filled, row in zip(table, rows, strict=True):
        filled[: len(row)] = row
    return table


def _bits(rows: Sequence[Sequence[int]], items: int) -> np.ndarray:
    """Return uint32 (rows, words), in which bit i of a row says that it holds i."""
    words = np.zeros((len(rows), -(-items // BITS)), np.uint32)
    for row, held in zip(words, rows, strict=True):
        index = np.asarray(held, np.int64)
        np.bitwise_or.at(
            row, index // BITS, np.uint32(1) << (index % BITS).astype("u4")
        )
    return words


def _of_length_one(x: jax.Array) -> jax.Array:
    # the root of the square, clamped before it is taken: a user without a history has a
    # vector of zeros, at which the gradient of a norm is not finite
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, LEAST_SQUARE))

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
LEAST_WEIGHT = 1e-6  # of a history, before its weights are divided by it
BITS = 32  # of a word in the table of what users have used

Negatives = Literal["all", "in_batch", "sampled"]


class Known(nnx.Variable):
    """Known facts of users and items: part of the state, but not trained."""


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

        embedding = partial(_embedding, dim=dim, rngs=rngs)
        self.users = embedding(users) if users else None
        self.items = embedding(items)
        has_table = history and not tied
        self.history = embedding(items) if has_table else None
        self.recency = _recency(history)
        table = _padded(features)
        rows = table.max() + 1 if table.size else 0
        self.features = embedding(int(rows)) if rows else None
        self.feature_table = _known(table) if table.size else None
        self.biases = _biases(items, rngs) if popularity else None
        self.counts = _known(_counted(counts, items))
        self.used = _known(_bits(used, items)) if len(used) else None

        tower = partial(MLP, (dim, *hidden, dim), dropout=dropout, rngs=rngs)
        self.user_tower = tower() if hidden else None
        self.item_tower = tower() if hidden else None
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
            every = jnp.arange(self.items.num_embeddings)
            scores = self._scores(vectors, every)
            return self._without_used(scores, user)
        if item is None:
            raise ValueError("training needs the item of each row")

        others, correction = self._candidates(item)
        scores = self._scores(vectors, others) - correction
        is_own = others == item[:, None]
        if self.negatives == "all":
            column = item[:, None]
            own = jnp.take_along_axis(scores, column, axis=1)[:, 0]
        elif self.negatives == "in_batch":
            own = jnp.diagonal(scores)
        else:
            own = self._pair_scores(vectors, item)
        others = jnp.where(is_own, OUT, scores)
        return {"own": own, "others": others}

    def user_vectors(
        self,
        user: jax.Array,
        history: jax.Array | None = None,
    ) -> jax.Array:
        """Return the vectors (batch, dim) of users with their histories."""
        parts = []
        if self.users is not None:
            parts.append(self.users(user))
        if self.recency is not None:
            if history is None:
                raise ValueError("the model needs the items that a user has used last")
            parts.append(self._history_vectors(history, self.recency[...]))
        vectors = sum(parts[1:], parts[0])
        if self.dropout is not None:
            vectors = self.dropout(vectors)
        if self.user_tower is not None:
            vectors = self.user_tower(vectors)
        return _of_length_one(vectors) if self.cosine else vectors

    def item_vectors(self, item: jax.Array) -> jax.Array:
        """Return the vectors (count, dim) of items (count,)."""
        is_known = self._is_known(item).astype(jnp.float32)
        is_training = not self.deterministic
        if self.item_dropout and is_training and self.draws is not None:
            stays = 1 - self.item_dropout
            key = self.draws()
            is_kept = jax.random.bernoulli(key, stays, item.shape)
            is_known = is_known * is_kept
        vectors = self.items(item) * is_known[:, None]
        if self.features is not None and self.feature_table is not None:
            of_item = self.feature_table[...][item]
            vectors = vectors + _mean_of_features(self.features, of_item)
        if self.item_tower is not None:
            vectors = self.item_tower(vectors)
        return _of_length_one(vectors) if self.cosine else vectors

    # ---- internals ----

    def _history_vectors(self, history: jax.Array, recency: jax.Array) -> jax.Array:
        """Return the weighted means (batch, dim) of the items used last."""
        is_there = history >= 0
        weights = jnp.exp(recency) * is_there
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.maximum(total, LEAST_WEIGHT)
        table = self.items
        if self.history is not None:
            table = self.history
        used = jnp.where(is_there, history, 0)
        return jnp.einsum("bl,bld->bd", weights, table(used))

    def _is_known(self, item: jax.Array) -> jax.Array:
        """Return whether anybody has used each item."""
        return self.counts[...][item] > 0

    def _scores(self, vectors: jax.Array, item: jax.Array) -> jax.Array:
        """Return the scores (batch, count) of items (count,)."""
        scores = vectors @ self.item_vectors(item).T
        return self._scaled(scores) + self._bias(item)

    def _pair_scores(self, vectors: jax.Array, item: jax.Array) -> jax.Array:
        """Return the scores (batch,) of an item for each user."""
        products = vectors * self.item_vectors(item)
        scores = products.sum(-1)
        return self._scaled(scores) + self._bias(item)

    def _scaled(self, scores: jax.Array) -> jax.Array:
        return scores / self.temperature if self.cosine else scores

    def _bias(self, item: jax.Array) -> Any:
        if self.biases is None:
            return 0.0
        # what nobody has used has a bias that was never learned
        biases = self.biases(item)[:, 0]
        return biases * self._is_known(item)

    def _candidates(self, item: jax.Array) -> tuple[jax.Array, Any]:
        """Return the candidates (count,), and what their scores are lowered by."""
        counts = self.counts[...]
        unknown = jnp.where(counts > 0, 0.0, -OUT)
        if self.negatives == "all":
            return jnp.arange(len(counts)), unknown
        if self.negatives == "in_batch":
            own = jnp.maximum(counts[item], 1)
            share = own / jnp.maximum(counts.sum(), 1)
            return item, jnp.log(share)
        assert self.draws is not None
        key = self.draws()
        drawn = jax.random.randint(key, (self.samples,), 0, len(counts))
        # each drawn item stands for as many as were not drawn
        lower = jnp.log(self.samples / len(counts))
        return drawn, unknown[drawn] + lower

    def _without_used(self, scores: jax.Array, user: jax.Array) -> jax.Array:
        if self.used is None:
            return scores
        words = self.used[...][user]
        items = jnp.arange(scores.shape[-1])
        words = words[:, items // BITS]
        bits = words >> (items % BITS).astype(jnp.uint32)
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
    shape = (len(rows), longest)
    table = np.full(shape, -1, np.int32)
    for filled, row in zip(table, rows, strict=True):
        filled[: len(row)] = row
    return table


def _bits(rows: Sequence[Sequence[int]], items: int) -> np.ndarray:
    """Return uint32 (rows, words), in which bit i of a row says that it holds i."""
    shape = (len(rows), -(-items // BITS))
    words = np.zeros(shape, np.uint32)
    for row, held in zip(words, rows, strict=True):
        index = np.asarray(held, np.int64)
        place = (index % BITS).astype("u4")
        np.bitwise_or.at(row, index // BITS, np.uint32(1) << place)
    return words


def _embedding(rows: int, dim: int, rngs: nnx.Rngs) -> nnx.Embed:
    normal = nnx.initializers.normal(dim**-0.5)
    return nnx.Embed(rows, dim, embedding_init=normal, rngs=rngs)


def _biases(items: int, rngs: nnx.Rngs) -> nnx.Embed:
    zeros = nnx.initializers.zeros_init()
    return nnx.Embed(items, 1, embedding_init=zeros, rngs=rngs)


def _recency(history: int) -> nnx.Param | None:
    """Return the weights' logarithms: the item used last counts most.

    An item counts by one over how long ago it was used.
    """
    if not history:
        return None
    ago = jnp.arange(1.0, history + 1)
    return nnx.Param(-jnp.log(ago))


def _counted(counts: Sequence[int], items: int) -> np.ndarray:
    """Return how many rows each item has; 1 where nothing is known."""
    if not len(counts):
        return np.ones(items, np.float32)
    return np.asarray(counts, np.float32)


def _known(x: np.ndarray) -> Known:
    return Known(jnp.asarray(x))


def _mean_of_features(table: nnx.Embed, features: jax.Array) -> jax.Array:
    """Return the means (count, dim) of the embeddings of features; -1 is none."""
    is_there = (features >= 0).astype(jnp.float32)
    count = is_there.sum(-1, keepdims=True)
    count = jnp.maximum(count, 1)
    rows = table(jnp.maximum(features, 0))
    return jnp.einsum("cf,cfd->cd", is_there / count, rows)


def _of_length_one(x: jax.Array) -> jax.Array:
    # the root of the square, clamped before it is taken: a user without a history has a
    # vector of zeros, at which the gradient of a norm is not finite
    square = jnp.square(x).sum(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, LEAST_SQUARE))

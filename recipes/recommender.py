"""A recommender from ratings: what a user would give, or what a user takes next."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax.errors import RecipeError

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

Feedback = Literal["auto", "explicit", "implicit"]
Loss = Literal["softmax", "contrastive"]

TEST_SHARE = 0.1  # of the ratings, or of the items with split=new_items
FIRST = 10  # ranks that count
HELD_BITS = 2**33  # of the table of what users have used: 1 GiB; assumption
SECONDS_A_DAY = 86_400

# Weights of the squares in the objective, as counts of ratings: a bias of n ratings is
# drawn to 0 by weight / (n + weight). Chosen on a validation tenth of MovieLens
# latest small.
USER_WEIGHT = 5.0
ITEM_WEIGHT = 4.0
SESSION_WEIGHT = 8.0
VECTOR_WEIGHT = 20.0


@dataclass(frozen=True)
class Settings:
    """Settings of both kinds of feedback."""

    seed: int
    split: str
    split_seed: int
    validation: bool
    dim: int | None
    learning_rate: float | None
    batch_size: int | None
    epochs: float | None
    steps: int | None
    save_every: int | None
    prepared: Path | None


def recipe(
    data: Path | None = None,
    user: str = "userId",
    item: str = "movieId",
    rating: str = "rating",
    time: str = "timestamp",
    items: Path | None = None,
    item_words: str = "title",
    item_tags: str = "genres",
    feedback: Feedback = "auto",
    least_rating: float | None = None,
    duplicates: Literal["last", "first", "error"] = "last",
    skip_bad: bool = True,
    split: Literal["auto", "last", "random", "time", "new_items"] = "auto",
    split_seed: int = 0,
    validation: bool = False,
    dim: int | None = None,
    members: int = 8,
    history: int = 50,
    loss: Loss = "softmax",
    negatives: Literal["all", "in_batch", "sampled"] = "all",
    dropout: float = 0.5,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    prepared: Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Recommend items to users, from a table of who has used or rated what.

    Args:
      data: table of ratings (CSV, JSON lines, Parquet, Arrow).
      user: name of the column of users.
      item: name of the column of items.
      rating: name of the column of ratings; without one, a row says that a user has
        used an item.
      time: name of the column of times.
      items: table of items, with a column named as in `data`.
      item_words: names, with commas between, of its columns of text.
      item_tags: names of its columns of words with "|" between.
      feedback: explicit, to predict ratings; implicit, to rank all items; auto decides
        by the ratings, and says so.
      least_rating: below it, a rating is no sign of liking; for rankings.
      duplicates: which rating counts where a user has rated an item several times.
      skip_bad: whether rows without user, item or rating are left out and counted;
        else they are an error.
      split: what is held out: a random tenth of the ratings, or the latest (time); for
        rankings each user's last item, one at random, or a tenth of the items
        (new_items).
      split_seed: of what is drawn to be held out.
      validation: whether to test on a part of the training rows, to choose settings.
      dim: width of the vectors.
      members: for ratings, how many factorizations are averaged.
      history: for rankings, how many items used last are looked at.
      loss: of rankings: softmax, or the contrastive one of cosines.
      negatives: what an item that was used is compared with: all items, those of the
        batch's other rows, or sampled ones.
      dropout: of rankings: share of the user's vector dropped.
      learning_rate: of Adam at the start; it falls as a cosine to zero.
      batch_size: rows per step, over all devices.
      epochs: passes over the training rows.
      steps: length of the run in steps, instead of epochs.
      prepared: folder for the prepared ratings, with a manifest of all that was done;
        if left out, they are removed at the end.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout and the order of the rows.
    """
    # only here: the embedded ratings need no library that reads files
    from recipes import _ratings

    if len({user, item, rating, time}) < 4:
        raise RecipeError(
            "user, item, rating and time must be different columns",
            where=data,
            remedy="name different columns",
        )
    settings = Settings(
        seed=seed,
        split=split,
        split_seed=split_seed,
        validation=validation,
        dim=dim,
        learning_rate=learning_rate,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        save_every=save_every,
        prepared=prepared,
    )
    asked = _ratings.Asked(
        made() if data is None else data,
        user,
        item,
        rating,
        time,
        least_rating=least_rating,
        duplicates=duplicates,
        skip_bad=skip_bad,
    )
    counts = _ratings.Counts()
    rows = _ratings.read(asked, counts)
    explicit, reason = _decided(feedback, rows, items)
    kind = "explicit" if explicit else "implicit"
    print(f"{kind} feedback: {reason}", file=sys.stderr)
    if explicit:
        made_recipe = _explicit(rows, settings, members, counts)
    else:
        features = {}
        if items is not None:
            features = _ratings.read_items(
                items,
                item,
                _words(item_words),
                _words(item_tags),
                counts,
            )
        made_recipe = _implicit(
            rows,
            settings,
            features,
            counts,
            history=history,
            loss=loss,
            negatives=negatives,
            dropout=dropout,
        )
    counts.show()
    return made_recipe

"""A recommender from ratings: what a user would give, or what a user takes next."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
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
# Of Adam; on validation parts of MovieLens latest small 3e-3 learned too slowly.
LEARNING_RATE = 1e-2
HELD_BITS = 2**33  # of the table of what users have used: 1 GiB; assumption
SECONDS_A_DAY = 86_400

# Weights of the squares in the objective, as counts of ratings: a bias of n ratings is
# drawn to 0 by weight / (n + weight). Chosen on a validation tenth of MovieLens
# latest small.
USER_WEIGHT = 5.0
ITEM_WEIGHT = 4.0
SESSION_WEIGHT = 8.0
VECTOR_WEIGHT = 1.0


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


@dataclass(frozen=True)
class Ranking:
    """Settings of rankings alone."""

    history: int
    user_vectors: bool
    loss: str
    negatives: str
    samples: int
    dropout: float


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
    user_vectors: bool = False,
    loss: Loss = "softmax",
    negatives: Literal["all", "in_batch", "sampled"] = "sampled",
    samples: int = 1024,
    dropout: float = 0.3,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    prepared: Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Recommend items to users, from a table of who has used or rated what.

    Ratings are predicted by factorizations with a bias of the user, of the item, and of
    the user on that day, whose mean is taken; rankings come from a vector of the items
    that a user has used last. Without `data` it learns 30,000 made-up ratings with a
    noise of 0.5, to a root-mean-square error of 0.67 on a held-out tenth, where biases
    alone reach 0.69, in 10 seconds on two CPU cores:

        python tools/launch.py recipes/recommender.py

    Of MovieLens latest small (100,004 ratings) it predicts a random tenth to 0.850
    (median of three splits; biases alone 0.879), and ranks the film that a user rates
    last among the first ten of all 9,066 in 14 % of the cases:

        python tools/launch.py recipes/recommender.py --data ratings.csv
        ... --feedback implicit

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
      user_vectors: for rankings, whether a user has a vector next to the history.
      loss: of rankings: softmax, or the contrastive one of cosines.
      negatives: what an item that was used is compared with: all items, those of the
        batch's other rows, or sampled ones.
      samples: how many are sampled for a batch.
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
            Ranking(
                history=history,
                user_vectors=user_vectors or not history,
                loss=loss,
                negatives=negatives,
                samples=samples,
                dropout=dropout,
            ),
        )
    counts.show()
    return made_recipe


# ---- ratings ----


def _explicit(
    rows: Any,
    settings: Settings,
    members: int,
    counts: Any,
) -> lepton.Recipe:
    """Return the recipe that predicts ratings."""
    from lepton_jax.data import prepare
    from recipes import _tables

    how = "random" if settings.split == "auto" else settings.split
    if how not in ("random", "time"):
        raise RecipeError(
            f"the split {how!r} is one of rankings",
            where="--split",
            remedy="use random or time, or set feedback=implicit",
        )
    if how == "time" and "time" not in rows.columns:
        raise _no_time()
    preparation = prepare.Preparation(
        {"ratings": rows},
        _steps(rows, how, settings),
        inputs=_inputs(rows),
        target="rating",
    )
    serving = _tables.prepared(
        preparation,
        {name: name for name in _inputs(rows)},
        settings.prepared,
        {},
    )
    train = serving.split("train")
    test = serving.split("validation" if settings.validation else "test")
    sizes = _tables.sizes_of(serving)
    center = float(train.targets.mean())
    return lepton.Recipe(
        name="recommender",
        model=partial(
            lepton.models.MatrixFactorization,
            sizes["user"],
            sizes["item"],
            dim=16 if settings.dim is None else settings.dim,
            sessions=sizes.get("session", 0),
            members=members,
            center=center,
        ),
        loss=partial(
            lepton.losses.of_members,
            loss=lepton.losses.squared_error,
            ndim=1,
        ),
        metrics={"rmse": _merged_rmse()},
        optimizer=partial(_ridge_adam, rows=len(train)),
        train=train,
        test=test,
        preparation=serving,
        baseline=lepton.baselines.biases,
        **_length(settings, len(train), batch_size=1024, epochs=10),
    )


def _inputs(rows: Any) -> list[str]:
    return ["user", "item", *(["session"] if "time" in rows.columns else [])]


def _steps(rows: Any, how: str, settings: Settings) -> list[Any]:
    """Return the steps of the preparation.

    A session is what a user rates on one day: moods pass, and so do ways to rate.
    """
    from lepton_jax.data import prepare

    # the last test pairs are never looked at where settings are chosen
    shares = {"test": TEST_SHARE, "validation": TEST_SHARE * settings.validation}
    split: Any = prepare.Split(**shares, seed=settings.split_seed)
    if how == "time":
        split = prepare.SplitByTime(**shares, column="time")
    steps = [split]
    if "time" in rows.columns:
        day = f"text(integer(time) // {SECONDS_A_DAY})"
        steps.append(prepare.Derive("session", f'user + " " + {day}'))
    steps.append(prepare.Vocabulary(_inputs(rows)))
    steps.append(prepare.AsFloats("rating"))
    return steps


def _no_time() -> RecipeError:
    return RecipeError(
        "there is no column of times",
        where="--time",
        remedy="name it with time=..., or use another split",
    )


def _merged_rmse() -> Any:
    merge = lepton.models.mean_of_outputs
    return lepton.metrics.of_ensemble(lepton.metrics.rmse, merge, 1)


def _ridge_adam(
    learning_rate: Any,
    rows: int,
) -> optax.GradientTransformation:
    """Return Adam on the squared error plus the weighted squares of the parameters."""
    weights = {
        "user_biases": USER_WEIGHT,
        "item_biases": ITEM_WEIGHT,
        "session_biases": SESSION_WEIGHT,
        "user_vectors": VECTOR_WEIGHT,
        "item_vectors": VECTOR_WEIGHT,
    }

    def with_squares(updates: Any, params: Any) -> Any:
        def of_leaf(path: Any, update: Any, param: Any) -> Any:
            name = jax.tree_util.keystr(path)
            weight = next(w for part, w in weights.items() if part in name)
            return update + 2 * weight / rows * param

        return jax.tree_util.tree_map_with_path(of_leaf, updates, params)

    return optax.chain(optax.stateless(with_squares), optax.adam(learning_rate))


# ---- rankings ----


def _implicit(
    rows: Any,
    settings: Settings,
    features: dict[str, tuple[str, ...]],
    counts: Any,
    ranking: Ranking,
) -> lepton.Recipe:
    """Return the recipe that ranks all items."""
    from recipes import _ranking, _ratings

    pairs = _ratings.pairs_of(rows, settings.split_seed, features, counts)
    how: Any = settings.split
    if how == "auto":
        how = "last" if pairs.has_time else "random"
        counts.lines.append(f"held out: the {how} item of each user")
    parts = _ratings.split(
        pairs,
        how,
        TEST_SHARE,
        settings.split_seed,
        counts,
        settings.validation,
    )
    train, test = _samples(pairs, parts, ranking.history)
    _check_size(pairs)
    of_items: tuple[tuple[int, ...], ...] = ()
    if features:
        of_items = _ratings.features_of(pairs.items, features, counts)
    losses = lepton.losses
    is_contrastive = ranking.loss == "contrastive"
    return lepton.Recipe(
        name="recommender",
        model=partial(
            _ranker(pairs, parts, ranking),
            dim=settings.dim or 64,
            features=of_items,
            item_dropout=ITEM_DROPOUT if of_items else 0.0,
        ),
        loss=(losses.cosine_contrastive if is_contrastive else losses.ranking_softmax),
        metrics={
            f"hit_rate_{FIRST}": _ranking.among_negatives(
                partial(lepton.metrics.hit_rate, k=FIRST)
            ),
            f"ndcg_{FIRST}": _ranking.among_negatives(
                partial(lepton.metrics.ndcg, k=FIRST)
            ),
        },
        optimizer=optax.adam,
        train=train,
        test=test,
        decode=partial(
            lepton.models.best_items,
            count=min(FIRST, len(pairs.items)),
        ),
        baseline=_baselines(parts, len(pairs.items)),
        **_length(settings, len(train), batch_size=512, epochs=6),
    )


def _ranker(pairs: Any, parts: Any, ranking: Ranking) -> Any:
    """Return the model's factory, but for what features of the items decide."""
    from recipes import _ratings

    item = pairs.item[parts.train]
    counts = np.bincount(item, minlength=len(pairs.items))
    is_contrastive = ranking.loss == "contrastive"
    return partial(
        lepton.models.Retrieval,
        len(pairs.users) if ranking.user_vectors else 0,
        len(pairs.items),
        history=ranking.history,
        tied=True,
        counts=tuple(counts.tolist()),
        used=_ratings.used_items(pairs, parts),
        negatives=ranking.negatives,
        samples=ranking.samples,
        cosine=is_contrastive,
        temperature=1.0,
        popularity=not is_contrastive,
        dropout=ranking.dropout,
    )


def _baselines(parts: Any, items: int) -> tuple[Any, ...]:
    """Return the cheap methods, which know nothing of new items."""
    shown = None if parts.candidates is None else np.flatnonzero(parts.candidates)
    given = {"items": items, "shown": shown}
    methods = lepton.baselines
    return (
        partial(methods.popularity, **given),
        partial(methods.item_knn, **given),
        partial(methods.ials, **given),
    )


# Share of items whose own embedding is left out in training where they have features:
# Volkovs et al. 2017 use 0.5.
ITEM_DROPOUT = 0.5


def _samples(
    pairs: Any,
    parts: Any,
    history: int,
) -> tuple[lepton.data.Arrays, lepton.data.Arrays]:
    from recipes import _ratings

    before = _ratings.histories(pairs, parts, history)

    def samples(chosen: np.ndarray, of_rows: np.ndarray) -> lepton.data.Arrays:
        item = pairs.item[chosen].astype(np.int32)
        user = pairs.user[chosen].astype(np.int32)
        inputs = {"user": user, "item": item}
        if history:
            inputs["history"] = of_rows
        return lepton.data.Arrays(inputs, item)

    return samples(parts.train, before[0]), samples(parts.test, before[1])


def _check_size(pairs: Any) -> None:
    bits = len(pairs.users) * len(pairs.items)
    if bits > HELD_BITS:
        raise RecipeError(
            f"{len(pairs.users):,} users and {len(pairs.items):,} items are too many to"
            " mark what each has used",
            where="--data",
            remedy="take a sample of the users, or the items with most ratings",
        )


# ---- what both have in common ----


def _length(
    settings: Settings,
    rows: int,
    *,
    batch_size: int,
    epochs: float,
) -> dict[str, Any]:
    """Return the fields of a recipe that say how long it trains, and how fast."""
    batch_size = settings.batch_size or batch_size
    epochs = settings.epochs or epochs
    total = settings.steps or math.ceil(epochs * rows / batch_size)
    rate = settings.learning_rate or LEARNING_RATE
    return {
        "batch_size": batch_size,
        "epochs": epochs,
        "steps": settings.steps,
        "learning_rate": optax.cosine_decay_schedule(rate, total),
        "save_every": settings.save_every,
        "seed": settings.seed,
    }


# ---- what was asked ----


def _decided(
    feedback: str,
    rows: Any,
    items: Path | None,
) -> tuple[bool, str]:
    """Return whether ratings are predicted, and why."""
    from recipes import _ratings

    explicit, reason = _ratings.is_explicit(rows)
    if feedback == "auto":
        if explicit and items is not None:
            return False, "a table of items is given; set feedback for ratings"
        return explicit, f"{reason}; set feedback to say otherwise"
    if feedback not in ("explicit", "implicit"):
        raise RecipeError(
            f"feedback is {feedback!r}",
            where="--feedback",
            remedy="use auto, explicit or implicit",
        )
    if feedback == "explicit" and "rating" not in rows.columns:
        raise RecipeError(
            reason,
            where="--feedback",
            remedy="name it with rating=..., or set feedback=implicit",
        )
    return feedback == "explicit", "as asked"


def _words(text: str) -> tuple[str, ...]:
    from recipes import _tables

    return _tables.words(text)


# ---- the embedded data ----

USERS = 600
ITEMS = 400
RATINGS = 30_000
RANK = 4  # of the product of a user's and an item's factors
MEAN_RATING = 3.5
DAYS = 8  # on which a user rates
MOOD = 0.3  # standard deviation of a user's bias on one day
NOISE = 0.5  # standard deviation
SECONDS_BETWEEN = 7  # two ratings of all users


def made() -> Any:
    """Return made-up ratings, of items that users choose by what they like.

    A rating is 3.5, plus a bias of the user, of the user on that day and of the item,
    plus a product of rank 4, plus noise, in steps of a half. A user takes the better of
    two items drawn at random.
    """
    import polars as pl

    draw = np.random.default_rng(0)
    user_factors = draw.normal(size=(USERS, RANK))
    item_factors = draw.normal(size=(ITEMS, RANK))
    user = draw.integers(0, USERS, RATINGS)
    choice = draw.integers(0, ITEMS, (RATINGS, 2))
    taste = np.einsum("pf,pcf->pc", user_factors[user], item_factors[choice])
    item = choice[np.arange(RATINGS), taste.argmax(1)]

    day = draw.integers(0, DAYS, RATINGS)
    mood = MOOD * draw.normal(size=(USERS, DAYS))
    biases = draw.normal(size=USERS)[user] + draw.normal(size=ITEMS)[item]
    score = MEAN_RATING + biases / 4 + mood[user, day] + taste.max(1) / RANK
    score = score + NOISE * draw.normal(size=RATINGS)
    order = np.arange(RATINGS) * SECONDS_BETWEEN % SECONDS_A_DAY
    return pl.DataFrame(
        {
            "userId": user,
            "movieId": item,
            "rating": np.clip(np.round(2 * score) / 2, 0.5, 5),
            "timestamp": day * SECONDS_A_DAY + order,
        }
    )

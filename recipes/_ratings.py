"""Who used what: read, split and arranged for the ranking models.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from lepton_jax.data.readers import reader_of
from lepton_jax.errors import DataError, RecipeError, nearest
from recipes import _tables

WORD = re.compile(r"\w+")
LEAST_ITEMS = 2  # that have a word, so that it says something about others; assumption

Split = Literal["auto", "last", "random", "time", "new_items"]
Which = Literal["last", "first", "error"]


@dataclass(frozen=True)
class Asked:
    """What a person asks of a table of ratings.

    Attributes:
      data: the file, a reader, or a table.
      user: name of the column of users.
      item: name of the column of items.
      rating: name of the column of ratings; "" or one that is not there: none.
      time: name of the column of times; likewise.
      least_rating: below it, a rating is no sign that an item was liked.
      duplicates: which one counts where a user has rated an item several times.
      skip_bad: whether rows without user, item or rating are left out and counted;
        else they are an error.
    """

    data: Any
    user: str
    item: str
    rating: str = ""
    time: str = ""
    least_rating: float | None = None
    duplicates: Which = "last"
    skip_bad: bool = True


@dataclass(frozen=True, eq=False)
class Pairs:
    """Who used what, sorted by user and by time.

    Attributes:
      user: int64 (pairs,), from 0.
      item: int64 (pairs,), from 0.
      users: names of the users.
      items: names of the items; those that are in the table of items alone come last.
      has_time: whether the order of a user's pairs is one in time.
    """

    user: np.ndarray
    item: np.ndarray
    users: Sequence[str]
    items: Sequence[str]
    has_time: bool


@dataclass(frozen=True, eq=False)
class Parts:
    """Pairs in two parts.

    Attributes:
      train: Boolean (pairs,), which are for training.
      test: Boolean (pairs,), which are for testing.
      candidates: Boolean (items,), which items are ranked; None: all.
    """

    train: np.ndarray
    test: np.ndarray
    candidates: np.ndarray | None = None


@dataclass
class Counts:
    """What was left out or is worth knowing, in the order in which it was found."""

    lines: list[str] = field(default_factory=list)

    def say(self, count: int, what: str) -> None:
        """Keep a line, unless there is nothing to count."""
        if count:
            self.lines.append(f"{count:,} {what}")

    def show(self) -> None:
        """Write the lines to the terminal."""
        for line in self.lines:
            print(line, file=sys.stderr)


# ---- reading ----


def read(asked: Asked, counts: Counts) -> pl.DataFrame:
    """Return the rows that can be used.

    Returns:
      columns "user", "item", and "rating" and "time" as floats where they are there.

    Raises:
      DataError: the file can't be read, a column is not there, or rows are bad and
        none may be left out.
    """
    names = [asked.user, asked.item]
    reader = _opened(asked.data, names)
    kinds = {column.name: column for column in reader.columns()}
    for name in names:
        if name not in kinds:
            raise DataError(
                f"there is no column {name!r}{nearest(name, kinds)}",
                where=asked.data,
                remedy=f"name one of {', '.join(kinds)}",
            )
    table = _tables.rows_of(reader)
    columns = [_as_name(asked.user, "user"), _as_name(asked.item, "item")]
    if asked.rating in kinds:
        columns.append(_as_number(table, asked.rating, asked.data).alias("rating"))
    if asked.time in kinds:
        columns.append(_as_number(table, asked.time, asked.data).alias("time"))
    rows = table.select(columns)
    rows = _without_bad(rows, asked, counts)
    rows = _one_per_pair(rows, asked, counts)
    return _liked(rows, asked, counts)


def _opened(data: Any, names: Iterable[str]) -> Any:
    """Return the reader, which takes the named columns as text.

    So that a number and a word in one column are both names.
    """
    if isinstance(data, str | Path):
        return reader_of(data, types=dict.fromkeys(names, "String"))
    return reader_of(data)


def _as_name(column: str, name: str) -> pl.Expr:
    text = pl.col(column).cast(pl.String).str.strip_chars()
    return text.replace("", None).alias(name)


def _as_number(table: pl.DataFrame, name: str, where: Any) -> pl.Expr:
    kind = table.schema[name]
    if kind.is_temporal():
        return pl.col(name).cast(pl.Datetime("us")).cast(pl.Int64) / 1e6
    if not kind.is_numeric():
        raise DataError(
            "the column holds no numbers",
            where=f"{where}, column {name!r}",
            remedy="name a column of numbers, or prepare the file with lepton prepare",
        )
    return pl.col(name).cast(pl.Float64).fill_nan(None)


def _without_bad(rows: pl.DataFrame, asked: Asked, counts: Counts) -> pl.DataFrame:
    for name in ("user", "item", "rating"):
        if name not in rows.columns:
            continue
        if name == "rating":
            rows = rows.with_columns(_finite("rating"))
        missing = rows[name].null_count()
        if missing and not asked.skip_bad:
            raise DataError(
                f"{missing:,} rows have no {name}",
                where=asked.data,
                remedy="correct them, or set skip_bad=True to leave them out",
            )
        counts.say(missing, f"rows without {name}, left out")
        rows = rows.drop_nulls(name)
    if not rows.height:
        raise DataError(
            "no row is left that has a user and an item",
            where=asked.data,
            remedy="look at the counts of what was left out",
        )
    return rows


def _finite(name: str) -> pl.Expr:
    return pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name)


def _one_per_pair(rows: pl.DataFrame, asked: Asked, counts: Counts) -> pl.DataFrame:
    """Keep the first or the last rating where a user has rated an item several times.

    The last is the one with the greatest time; without times, that of the last row.
    """
    if asked.duplicates not in ("last", "first", "error"):
        raise RecipeError(
            f"duplicates is {asked.duplicates!r}",
            where="--duplicates",
            remedy="use last, first or error",
        )
    several = rows.height - rows.select("user", "item").n_unique()
    if several and asked.duplicates == "error":
        raise DataError(
            f"{several:,} ratings are of a user and an item that have one already",
            where=asked.data,
            remedy="set duplicates=last or duplicates=first to say which one counts",
        )
    counts.say(
        several, f"ratings of a pair that has another; the {asked.duplicates} counts"
    )
    if not several:
        return rows
    if "time" in rows.columns:
        rows = rows.sort("time", maintain_order=True, nulls_last=False)
    return rows.unique(["user", "item"], keep=asked.duplicates, maintain_order=True)


def _liked(rows: pl.DataFrame, asked: Asked, counts: Counts) -> pl.DataFrame:
    if asked.least_rating is None:
        return rows
    if "rating" not in rows.columns:
        raise RecipeError(
            "least_rating is set, but there is no column of ratings",
            where="--least_rating",
            remedy="name the column with rating=..., or leave least_rating out",
        )
    liked = rows.filter(pl.col("rating") >= asked.least_rating)
    low = rows.height - liked.height
    counts.say(low, f"ratings below {asked.least_rating:g}, no sign of liking")
    return liked


def is_explicit(rows: pl.DataFrame) -> tuple[bool, str]:
    """Whether ratings are a scale, with the reason in words."""
    if "rating" not in rows.columns:
        return False, "there is no column of ratings"
    values = rows["rating"].n_unique()
    if values < 2:
        return False, "all ratings are the same"
    return True, f"the ratings have {values:,} values"


# ---- codes ----


def pairs_of(
    rows: pl.DataFrame,
    seed: int,
    more_items: Iterable[str],
    counts: Counts,
) -> Pairs:
    """Return the pairs with users and items as numbers.

    Pairs of a user at the same time are in random order: that of the file may follow
    the items' numbers.

    Raises:
      DataError: there is one user, or one item.
    """
    users = sorted(rows["user"].unique())
    rated = sorted(rows["item"].unique())
    unrated = sorted(set(more_items) - set(rated))
    counts.say(len(unrated), "items of the table of items that nobody has used")
    for what, names in (("user", users), ("item", rated + unrated)):
        if len(names) < 2:
            raise DataError(
                f"there is one {what}, {names[0]!r}: nothing to learn a taste from",
                where="ratings",
                remedy=f"give ratings of several {what}s",
            )
    items = rated + unrated
    user = _codes(rows["user"], users)
    item = _codes(rows["item"], items)
    has_time = "time" in rows.columns and rows["time"].null_count() < rows.height
    time = np.zeros(len(user))
    if has_time:
        untimed = rows["time"].null_count()
        counts.say(untimed, "ratings without a time, taken as the oldest")
        time = rows["time"].fill_null(-np.inf).to_numpy()
    tie = np.random.default_rng(seed).random(len(user))
    order = np.lexsort((tie, time, user))
    return Pairs(user[order], item[order], users, items, has_time)


def _codes(column: pl.Series, names: Sequence[str]) -> np.ndarray:
    codes = pl.DataFrame({"name": names}).with_row_index("code")
    frame = column.to_frame("name")
    joined = frame.join(codes, on="name", how="left", maintain_order="left")
    return joined["code"].to_numpy().astype(np.int64)


# ---- splits ----


def split(
    pairs: Pairs,
    how: Split,
    share: float,
    seed: int,
    counts: Counts,
    validation: bool = False,
) -> Parts:
    """Divide the pairs.

    Args:
      pairs: sorted.
      how: "last": the last pair of each user who has several; "random": one at random;
        "time" the latest pairs of all; "new_items": all pairs of some items, which are
        the only candidates then.
      share: of the pairs, with "time"; of the items, with "new_items".
      seed: of what is drawn.
      counts: where to say what is left out.
      validation: whether to leave out the test pairs altogether, and to test on what a
        second split of the rest holds out: to choose settings by.
    """
    everything = np.ones(len(pairs.user), bool)
    parts = _split(pairs, everything, how, share, seed, counts)
    if validation:
        parts = _split(pairs, parts.train, how, share, seed + 1, counts)
    if not (parts.train.any() and parts.test.any()):
        raise DataError(
            f"the split {how!r} leaves nothing to train on, or nothing to test on",
            where="ratings",
            remedy="give more ratings, or another split",
        )
    return parts


def _split(
    pairs: Pairs,
    among: np.ndarray,
    how: str,
    share: float,
    seed: int,
    counts: Counts,
) -> Parts:
    draw = np.random.default_rng([seed, 1])
    if how == "new_items":
        used = np.unique(pairs.item[among])
        count = max(1, round(share * len(used)))
        chosen = np.isin(np.arange(len(pairs.items)), draw.permutation(used)[:count])
        of_new = chosen[pairs.item]
        return Parts(among & ~of_new, among & of_new, chosen)
    if how == "time":
        raise RecipeError(
            "a split by time needs no user, and is for ratings",
            where="--split",
            remedy="use last, random or new_items for rankings",
        )
    if how == "last" and not pairs.has_time:
        raise DataError(
            "there is no column of times to find the last item by",
            where="ratings",
            remedy="name it with time=..., or set split=random",
        )
    rank = -np.arange(len(pairs.user)) if how == "last" else draw.random(len(among))
    index = np.flatnonzero(among)
    order = index[np.lexsort((rank[index], pairs.user[index]))]
    _, first, sizes = np.unique(
        pairs.user[order], return_index=True, return_counts=True
    )
    counts.say(int((sizes < 2).sum()), "users with one item, in training alone")
    held_out = order[first[sizes >= 2]]
    test = np.zeros(len(among), bool)
    test[held_out] = True
    return Parts(among & ~test, test)


# ---- arrays ----


def histories(
    pairs: Pairs,
    parts: Parts,
    length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return what each user had used before each pair: the latest first.

    Returns:
      int32 (train pairs, length) and (test pairs, length), -1 where there is none.
      Those of the test hold all training pairs of the user, up to the length.
    """
    user = pairs.user[parts.train]
    item = pairs.item[parts.train]
    starts = np.searchsorted(user, np.arange(len(pairs.users) + 1))
    steps = np.arange(1, length + 1)

    def before(row: np.ndarray, first: np.ndarray) -> np.ndarray:
        index = row[:, None] - steps
        is_there = index >= first[:, None]
        return np.where(is_there, item[np.maximum(index, 0)], -1).astype(np.int32)

    train = before(np.arange(len(user)), starts[user])
    tested = pairs.user[parts.test]
    return train, before(starts[tested + 1], starts[tested])


def used_items(pairs: Pairs, parts: Parts) -> tuple[tuple[int, ...], ...]:
    """Return for each user what is not to be recommended.

    These are the items of training, and those that are no candidates.
    """
    user = pairs.user[parts.train]
    starts = np.searchsorted(user, np.arange(len(pairs.users) + 1))
    item = pairs.item[parts.train]
    out: set[int] = set()
    if parts.candidates is not None:
        out = set(np.flatnonzero(~parts.candidates).tolist())
    return tuple(
        tuple(sorted({*item[starts[one] : starts[one + 1]].tolist(), *out}))
        for one in range(len(pairs.users))
    )


# ---- the table of items ----


def read_items(
    path: Path,
    item: str,
    words: Sequence[str],
    tags: Sequence[str],
    counts: Counts,
) -> dict[str, tuple[str, ...]]:
    """Return the features of each item in a table, by its name.

    Args:
      path: the table.
      item: name of its column of items.
      words: names of columns of text, of which each word is a feature.
      tags: names of columns of features with "|" between.
      counts: where to say what is left out.
    """
    needed = [item, *words, *tags]
    reader = _opened(path, needed)
    kinds = [column.name for column in reader.columns()]
    for name in needed:
        if name not in kinds:
            raise DataError(
                f"there is no column {name!r}{nearest(name, kinds)}",
                where=path,
                remedy=f"name one of {', '.join(kinds)}",
            )
    table = _tables.rows_of(reader).with_columns(pl.col(item).str.strip_chars())
    nameless = table[item].null_count()
    counts.say(nameless, "rows of the table of items without an item, left out")
    table = table.drop_nulls(item)
    twice = table.height - table[item].n_unique()
    counts.say(twice, "rows of items that are there already; the first counts")
    table = table.unique(item, keep="first", maintain_order=True)
    found = {}
    for row in table.iter_rows(named=True):
        parts = [
            f"{n}={w}" for n in words for w in WORD.findall((row[n] or "").lower())
        ]
        parts += [f"{n}={t}" for n in tags for t in (row[n] or "").split("|") if t]
        found[row[item]] = tuple(dict.fromkeys(parts))
    return found


def features_of(
    items: Sequence[str],
    table: dict[str, tuple[str, ...]],
    counts: Counts,
) -> tuple[tuple[int, ...], ...]:
    """Return the numbers of each item's features that at least two items have."""
    counts.say(sum(name not in table for name in items), "items that have no features")
    known: dict[str, int] = {}
    for parts in table.values():
        for part in parts:
            known[part] = known.get(part, 0) + 1
    common = [part for part, count in known.items() if count >= LEAST_ITEMS]
    code = {part: number for number, part in enumerate(common)}
    return tuple(
        tuple(code[part] for part in table.get(name, ()) if part in code)
        for name in items
    )

"""Text as the set of its n-grams: runs of words, and runs of characters.

    NgramTokens("text", words=(1, 2), characters=()):

    "good, not bad"  ->  good   ,   not   bad   good ,   , not   not bad

An n-gram is known by a hash of 64 bits, so no text is stored: what is fitted is which
hashes there are, and in how many texts. Among n distinct ones, two share a hash with a
probability of n**2 / 2**65: of a million, one in 40 million.

A character of a script that is written without spaces (Han, kana, Thai, Lao, Khmer,
Burmese, Tibetan) is a word of its own, as Unicode's default rules have it (Unicode
Standard Annex 29, section 4.1), so that texts in such a language have n-grams too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome, Partial, State
from lepton_jax.data.prepare.steps import hashing
from lepton_jax.data.prepare.steps.columns import (
    as_text,
    nothing_to_learn,
    require_free,
    require_range,
)
from lepton_jax.data.prepare.steps.tokens import (
    WORD_APART,
    checked,
    lists_of,
    tokenized,
)
from lepton_jax.errors import DataError

FIRST_NGRAM = 1  # id of the n-gram that is in most texts; 0 is padding
MOST_IDS = 2**31 - 2  # ids fit into int32
LONGEST_NGRAM = 16  # words or characters; assumption: longer ones are never seen twice
# Characters that are worked on at once: their n-grams, a few numbers of 8 bytes each,
# need some 100 MB (assumption: so much is there).
BLOCK = 2**20
SPACE = ord(" ")
# Where hashes start: n-grams of words and of characters never share one by design.
OF_WORDS = 1
OF_CHARACTERS = 2

COUNTS = pl.Schema(
    {
        "ngram": pl.UInt64(),
        "count": pl.UInt64(),
    }
)


@dataclass(frozen=True)
class NgramTokens(Fitted):
    """Replace text by the ids of its distinct n-grams, those in most texts first.

    1 is the n-gram that is in most training texts; of two in as many, that with the
    lesser hash comes first. One that is not known is left out: a text may have none.

    N-grams of characters are those of the text with one space for each run of white
    space, and one at either end; none has a space inside.

    Attributes:
      column: of text.
      words: shortest and longest run of words; () for none.
      characters: shortest and longest run of characters; () for none.
      most: n-grams that have an id, those in most texts.
      least_count: in how many texts an n-gram must be to have an id.
      lower: whether case does not count.
      into: name of the column of ids; None: that of the text, which is replaced.
      length: of the arrays; None: lists. What does not fit is cut off at the end, with
        a note.
      pad: id that fills an array.
    """

    column: str
    words: Sequence[int] = (1, 2)
    characters: Sequence[int] = (3, 5)
    most: int = 2**20
    least_count: int = 1
    lower: bool = True
    into: str | None = None
    length: int | None = None
    pad: int = 0

    order_independent: ClassVar[bool] = True
    # the steps of tokens may frame a text; a set has no ends
    begin: ClassVar[int | None] = None
    end: ClassVar[int | None] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        object.__setattr__(self, "characters", tuple(self.characters))

    def check(self, schema: pl.Schema) -> pl.Schema:
        _check_orders("words", self.words)
        _check_orders("characters", self.characters)
        if not self.words and not self.characters:
            raise DataError(
                "neither words nor characters have n-grams",
                where="NgramTokens",
                remedy="give words=(1, 2), say",
            )
        require_range(self, "most", 1, MOST_IDS)
        if self.into is not None:
            require_free(self, schema, [self.into])
        return checked(self, schema)

    def writes(self) -> Sequence[str]:
        return (self.into or self.column,)

    def partial(self, table: pl.LazyFrame) -> pl.LazyFrame:
        text = as_text(self.column)
        frame = table.select(text).collect(engine="in-memory")
        texts = pl.len().alias("count")
        counts = [pl.DataFrame(schema=COUNTS)]
        for found in self._found(frame.to_series()):
            distinct = found.unique().group_by("ngram")
            counted = distinct.agg(texts)
            counts.append(counted.cast(COUNTS))
        return self.merge(counts).lazy()

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        ngrams = pl.concat(partials).group_by("ngram")
        total = pl.col("count").sum()
        return ngrams.agg(total).sort("ngram")

    def finish(self, partial: Partial) -> State:
        is_frequent = pl.col("count") >= self.least_count
        frequent = partial.filter(is_frequent)
        if frequent.is_empty():
            raise nothing_to_learn(
                self,
                self.column,
                f"n-gram that is in {self.least_count} texts",
            )
        ordered = frequent.sort("count", "ngram", descending=[True, False])
        kept = ordered.head(self.most)
        last = FIRST_NGRAM + pl.len()
        ids = pl.int_range(FIRST_NGRAM, last, dtype=pl.Int32)
        numbered = kept.with_columns(ids.alias("id"))
        return numbered.sort("ngram")

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        def numbers(text: pl.Series) -> pl.Series:
            assert state is not None
            known = state["ngram"].to_numpy()
            ids = state["id"].to_numpy()
            filled = text.fill_null("")
            blocks = [_ids_of(found, known, ids) for found in self._found(filled)]
            pairs = pl.concat(blocks)
            owner = pairs["text"].to_numpy()
            sizes = np.bincount(owner, minlength=len(text))
            return lists_of(pairs["id"].to_numpy(), sizes)

        return tokenized(self, table, numbers)

    # ---- internals ----

    def _found(self, text: pl.Series) -> Iterator[pl.DataFrame]:
        """Yield the n-grams of some texts at a time: number of the text, and hash."""
        text = text.fill_null("").alias("text")
        for start, stop in pairwise(_bounds(text)):
            some = text[start:stop]
            if self.lower:
                some = some.str.to_lowercase()
            parts = [
                _NONE,
                *_of_words(some, self.words),
                *_of_characters(some, self.characters),
            ]
            owners, hashes = zip(*parts, strict=True)
            texts = np.concatenate(owners) + start
            ngrams = np.concatenate(hashes)
            yield pl.DataFrame({"text": texts, "ngram": ngrams})


# ---- internals ----

# Which text each n-gram is of, int64, and its hash, uint64.
Found = tuple[np.ndarray, np.ndarray]
_NONE = (np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _bounds(text: pl.Series) -> list[int]:
    """Return where blocks of texts begin, and at last how many texts there are."""
    sizes = text.str.len_chars().cast(pl.Int64)
    block = np.cumsum(sizes.to_numpy()) // BLOCK
    changes = np.flatnonzero(np.diff(block))
    starts = changes + 1
    return [0, *starts.tolist(), len(text)]


def _check_orders(name: str, orders: Sequence[int]) -> None:
    bounds = [1, *orders, LONGEST_NGRAM]
    is_pair = len(orders) == 2 and sorted(bounds) == bounds
    if orders and not is_pair:
        raise DataError(
            f"{name} is {tuple(orders)}",
            where="NgramTokens",
            remedy=(
                "give the shortest and the longest run, from 1 to"
                f" {LONGEST_NGRAM}, or ()"
            ),
        )


def _of_words(text: pl.Series, orders: Sequence[int]) -> Iterator[Found]:
    if not orders:
        return
    lists = text.str.extract_all(WORD_APART)
    words = lists.explode(empty_as_null=False).drop_nulls()
    sizes = lists.list.len().to_numpy()
    owner = np.repeat(np.arange(len(text)), sizes)
    values = hashing.of_texts(words)
    yield from _runs(owner, values, orders, OF_WORDS, None)


def _of_characters(text: pl.Series, orders: Sequence[int]) -> Iterator[Found]:
    if not orders:
        return
    space = pl.lit(" ")
    even = text.str.replace_all(r"\s+", " ")
    even = even.str.strip_chars(" ")
    padded = pl.select(pl.concat_str(space, even, space)).to_series()
    sizes = padded.str.len_chars().to_numpy()
    owner = np.repeat(np.arange(len(text)), sizes)
    content = "".join(padded)
    codes = np.frombuffer(content.encode("utf-32-le"), "<u4")
    is_space = codes == SPACE
    values = codes.astype(np.uint64)
    yield from _runs(owner, values, orders, OF_CHARACTERS, is_space)


def _runs(
    owner: np.ndarray,
    values: np.ndarray,
    orders: Sequence[int],
    start: int,
    is_space: np.ndarray | None,
) -> Iterator[Found]:
    """Yield the runs of each order, longer ones from those one shorter.

    Args:
      owner: which text each value is of, ascending.
      values: uint64.
      orders: the shortest and the longest.
      start: where a hash starts.
      is_space: of each value; None: none is.
    """
    first_hash = hashing.of_number(start)
    hashes = np.full(len(values), first_hash, np.uint64)
    fits = np.ones(len(values), bool)
    shortest, longest = orders
    for order in range(1, longest + 1):
        count = len(values) - order + 1
        if count <= 0:
            return
        added = values[order - 1 :]
        hashes = hashing.mixed(hashes[:count] + added)
        is_one_text = owner[:count] == owner[order - 1 :]
        fits = fits[:count] & is_one_text
        if is_space is not None and order > 2:
            # what was the last value of a shorter run is inside now
            inner = is_space[order - 2 :]
            fits = fits & ~inner[:count]
        if order < shortest:
            continue
        found = fits
        if is_space is not None and order <= 2:
            last = is_space[order - 1 :]
            found = fits & ~(is_space[:count] & last)
        yield owner[:count][found], hashes[found]


def _ids_of(
    found: pl.DataFrame,
    known: np.ndarray,
    ids: np.ndarray,
) -> pl.DataFrame:
    """Return the distinct ids of each text, ascending.

    Args:
      found: number of the text, and hash.
      known: hashes, ascending.
      ids: of these.
    """
    ngrams = found["ngram"].to_numpy()
    place = np.searchsorted(known, ngrams)
    place = place.clip(max=len(known) - 1)
    is_known = known[place] == ngrams
    pairs = pl.DataFrame(
        {
            "text": found["text"].to_numpy()[is_known],
            "id": ids[place[is_known]],
        }
    )
    return pairs.unique().sort("text", "id")

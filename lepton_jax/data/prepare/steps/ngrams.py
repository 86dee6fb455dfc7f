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
from typing import ClassVar

import numpy as np
import polars as pl

from lepton_jax.data.prepare.step import Fitted, Outcome
from lepton_jax.data.prepare.steps import hashing
from lepton_jax.data.prepare.steps.columns import (
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
        text = pl.col(self.column).cast(pl.String)
        frame = table.select(text).collect(engine="in-memory")
        counts = [pl.DataFrame(schema=COUNTS)]
        for found in self._found(frame.to_series()):
            distinct = found.unique().group_by("ngram")
            counts.append(distinct.agg(pl.len().alias("count")).cast(COUNTS))
        return self.merge(counts).lazy()

    def merge(self, partials: Sequence[pl.DataFrame]) -> pl.DataFrame:
        ngrams = pl.concat(partials).group_by("ngram")
        return ngrams.agg(pl.col("count").sum()).sort("ngram")

    def finish(self, partial: pl.DataFrame) -> pl.DataFrame:
        frequent = partial.filter(pl.col("count") >= self.least_count)
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
        return kept.with_columns(ids.alias("id")).sort("ngram")

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        def numbers(text: pl.Series) -> pl.Series:
            assert state is not None
            known = state["ngram"].to_numpy()
            ids = state["id"].to_numpy()
            blocks = [
                _ids_of(found, known, ids) for found in self._found(text.fill_null(""))
            ]
            pairs = pl.concat(blocks)
            sizes = np.bincount(pairs["text"].to_numpy(), minlength=len(text))
            return lists_of(pairs["id"].to_numpy(), sizes)

        return tokenized(self, table, numbers)

    # ---- internals ----

    def _found(self, text: pl.Series) -> Iterator[pl.DataFrame]:
        """Yield the n-grams of some texts at a time: number of the text, and hash."""
        text = text.fill_null("").alias("text")
        sizes = text.str.len_chars().cast(pl.Int64).to_numpy()
        block = np.cumsum(sizes) // BLOCK
        bounds = np.flatnonzero(np.diff(block)) + 1
        starts = [0, *bounds.tolist()]
        stops = [*bounds.tolist(), len(text)]
        for start, stop in zip(starts, stops, strict=True):
            some = text[start:stop]
            some = some.str.to_lowercase() if self.lower else some
            parts = [
                _NONE,
                *_of_words(some, self.words),
                *_of_characters(some, self.characters),
            ]
            texts = np.concatenate([part[0] for part in parts])
            ngrams = np.concatenate([part[1] for part in parts])
            yield pl.DataFrame({"text": texts + start, "ngram": ngrams})


# ---- internals ----

# Which text each n-gram is of, int64, and its hash, uint64.
Found = tuple[np.ndarray, np.ndarray]
_NONE = (np.zeros(0, np.int64), np.zeros(0, np.uint64))


def _check_orders(name: str, orders: Sequence[int]) -> None:
    is_pair = len(orders) == 2 and 1 <= orders[0] <= orders[1] <= LONGEST_NGRAM
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
    owner = np.repeat(np.arange(len(text)), lists.list.len().to_numpy())
    values = hashing.of_texts(words)
    yield from _runs(owner, values, orders, OF_WORDS, None)


def _of_characters(text: pl.Series, orders: Sequence[int]) -> Iterator[Found]:
    if not orders:
        return
    even = text.str.replace_all(r"\s+", " ").str.strip_chars(" ")
    padded = pl.select(pl.concat_str(pl.lit(" "), even, pl.lit(" "))).to_series()
    sizes = padded.str.len_chars().to_numpy()
    owner = np.repeat(np.arange(len(text)), sizes)
    codes = np.frombuffer("".join(padded).encode("utf-32-le"), "<u4")
    is_space = codes == SPACE
    yield from _runs(owner, codes.astype(np.uint64), orders, OF_CHARACTERS, is_space)


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
    hashes = np.full(len(values), hashing.of_number(start), np.uint64)
    fits = np.ones(len(values), bool)
    for order in range(1, orders[1] + 1):
        count = len(values) - order + 1
        if count <= 0:
            return
        hashes = hashing.mixed(hashes[:count] + values[order - 1 :])
        fits = fits[:count] & (owner[:count] == owner[order - 1 :])
        if is_space is not None and order > 2:
            # what was the last value of a shorter run is inside now
            fits = fits & ~is_space[order - 2 : order - 2 + count]
        if order < orders[0]:
            continue
        found = fits
        if is_space is not None and order <= 2:
            found = fits & ~(is_space[:count] & is_space[order - 1 :])
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
    place = np.searchsorted(known, ngrams).clip(max=len(known) - 1)
    is_known = known[place] == ngrams
    pairs = pl.DataFrame(
        {
            "text": found["text"].to_numpy()[is_known],
            "id": ids[place[is_known]],
        }
    )
    return pairs.unique().sort("text", "id")

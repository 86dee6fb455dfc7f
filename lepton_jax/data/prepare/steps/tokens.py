"""Text as numbers: bytes, the pieces of a tokenizer's file, or words.

Each step replaces a column of text by lists of Int32, or by arrays of a fixed length:

    ByteTokens("text", length=6, end=258):  "Hi"       -> [72, 105, 258, 256, 256, 256]
                                            "Hi there" -> [72, 105, 32, 116, 104, 258]

What does not fit is cut off, and the row has a note that says how much there was.
Missing texts stay missing.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
import polars as pl
import pyarrow as pa

from lepton_jax.data.extras import needs
from lepton_jax.data.prepare.step import Fitted, Outcome, Step
from lepton_jax.data.prepare.steps.columns import as_text, fault, noted, require
from lepton_jax.data.prepare.steps.text import TEXT
from lepton_jax.errors import DataError

BYTES = 256  # ids of bytes are below; the default id of padding
UNKNOWN = 1  # id of a word that is not in the vocabulary; 0 is padding
FIRST_WORD = 2  # id of the most frequent word
TOKENS = pl.List(pl.Int32())
COUNTS = pl.Schema(
    {
        "word": pl.String(),
        "count": pl.UInt64(),
    }
)
# The word characters of Unicode, or one mark of punctuation.
WORD = r"\w+|[^\w\s]"
# Scripts that are written without spaces between words (Unicode Standard Annex 29,
# section 4.1, and Annex 14, classes ID and SA).
UNSPACED = (
    r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
)
# The same as WORD, but each character of these scripts stands alone.
WORD_APART = rf"[{UNSPACED}]|[\w--[{UNSPACED}]]+|[^\w\s]"
_CUT = "lepton.cut"
_SIZE = "lepton.size"


class _Framed(Protocol):
    """The fields that all steps of this module have."""

    @property
    def column(self) -> str: ...
    @property
    def length(self) -> int | None: ...
    @property
    def begin(self) -> int | None: ...
    @property
    def end(self) -> int | None: ...
    @property
    def pad(self) -> int: ...


@dataclass(frozen=True)
class ByteTokens(Step):
    """Replace text by the numbers of its UTF-8 bytes, 0 to 255.

    Attributes:
      column: of text.
      length: of the arrays; None: lists, each as long as its text.
      begin: id in front of each text, such as 257; None: nothing.
      end: id behind each text, such as 258, also where it is cut off; None: nothing.
      pad: id that fills an array.
    """

    column: str
    length: int | None = None
    begin: int | None = None
    end: int | None = None
    pad: int = BYTES

    order_independent: ClassVar[bool] = True

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        return checked(self, schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        return tokenized(self, table, _bytes_of)


@dataclass(frozen=True)
class FileTokens(Fitted):
    """Replace text by the pieces of a tokenizer that is there already, as a file.

    The file is part of the fitted state, and so goes with the model. No special tokens
    are added but those that are named here.

    Attributes:
      column: of text.
      file: a model of SentencePiece (`.model`), or `tokenizer.json` of Hugging Face's
        tokenizers.
      length: of the arrays; None: lists, each as long as its text.
      begin: id in front of each text; None: nothing.
      end: id behind each text, also where it is cut off; None: nothing.
      pad: id that fills an array.
    """

    column: str
    file: str
    length: int | None = None
    begin: int | None = None
    end: int | None = None
    pad: int = 0

    order_independent: ClassVar[bool] = True
    fits_on: ClassVar[Literal["train", "all"]] = "all"

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        content = _read(self.file)
        _opened(_kind(content), content)
        return checked(self, schema)

    def vocab(self) -> int:
        """Return the count of the tokenizer's ids.

        Raises:
          DataError: see `check`.
        """
        content = _read(self.file)
        return _opened(_kind(content), content).vocab

    def to_json(self) -> dict[str, Any]:
        digest = hashlib.sha256(_read(self.file)).hexdigest()
        return {**super().to_json(), "file_digest": digest}

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        return pl.LazyFrame(
            {"kind": [], "content": []},
            schema=_FILE,
        )

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        return pl.concat(partials)

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        content = _read(self.file)
        row = {"kind": [_kind(content)], "content": [content]}
        return pl.DataFrame(row, schema=_FILE)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        def pieces(text: pl.Series) -> pl.Series:
            assert state is not None
            encode = _opened(*state.row(0)).encode
            ids = encode(text.fill_null("").to_list())
            return pl.Series(ids, dtype=TOKENS)

        return tokenized(self, table, pieces)


@dataclass(frozen=True)
class WordTokens(Fitted):
    """Replace text by the numbers of its words in a vocabulary that is fitted.

    Words are runs of letters, digits and underscores, and single marks of punctuation.
    The most frequent word has the number 2; of equally frequent ones the first in the
    order of their characters comes first. 1 is a word that is not in the vocabulary.

    Attributes:
      column: of text.
      most: words of the vocabulary, at most.
      least_count: how often a word must be there.
      lower: whether case does not count.
      apart: whether each character of a script that is written without spaces, such as
        Chinese, Japanese or Thai, is a word; else a run of them is one.
      length: of the arrays; None: lists, each as long as its text.
      begin: id in front of each text; None: nothing.
      end: id behind each text, also where it is cut off; None: nothing.
      pad: id that fills an array.
    """

    column: str
    most: int = 30_000
    least_count: int = 1
    lower: bool = True
    apart: bool = False
    length: int | None = None
    begin: int | None = None
    end: int | None = None
    pad: int = 0

    order_independent: ClassVar[bool] = True

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        return checked(self, schema)

    def partial(
        self,
        table: pl.LazyFrame,
    ) -> pl.LazyFrame:
        text = as_text(self.column)
        word = self._words(text).explode().alias("word")
        words = table.select(word).drop_nulls().group_by("word")
        counts = words.agg(pl.len().alias("count"))
        return counts.cast(COUNTS).sort("word")

    def merge(
        self,
        partials: Sequence[pl.DataFrame],
    ) -> pl.DataFrame:
        words = pl.concat(partials).group_by("word")
        counts = words.agg(pl.col("count").sum())
        return counts.sort("word")

    def finish(
        self,
        partial: pl.DataFrame,
    ) -> pl.DataFrame:
        frequent = partial.filter(pl.col("count") >= self.least_count)
        if frequent.is_empty():
            raise DataError(
                f"no word is there {self.least_count} times",
                where=f"WordTokens({self.column!r})",
                remedy="lower least_count, or check that the column has text",
            )
        words = frequent.sort(
            "count",
            "word",
            descending=[True, False],
        )
        words = words.head(self.most)
        numbers = pl.int_range(
            FIRST_WORD,
            FIRST_WORD + pl.len(),
            dtype=pl.Int32,
        )
        return words.with_columns(numbers.alias("id"))

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        def numbers(text: pl.Series) -> pl.Series:
            assert state is not None
            texts = text.fill_null("").to_frame("text")
            words = texts.select(self._words(pl.col("text")))
            lists = words.to_series()
            every = lists.explode().drop_nulls().to_frame("word")
            ids = every.join(
                state.select("word", "id"),
                on="word",
                how="left",
                maintain_order="left",
            )
            values = ids["id"].fill_null(UNKNOWN).to_numpy()
            return lists_of(
                values,
                lists.list.len().to_numpy(),
            )

        return tokenized(self, table, numbers)

    def _words(
        self,
        text: pl.Expr,
    ) -> pl.Expr:
        text = text.str.to_lowercase() if self.lower else text
        return text.str.extract_all(WORD_APART if self.apart else WORD)


# ---- internals ----

_FILE = pl.Schema(
    {
        "kind": pl.String(),
        "content": pl.Binary(),
    }
)


def checked(
    step: _Framed,
    schema: pl.Schema,
) -> pl.Schema:
    """Return the columns after a step."""
    require(
        step,
        schema,
        [step.column],
        TEXT,
    )
    frame = (step.begin is not None) + (step.end is not None)
    if step.length is not None and step.length <= frame:
        raise DataError(
            f"length is {step.length}, which leaves no room for text",
            where=f"{type(step).__name__}.length",
            remedy=f"give a number above {frame}, or None for lists",
        )
    after = pl.Schema(schema)
    after[_written(step)] = _type(step)
    return after


def _written(step: _Framed) -> str:
    """Return the column that a step writes."""
    return getattr(step, "into", None) or step.column


def _type(step: _Framed) -> pl.DataType:
    if step.length is None:
        return TOKENS
    return pl.Array(
        pl.Int32(),
        step.length,
    )


def tokenized(
    step: _Framed,
    table: pl.LazyFrame,
    tokens: Callable[[pl.Series], pl.Series],
) -> Outcome:
    """Replace a column of text.

    Args:
      step: says how.
      table: the rows.
      tokens: function of texts that returns a list of numbers each; that of a missing
        text does not count.
    """

    def framed(text: pl.Series) -> pl.Series:
        text = text.cast(pl.String)
        return _frame(
            step,
            tokens(text),
            text.is_null(),
        )

    fields = {_CUT: _type(step), _SIZE: pl.UInt32()}
    result = pl.Struct(fields)
    with_tokens = table.with_columns(
        pl.col(step.column)
        .map_batches(framed, return_dtype=result, is_elementwise=True)
        .alias(_CUT)
    )
    cut = pl.col(_CUT).struct
    framed_tokens = cut.field(_CUT).alias(_written(step))
    replaced = with_tokens.with_columns(framed_tokens).drop(_CUT)
    if step.length is None:
        return Outcome(replaced)
    reason = pl.format(
        f"cut to {step.length} tokens: " + "{} were there",
        cut.field(_SIZE),
    )
    too_long = fault(
        step.column,
        cut.field(_SIZE) > step.length,
        reason,
    )
    return Outcome(
        replaced,
        noted(with_tokens, "changed", [too_long]),
    )


def _frame(
    step: _Framed,
    tokens: pl.Series,
    is_missing: pl.Series,
) -> pl.Series:
    """Return a struct of framed tokens and their number before they were cut."""
    column = pl.col("tokens")
    begin = [] if step.begin is None else [step.begin]
    end = [] if step.end is None else [step.end]
    added = len(begin) + len(end)
    size = column.list.len() + added
    if step.length is not None:
        column = column.list.head(step.length - added)
    whole = pl.concat_list(
        _constant(begin),
        column,
        _constant(end),
    )
    if step.length is not None:
        whole = _padded(whole, step.length, step.pad)
    there = ~pl.col("is_missing")
    table = pl.DataFrame(
        {
            "tokens": tokens,
            "is_missing": is_missing,
        }
    )
    frame = table.select(
        pl.when(there).then(whole).alias(_CUT),
        pl.when(there).then(size).cast(pl.UInt32).alias(_SIZE),
    )
    return frame.to_struct()


def _padded(tokens: pl.Expr, length: int, pad: int) -> pl.Expr:
    """Return lists of at most `length` tokens as arrays of `length`."""
    used = tokens.list.len().cast(pl.Int64)
    room = (length - used).clip(0)
    padding = pl.lit(pad, pl.Int32).repeat_by(room)
    return pl.concat_list(tokens, padding).list.to_array(length)


def _constant(ids: list[int]) -> pl.Expr:
    return pl.lit(
        pl.Series(
            [ids],
            dtype=TOKENS,
        )
    )


def _bytes_of(text: pl.Series) -> pl.Series:
    content = text.fill_null("").cast(pl.Binary)
    sizes = content.bin.size().to_numpy()
    values = np.frombuffer(
        b"".join(content),
        np.uint8,
    )
    return lists_of(
        values.astype(np.int32),
        sizes,
    )


def lists_of(
    values: np.ndarray,
    sizes: np.ndarray,
) -> pl.Series:
    """Return lists of some sizes, one after the other."""
    ends = np.cumsum(sizes.astype(np.int64))
    bounds = np.concatenate([[0], ends])
    array = pa.LargeListArray.from_arrays(bounds, values)
    return pl.Series(pl.from_arrow(array)).cast(TOKENS)


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise DataError(
            f"the tokenizer's file can't be read: {error.strerror}",
            where=file,
            remedy="give the path of a SentencePiece model or of a tokenizer.json",
        ) from error


def _kind(content: bytes) -> str:
    """Return the library of a tokenizer's file: tokenizers writes JSON."""
    return "tokenizers" if content.lstrip()[:1] == b"{" else "sentencepiece"


class _Tokenizer(NamedTuple):
    """A tokenizer of a file.

    Attributes:
      encode: texts to the ids of each.
      vocab: count of ids.
    """

    encode: Callable[[list[str]], list[list[int]]]
    vocab: int


# As many tokenizers as a few preparations in one process have (assumption).
@functools.lru_cache(maxsize=8)
def _opened(
    kind: str,
    content: bytes,
) -> _Tokenizer:
    """Return a tokenizer of a file.

    Raises:
      DataError: the library is not installed, or can't read the file.
    """
    library = needs(
        kind,
        extra="text",
        purpose="reading this tokenizer's file",
    )
    try:
        if kind == "sentencepiece":
            model = library.SentencePieceProcessor(model_proto=content)
            encode = functools.partial(model.encode, out_type=int)
            return _Tokenizer(encode, model.get_piece_size())
        tokenizer = library.Tokenizer.from_str(content.decode())
    # Both libraries raise a bare RuntimeError or Exception for a file of another kind.
    except Exception as error:
        raise DataError(
            f"{kind} can't read the tokenizer's file: {error}",
            where="FileTokens.file",
            remedy="give a SentencePiece model (.model) or a tokenizer.json",
        ) from error

    def ids_of(texts: list[str]) -> list[list[int]]:
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [each.ids for each in found]

    return _Tokenizer(ids_of, tokenizer.get_vocab_size())

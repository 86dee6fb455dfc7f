"""Texts of a person's own: how they are read, and what is measured of them.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from lepton_jax.baselines import log_count_ratios
from lepton_jax.data.prepare.steps.tokens import UNSPACED, WORD_APART
from lepton_jax.data.readers import Reader, reader_of
from lepton_jax.data.readers.delimited import CsvReader
from lepton_jax.data.readers.entries import FilesReader
from lepton_jax.data.readers.json_lines import JsonLinesReader
from lepton_jax.data.readers.many import ManyReader
from lepton_jax.data.readers.text import TextReader
from lepton_jax.errors import DataError, nearest

PIECE_BYTES = 2**26  # of a source that are read at once; assumption
MEASURED_TEXTS = 20_000  # at most, evenly over the source; assumption
# Names that a table's column of texts or labels has, if nobody names it; assumption.
TEXT_NAMES = ("text", "sentence", "review", "content", "message", "comment")
LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "tags")
# Characters of a mean word from which on texts have no words, such as DNA or base64;
# assumption: no language has such long ones.
LONGEST_MEAN_WORD = 25.0
COVERED = 0.98  # share of the texts that a length covers; assumption
STEP_OF_LENGTH = 8  # lengths are multiples of it, as vectors like them
MOST_TOKENS = 512  # looked at of a text, unless somebody says more; assumption
MOST_NGRAMS = 4096  # of a text, of either kind; assumption
# Readers that take an encoding, and know what to do about rows that can't be read.
SETTABLE = (CsvReader, FilesReader, JsonLinesReader, TextReader)


class Columns(NamedTuple):
    """The columns of a source of texts.

    Attributes:
      source: its reader.
      text: name of the column of texts.
      label: name of the column of labels.
      reading: settings of `reader_of` that the source was opened with.
      has_lists: whether the labels are lists.
    """

    source: Reader
    text: str
    label: str
    reading: dict[str, Any]
    has_lists: bool

    @property
    def others(self) -> list[str]:
        """Names of the columns that are neither."""
        names = [column.name for column in self.source.columns()]
        return [name for name in names if name not in (self.text, self.label)]

    @property
    def serving_reading(self) -> dict[str, Any]:
        """Settings with which files of raw rows, without labels, are read."""
        if "types" not in self.reading:
            return self.reading
        return {**self.reading, "types": {self.text: "String"}}


def opened(
    data: Any,
    text: str | None,
    label: str | None,
    encoding: str | None = None,
    bad_rows: str = "error",
) -> Columns:
    """Open a source of texts with labels.

    A folder of folders, or an archive of such, is a text a file and a class a folder;
    other files of text are a text a line and a class a file. Only empty cells of a
    table are missing: "none" may be a label.

    Args:
      data: a path, or rows in memory.
      text: name of the column of texts; None: found out.
      label: name of the column of labels; None: found out.
      encoding: of the files; None: found out.
      bad_rows: "error", or "refuse" to leave out rows that can't be read.

    Raises:
      DataError: the source can't be read, or a column is not there.
    """
    if not isinstance(data, str | Path):
        return _named(reader_of(data), text, label, {}, data)
    first = reader_of(data)
    kind = first.readers[0] if isinstance(first, ManyReader) else first
    if not isinstance(kind, SETTABLE):
        return _named(first, text, label, {}, data)
    reading: dict[str, Any] = {"bad_rows": bad_rows}
    if encoding is not None:
        reading["encoding"] = encoding
    if isinstance(kind, TextReader | FilesReader):
        return _of_files(data, kind, text, label, reading)
    return _of_table(data, text, label, reading)


@dataclass(frozen=True)
class Measured:
    """What texts are like.

    Attributes:
      texts: how many were looked at.
      words: of a text, which `COVERED` of the texts do not exceed.
      characters: the same.
      size: bytes, the same.
      mean_word: characters of a mean word.
      unspaced: share of the letters that are of scripts without spaces.
    """

    texts: int
    words: int
    characters: int
    size: int
    mean_word: float
    unspaced: float

    @property
    def has_words(self) -> bool:
        """Whether the texts have words to tell apart."""
        return self.mean_word <= LONGEST_MEAN_WORD

    def __str__(self) -> str:
        words = [
            f"{self.texts:,} texts measured: {COVERED:.0%} have at most"
            f" {self.words:,} words and {self.characters:,} characters;"
            f" a mean word has {self.mean_word:.1f}"
        ]
        if self.unspaced > 0:
            words.append(
                f"{self.unspaced:.0%} of the letters are of a script without spaces:"
                " each is a word"
            )
        if not self.has_words:
            words.append("there are no words to tell apart: bytes are the tokens")
        return "; ".join(words)


def measured(columns: Columns) -> Measured:
    """Look at the texts of a source.

    Raises:
      DataError: there is none.
    """
    texts = _texts_of(columns)
    if not len(texts):
        raise DataError(
            f"the column {columns.text!r} has no text",
            where=columns.source.name,
            remedy="name the column of texts: --text NAME",
        )
    texts = texts.gather_every(-(-len(texts) // MEASURED_TEXTS))
    letters = texts.str.count_matches(r"\p{L}").sum() or 0
    unspaced = texts.str.count_matches(rf"[{UNSPACED}]").sum() or 0
    words = texts.str.count_matches(WORD_APART)
    spaced = texts.str.replace_all(rf"[{UNSPACED}]", " ")
    runs = spaced.str.extract_all(r"\w+").explode(empty_as_null=False)
    mean = runs.str.len_chars().mean()
    return Measured(
        len(texts),
        _covering(words),
        _covering(texts.str.len_chars()),
        _covering(texts.str.len_bytes()),
        float(mean) if isinstance(mean, float) else 0.0,
        unspaced / max(letters, unspaced, 1),
    )


def fitting_length(size: int, most: int) -> int:
    """Return a length that holds a size, a multiple of `STEP_OF_LENGTH`, up to most."""
    return min(most, math.ceil(max(size, 1) / STEP_OF_LENGTH) * STEP_OF_LENGTH)


def ratios_of(
    ngrams: np.ndarray,
    targets: np.ndarray,
    vocab: int,
    classes: int,
) -> np.ndarray:
    """Return the log-count ratios of n-grams, float32 (vocab, classes).

    Args:
      ngrams: ids of each training text, (texts, length); 0 is padding, whose ratio
        is 0.
      targets: numbers of classes, (texts,), or 0 and 1 for each label, (texts, labels).
      vocab: ids of n-grams, with 0.
      classes: count of classes or labels.
    """
    counts = np.zeros((vocab, classes, 2))
    for number in range(classes):
        of_class = targets[:, number] > 0 if targets.ndim == 2 else targets == number
        for place, rows in enumerate((of_class, ~of_class)):
            ids = ngrams[rows].ravel()
            counts[:, number, place] = np.bincount(ids, minlength=vocab)
    counts[0] = 0
    ratios = log_count_ratios(counts)
    ratios[0] = 0
    return ratios


# ---- internals ----


def _of_files(
    data: Any,
    kind: Any,
    text: str | None,
    label: str | None,
    reading: dict[str, Any],
) -> Columns:
    """Open files of text."""
    names = [column.name for column in kind.columns()]
    rows = "file" if "label" in names else "line"
    reading = {"format": "text", "rows": rows, **reading}
    source = reader_of(data, **reading)
    known = [column.name for column in source.columns()]
    if label is None and "label" not in known and "file" not in known:
        raise DataError(
            "there is one file of lines, and no classes",
            where=data,
            remedy=(
                "give a folder or an archive with a file for each class, a folder with"
                " a folder for each class, or a table with a column of labels"
            ),
        )
    usual = "label" if rows == "file" else "file"
    return _named(source, text, label or usual, reading, data)


def _of_table(
    data: Any,
    text: str | None,
    label: str | None,
    reading: dict[str, Any],
) -> Columns:
    """Open a table: texts and labels are read as they are written."""
    reading["missing"] = ("",)
    found = _named(reader_of(data, **reading), text, label, reading, data)
    names = [found.text] if found.has_lists else [found.text, found.label]
    reading["types"] = dict.fromkeys(names, "String")
    source = reader_of(data, **reading)
    return _named(source, found.text, found.label, reading, data)


def _named(
    source: Reader,
    text: str | None,
    label: str | None,
    reading: dict[str, Any],
    where: Any,
) -> Columns:
    """Find the columns of texts and labels.

    Raises:
      DataError: one is not there, or both are the same.
    """
    types = {column.name: column.type for column in source.columns()}
    text = _one_of(types, text, TEXT_NAMES, "texts", "--text", where)
    label = _one_of(types, label, LABEL_NAMES, "labels", "--label", where)
    if text == label:
        raise DataError(
            f"texts and labels are the same column {text!r}",
            where=where,
            remedy="name two columns",
        )
    has_lists = isinstance(types[label], pl.List)
    return Columns(source, text, label, reading, has_lists)


def _one_of(
    known: Any,
    name: str | None,
    usual: Sequence[str],
    what: str,
    setting: str,
    where: Any,
) -> str:
    if name is None:
        there = [each for each in usual if each in known]
        if there:
            return there[0]
        raise DataError(
            f"which column holds the {what} is not known",
            where=where,
            remedy=f"name it, {setting} NAME: the columns are {', '.join(known)}",
        )
    if name not in known:
        raise DataError(
            f"there is no column {name!r}{nearest(name, known)}",
            where=where,
            remedy=f"the columns are {', '.join(known)}",
        )
    return name


def _texts_of(columns: Columns) -> pl.Series:
    """Return the texts of a source that are not missing."""
    source = columns.source
    parts = [pl.Series(columns.text, [], pl.String)]
    for piece in source.pieces(PIECE_BYTES):
        table = source.read(piece).table
        parts.append(table[columns.text].cast(pl.String))
    return pl.concat(parts).drop_nulls()


def _covering(sizes: pl.Series) -> int:
    return math.ceil(sizes.quantile(COVERED, "higher") or 0)

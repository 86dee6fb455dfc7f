"""Filters of text by its quality, which know no language.

The measures and the limits in GOPHER are those of Rae et al.: Scaling Language Models:
Methods, Analysis & Insights from Training Gopher (2021), table A1 and section A.1.1,
without the one that counts English stop words; forbidden phrases are from Raffel et
al.: Exploring the Limits of Transfer Learning (2020), section 2.2 (the C4 data set).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import polars as pl

from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    Fault,
    as_text,
    dropped,
    fault,
    listed,
    require,
)
from lepton_jax.data.prepare.steps.text import TEXT
from lepton_jax.errors import DataError

# Limits for pages of the web; shorter texts need others.
GOPHER: Mapping[str, Any] = {
    "least_words": 50,
    "most_words": 100_000,
    "least_word_length": 3.0,
    "most_word_length": 10.0,
    "most_symbols": 0.1,
    "most_bullet_lines": 0.9,
    "most_ellipsis_lines": 0.3,
    "least_alphabetic_words": 0.8,
    "most_repeated_lines": 0.3,
    "most_repeated_characters": 0.2,
}
SHOWN_DIGITS = 4  # of a measured value in a reason
_MEASURED = "lepton.measured."


@dataclass(frozen=True)
class TextQuality(Step):
    """Drop rows whose text breaks a limit; the note gives the measured value.

    A limit that is None is not applied; `TextQuality("text", **GOPHER)` applies those
    of the Gopher paper. Of several broken limits the note gives the first in the order
    below. A row without text is dropped, too.

    Attributes:
      column: of text.
      least_characters: fewest characters.
      most_characters: most characters.
      least_words: fewest words. A word is a run of characters other than white space.
      most_words: most words.
      least_word_length: least mean length of words, in characters.
      most_word_length: largest mean length of words, in characters.
      most_symbols: largest number of hash marks and of ellipses, each, per word.
      most_digits: largest share of digits among the characters.
      least_alphabetic_words: least share of words that have a letter.
      most_bullet_lines: largest share of lines that begin with a bullet.
      most_ellipsis_lines: largest share of lines that end with an ellipsis.
      most_repeated_lines: largest share of lines that are there before.
      most_repeated_characters: largest share of characters in such lines.
      forbidden: phrases that no text may have, in any case, such as "lorem ipsum".
    """

    column: str
    least_characters: int | None = None
    most_characters: int | None = None
    least_words: int | None = None
    most_words: int | None = None
    least_word_length: float | None = None
    most_word_length: float | None = None
    most_symbols: float | None = None
    most_digits: float | None = None
    least_alphabetic_words: float | None = None
    most_bullet_lines: float | None = None
    most_ellipsis_lines: float | None = None
    most_repeated_lines: float | None = None
    most_repeated_characters: float | None = None
    forbidden: Sequence[str] = ()

    serves: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        phrases = (
            listed(
                self.forbidden,
                "forbidden",
            )
            if self.forbidden
            else ()
        )
        object.__setattr__(self, "forbidden", phrases)

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require(
            self,
            schema,
            [self.column],
            TEXT,
        )
        if not self._limits() and not self.forbidden:
            raise DataError(
                "no limit is given",
                where="TextQuality",
                remedy="give one, such as least_words=5, or those of GOPHER",
            )
        return schema

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        text = as_text(self.column)
        limits = self._limits()
        names = {MEASURES[field].name for field in limits}
        measured = table.with_columns(
            MEASURES[field].of(text).alias(_MEASURED + MEASURES[field].name)
            for field in _one_a_name(limits)
        )
        outcome = dropped(
            measured,
            self._faults(text, limits),
        )
        result = outcome.table.drop(_MEASURED + name for name in names)
        return Outcome(result, outcome.notes)

    def _limits(self) -> dict[str, float]:
        """Return the limits that are given, in the order of the fields."""
        given = {
            field: getattr(
                self,
                field,
            )
            for field in MEASURES
        }
        return {field: limit for field, limit in given.items() if limit is not None}

    def _faults(
        self,
        text: pl.Expr,
        limits: Mapping[str, float],
    ) -> list[Fault]:
        faults = [
            fault(
                self.column,
                text.is_null(),
                "no text",
            )
        ]
        for field, limit in limits.items():
            name = MEASURES[field].name
            value = pl.col(_MEASURED + name)
            is_least = field.startswith("least")
            side = "at least" if is_least else "at most"
            reason = pl.format(
                name + ": {}, " + f"{side} {limit:g}",
                value.round(SHOWN_DIGITS),
            )
            broken = value < limit if is_least else value > limit
            faults.append(
                fault(
                    self.column,
                    broken,
                    reason,
                )
            )
        for phrase in self.forbidden:
            there = text.str.to_lowercase().str.contains(
                phrase.lower(),
                literal=True,
            )
            faults.append(
                fault(
                    self.column,
                    there,
                    f"forbidden phrase: {phrase}",
                )
            )
        return faults


class Measure(NamedTuple):
    """A number that is measured of each text.

    Attributes:
      name: in reasons.
      of: its expression; 0 where the text has nothing to measure.
    """

    name: str
    of: Callable[[pl.Expr], pl.Expr]


# ---- internals ----


def _one_a_name(fields: Mapping[str, float]) -> list[str]:
    """Return fields so that each measure is there once."""
    return list({MEASURES[field].name: field for field in fields}.values())


def _share(
    part: pl.Expr,
    whole: pl.Expr,
) -> pl.Expr:
    """Return part / whole, 0 where there is nothing."""
    return pl.when(whole > 0).then(part / whole).otherwise(part * 0.0)


def _characters(text: pl.Expr) -> pl.Expr:
    return text.str.len_chars()


def _words(text: pl.Expr) -> pl.Expr:
    return text.str.count_matches(r"\S+")


def _word_length(text: pl.Expr) -> pl.Expr:
    letters = text.str.replace_all(
        r"\s+",
        "",
    ).str.len_chars()
    return _share(letters, _words(text))


def _symbols(text: pl.Expr) -> pl.Expr:
    hashes = text.str.count_matches(
        "#",
        literal=True,
    )
    ellipses = text.str.count_matches(r"\.\.\.|…")
    return _share(
        pl.max_horizontal(hashes, ellipses),
        _words(text),
    )


def _digits(text: pl.Expr) -> pl.Expr:
    return _share(
        text.str.count_matches(r"\p{Nd}"),
        _characters(text),
    )


def _alphabetic_words(text: pl.Expr) -> pl.Expr:
    return _share(
        text.str.count_matches(r"\S*\p{L}\S*"),
        _words(text),
    )


def _bullet_lines(text: pl.Expr) -> pl.Expr:
    bullets = text.str.count_matches(r"(?m)^[^\S\n]*[•‣◦⁃∙●○■▪▸·*-]")  # noqa: RUF001
    return _share(bullets, _line_count(text))


def _ellipsis_lines(text: pl.Expr) -> pl.Expr:
    ellipses = text.str.count_matches(r"(?m)(?:\.\.\.|…)[^\S\n]*$")
    return _share(ellipses, _line_count(text))


def _line_count(text: pl.Expr) -> pl.Expr:
    return text.str.count_matches(r"(?m)^.*\S.*$")


def _lines(text: pl.Expr) -> pl.Expr:
    """Return the lines that are not empty, without white space at their ends."""
    return text.str.extract_all(r"\S(?:.*\S)?")


def _repeated_lines(text: pl.Expr) -> pl.Expr:
    lines = _lines(text)
    count = lines.list.len()
    return _share(
        count.cast(pl.Int64) - lines.list.n_unique(),
        count,
    )


def _repeated_characters(text: pl.Expr) -> pl.Expr:
    lines = _lines(text)
    every = lines.list.join("").str.len_chars().cast(pl.Int64)
    distinct = lines.list.unique().list.join("").str.len_chars()
    return _share(every - distinct, every)


MEASURES = {
    "least_characters": Measure("characters", _characters),
    "most_characters": Measure("characters", _characters),
    "least_words": Measure("words", _words),
    "most_words": Measure("words", _words),
    "least_word_length": Measure("mean word length", _word_length),
    "most_word_length": Measure("mean word length", _word_length),
    "most_symbols": Measure("symbols per word", _symbols),
    "most_digits": Measure("share of digits", _digits),
    "least_alphabetic_words": Measure(
        "share of words with a letter", _alphabetic_words
    ),
    "most_bullet_lines": Measure("share of bullet lines", _bullet_lines),
    "most_ellipsis_lines": Measure("share of lines with an ellipsis", _ellipsis_lines),
    "most_repeated_lines": Measure("share of repeated lines", _repeated_lines),
    "most_repeated_characters": Measure(
        "share of characters in repeated lines", _repeated_characters
    ),
}

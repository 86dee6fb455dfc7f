"""Cleaning of text: Unicode's forms, control characters, white space, HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    Kind,
    fault,
    listed,
    noted,
    require,
    require_choice,
)

# What ends a line in one of Unicode's scripts (Unicode Standard Annex 14: BK, CR, NL).
LINE_ENDS = r"\r\n?|[\x0B\x0C\x{85}\x{2028}\x{2029}]"
# Characters that show nothing: C0 and C1 controls but tab and line feed, soft hyphen,
# zero-width space, word joiner and byte-order mark, marks of direction, interlinear
# annotation, noncharacters. Joiners (U+200C, U+200D) stay: Persian, Hindi and emoji are
# spelled with them.
INVISIBLE = (
    r"[\x00-\x08\x0E-\x1F\x7F-\x9F\x{AD}\x{200B}\x{2060}\x{FEFF}"
    r"\x{202A}-\x{202E}\x{2066}-\x{2069}\x{FFF9}-\x{FFFB}"
    r"\x{FDD0}-\x{FDEF}\x{FFFE}\x{FFFF}]"
)
# Elements of HTML whose content is no text, and those that stand on lines of their own.
NO_TEXT = r"(?is)<!--.*?-->|<script\b.*?</script\s*>|<style\b.*?</style\s*>"
BLOCKS = (
    r"(?i)</?(?:address|article|aside|blockquote|br|dd|div|dl|dt|figure|footer|form"
    r"|h[1-6]|header|hr|li|main|nav|ol|p|pre|section|table|td|th|tr|ul)\b[^<>]*>"
)
TAGS = r"</?[A-Za-z][^<>]*>|<![A-Za-z][^<>]*>"
ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});")

FORMS = ("NFC", "NFKC", "keep")
SPACES = ("collapse", "lines", "keep")
HTML = ("keep", "entities", "tags")
TEXT = Kind(
    "text",
    lambda dtype: dtype in (pl.String, pl.Null),
    "CheckSchema casts columns; put it before this step",
)
_CLEANED = "lepton.cleaned."


@dataclass(frozen=True)
class CleanText(Step):
    """Bring text to one spelling, without what can't be seen.

    Cleaning a second time changes nothing. Missing cells stay missing.

    Attributes:
      columns: of text.
      form: Unicode's normal form (Unicode Standard Annex 15): "NFC" composes letters
        and their marks; "NFKC" also makes ligatures, wide letters and superscripts
        plain; "keep" leaves the form.
      spaces: "collapse": each run of white space is one space, none is at the ends;
        "lines": the same within a line, and at most one empty line between two lines;
        "keep" leaves white space, but for the ends of lines, which are line feeds.
      html: "entities" replaces `&amp;` and the like, which must end with a semicolon;
        "tags" also takes out tags, comments, scripts and styles; "keep" leaves both.
      noted: whether each changed cell has a note.
    """

    columns: Sequence[str]
    form: Literal["NFC", "NFKC", "keep"] = "NFC"
    spaces: Literal["collapse", "lines", "keep"] = "collapse"
    html: Literal["keep", "entities", "tags"] = "keep"
    noted: bool = True

    idempotent: ClassVar[bool] = True
    order_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(
            self,
            "columns",
            listed(self.columns),
        )

    def check(
        self,
        schema: pl.Schema,
    ) -> pl.Schema:
        require_choice(self, "form", FORMS)
        require_choice(self, "spaces", SPACES)
        require_choice(self, "html", HTML)
        require(self, schema, self.columns, TEXT)
        return super().check(schema)

    def run(
        self,
        table: pl.LazyFrame,
        state: pl.DataFrame | None,
    ) -> Outcome:
        columns = self.columns
        cleaned = table.with_columns(
            self._cleaned(pl.col(name).cast(pl.String)).alias(_CLEANED + name)
            for name in columns
        )
        after = {name: pl.col(_CLEANED + name) for name in columns}
        result = cleaned.with_columns(**after).drop(_CLEANED + name for name in columns)
        if not self.noted:
            return Outcome(result)
        faults = [
            fault(
                name,
                pl.col(name) != after[name],
                "text cleaned",
            )
            for name in columns
        ]
        return Outcome(
            result,
            noted(cleaned, "changed", faults, after),
        )

    def _cleaned(
        self,
        text: pl.Expr,
    ) -> pl.Expr:
        if self.html == "keep":
            return self._spelled(text)
        return text.map_batches(
            self._without_html,
            return_dtype=pl.String,
            is_elementwise=True,
        )

    def _spelled(
        self,
        text: pl.Expr,
    ) -> pl.Expr:
        """Return text in its form, without invisible characters, with its spaces."""
        text = self._normal(text)
        text = text.str.replace_all(LINE_ENDS, "\n")
        text = text.str.replace_all(INVISIBLE, "")
        # A letter and its mark may have met only now.
        text = self._normal(text)
        if self.spaces == "collapse":
            text = text.str.replace_all(r"\s+", " ")
            return text.str.strip_chars()
        if self.spaces == "lines":
            text = text.str.replace_all(r"[^\S\n]+", " ")
            text = text.str.replace_all(r" ?\n ?", "\n")
            text = text.str.replace_all(r"\n{3,}", "\n\n")
            return text.str.strip_chars()
        return text

    def _normal(
        self,
        text: pl.Expr,
    ) -> pl.Expr:
        return text if self.form == "keep" else text.str.normalize(self.form)

    def _without_html(
        self,
        text: pl.Series,
    ) -> pl.Series:
        """Return text that a second cleaning would not change.

        What is taken out may leave a tag, an entity or two marks that were none before,
        as in `&amp;lt;` or `<<b>i>`, so this goes on until nothing changes.
        """
        before = text
        while True:
            after = self._passed(before)
            if after.equals(before):
                return after
            before = after

    def _passed(
        self,
        text: pl.Series,
    ) -> pl.Series:
        column = pl.col(text.name)
        if self.html == "tags":
            column = column.str.replace_all(NO_TEXT, "")
            column = column.str.replace_all(BLOCKS, "\n")
            column = column.str.replace_all(TAGS, "")
        shown = text.to_frame().select(column).to_series()
        plain = _without_entities(shown)
        return plain.to_frame().select(self._spelled(pl.col(text.name))).to_series()


# ---- internals ----


def _without_entities(text: pl.Series) -> pl.Series:
    """Return text with its entities replaced."""
    has = text.str.contains(
        "&",
        literal=True,
    ).fill_null(False)
    if not has.any():
        return text
    plain = [
        ENTITY.sub(
            _character,
            cell,
        )
        for cell in text.filter(has)
    ]
    return text.scatter(
        has.arg_true(),
        pl.Series(plain, dtype=pl.String),
    )


def _character(entity: re.Match[str]) -> str:
    return html.unescape(entity[0])

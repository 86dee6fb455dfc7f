"""Cleaning of text: Unicode's forms, control characters, white space, HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import polars as pl

from lepton_jax.data.prepare.step import Outcome, Step
from lepton_jax.data.prepare.steps.columns import (
    Kind,
    as_text,
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
# Characters that no cleaning changes, but for white space. What is below U+0300 is in
# NFC, whatever stands next to it (Unicode Standard Annex 15, section 9: quick check);
# NFKC also changes some of these, such as a superscript.
PLAIN = {
    "NFC": r" -~\x{A1}-\x{AC}\x{AE}-\x{2FF}",
    "NFKC": r" -~",
    "keep": r" -~\x{A1}-\x{AC}\x{AE}-\x{2FF}",
}
# What only texts have that are not in a form.
UNFORMED = {"NFC": r"[^\x00-\x{2FF}]", "NFKC": r"[^\x00-\x7F]"}
# What texts have that are not clean, with PLAIN in place of the braces.
# 10 million texts of 102 bytes cost 2 s of one core if they are clean, 19 s if none is,
# and 41 s if every operation is done on each, as measured on a shared 2-core machine
# with `python tests/data/prepare/figures_of_steps.py clean`.
DIRTY = {
    "collapse": r"[^{}]|  |^ | $",
    "lines": r"[^{}\n]|  |^\s|\s$| \n|\n |\n\n\n",
    "keep": r"[^{}\n\t]",
}
DIRTY_HTML = {"keep": "", "entities": "|&", "tags": "|[&<]"}
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
        cleaned = table.with_columns(self._expression(name) for name in columns)
        after = {name: pl.col(_CLEANED + name) for name in columns}
        own = [_CLEANED + name for name in columns]
        result = cleaned.with_columns(**after).drop(own)
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

    def _expression(self, name: str) -> pl.Expr:
        text = as_text(name)
        cleaned = text.map_batches(
            self._cleaned,
            return_dtype=pl.String,
            is_elementwise=True,
        )
        return cleaned.alias(_CLEANED + name)

    def _cleaned(self, text: pl.Series) -> pl.Series:
        """Return the cleaned text; what is clean already costs one look."""
        dirty = DIRTY[self.spaces].replace("{}", PLAIN[self.form])
        dirty += DIRTY_HTML[self.html]
        clean = self._spelled if self.html == "keep" else self._without_html
        return _where(text, text.str.contains(dirty), clean)

    def _spelled(self, text: pl.Series) -> pl.Series:
        """Return text in its form, without invisible characters, with its spaces."""
        text = self._normal(text)
        text = text.str.replace_all(LINE_ENDS, "\n")
        text = _where(text, text.str.contains(INVISIBLE), self._visible)
        if self.spaces == "collapse":
            uneven = text.str.contains(r"\s\s|[^\S ]")
            text = _where(text, uneven, _collapsed)
            return text.str.strip_chars()
        if self.spaces == "lines":
            text = text.str.replace_all(r"[^\S\n]+", " ")
            text = text.str.replace_all(r" ?\n ?", "\n")
            text = text.str.replace_all(r"\n{3,}", "\n\n")
            return text.str.strip_chars()
        return text

    def _visible(self, text: pl.Series) -> pl.Series:
        shown = text.str.replace_all(INVISIBLE, "")
        # A letter and its mark may have met only now.
        return self._normal(shown)

    def _normal(self, text: pl.Series) -> pl.Series:
        """Return text in its form."""
        form = self.form
        if form == "keep":
            return text
        others = text.str.contains(UNFORMED[form])
        return _where(text, others, lambda some: some.str.normalize(form))

    def _without_html(self, text: pl.Series) -> pl.Series:
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

    def _passed(self, text: pl.Series) -> pl.Series:
        if self.html == "tags":
            text = text.str.replace_all(NO_TEXT, "")
            text = text.str.replace_all(BLOCKS, "\n")
            text = text.str.replace_all(TAGS, "")
        has_entity = text.str.contains("&", literal=True)
        text = _where(text, has_entity, _without_entities)
        return self._spelled(text)


# ---- internals ----


def _where(
    text: pl.Series,
    which: pl.Series,
    change: Callable[[pl.Series], pl.Series],
) -> pl.Series:
    """Change some texts, where finding them costs less than changing all."""
    which = which.fill_null(False)
    count = which.sum()
    if count == 0:
        return text
    if count == len(text):
        return change(text)
    changed = change(text.filter(which))
    # `scatter` writes to its series.
    return text.clone().scatter(which.arg_true(), changed)


def _collapsed(text: pl.Series) -> pl.Series:
    # One plain space is left alone: a third of the time of \s+.
    return text.str.replace_all(r"\s\s+|[^\S ]", " ")


def _without_entities(text: pl.Series) -> pl.Series:
    plain = [ENTITY.sub(_character, cell) for cell in text]
    return pl.Series(text.name, plain, dtype=pl.String)


def _character(entity: re.Match[str]) -> str:
    return html.unescape(entity[0])

"""The types of columns of text cells, and how the cells become values.

A column is looked at as a whole, like `lepton_jax.data.notation` does. Cells that argue
against the type become missing values, and are counted:

    age            -> whole numbers; 1 cell argues against it ("unknown")
    22
    38
    N/A               a word for a missing value: not counted
    unknown

If too many argue against every type but text, although most look like numbers, that is
a question, and the error says how to answer it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import polars as pl

from lepton_jax.data.notation import (
    MOST_WORDS,
    NUMERIC_SHARE,
    Look,
    Notation,
    decimal_of,
    look,
    number,
)
from lepton_jax.data.readers.reader import Column
from lepton_jax.data.readers.times import FORMATS, Found, TimeFormat, forms_of
from lepton_jax.errors import DataError, nearest

# Words for a missing value. Those of `lepton_jax.data.table` and Python's None.
MISSING = (
    "",
    "?",
    "NA",
    "N/A",
    "n/a",
    "#N/A",
    "<NA>",
    "NaN",
    "nan",
    "NaT",
    "NULL",
    "Null",
    "null",
    "None",
    "\\N",
)

TRUTH = (
    ("true", "false"),
    ("yes", "no"),
    ("t", "f"),
    ("y", "n"),
)

# Assumptions: no number or date is longer, and no look at more distinct cells differs.
LONGEST_VALUE = 64  # characters
MOST_DISTINCT = 20_000

EXAMPLES = 5  # cells against a type that are shown

MOST_DIGITS = 15  # that a float64 holds exactly
PLAIN = Notation()  # 1234.5
WHOLE = r"^[+-]?[0-9]+$"
LEADING_ZERO = r"^[+-]?0[0-9]"

_NAMED = {
    "Boolean": pl.Boolean(),
    "Date": pl.Date(),
    "Datetime": pl.Datetime("us"),
    "Float32": pl.Float32(),
    "Float64": pl.Float64(),
    "Int8": pl.Int8(),
    "Int16": pl.Int16(),
    "Int32": pl.Int32(),
    "Int64": pl.Int64(),
    "String": pl.String(),
    "Time": pl.Time(),
    "UInt8": pl.UInt8(),
    "UInt16": pl.UInt16(),
    "UInt32": pl.UInt32(),
    "UInt64": pl.UInt64(),
}


@dataclass(frozen=True)
class TypeSettings:
    """The arguments by which a person overrides what is inferred of text cells.

    Attributes:
      types: of columns: names such as "Float64" and "String", or Polars' types.
      missing: words for a missing value.
      decimal: the decimal mark of all columns, "." or ",".
      thousands: the mark between groups of three digits.
      day_first: whether dates such as 3/4/2024 begin with the day.
    """

    types: Mapping[str, Any] = field(default_factory=dict)
    missing: Sequence[str] = MISSING
    decimal: str | None = None
    thousands: str | None = None
    day_first: bool | None = None

    def __post_init__(self) -> None:
        if self.decimal not in (None, ".", ","):
            raise DataError(
                f"decimal is {self.decimal!r}",
                where="decimal",
                remedy="use '.' or ',', or leave it out",
            )
        is_mark = self.thousands in (None, "", ",", ".", " ", "'")
        if not is_mark or (self.thousands and self.thousands == self.decimal):
            raise DataError(
                f"thousands is {self.thousands!r} with decimal {self.decimal!r}",
                where="thousands",
                remedy="use another mark than decimal's: ',', '.', ' ' or \"'\"",
            )
        if isinstance(self.missing, str):
            raise DataError(
                f"missing is {self.missing!r}, not a list of words",
                where="missing",
                remedy=f"write missing=[{self.missing!r}]",
            )
        named = {
            name: _type(
                name,
                type_,
            )
            for name, type_ in self.types.items()
        }
        object.__setattr__(self, "types", named)


@dataclass(frozen=True)
class Plan:
    """How the cells of a column become values.

    Attributes:
      column: what is said of it.
      notation: of its numbers.
      times: forms of its dates and times.
      strip: whether spaces around text are taken away.
      truth: words for true and false.
    """

    column: Column
    notation: Notation = PLAIN
    times: tuple[TimeFormat, ...] = ()
    strip: bool = True
    truth: tuple[str, str] = ("true", "false")

    @property
    def is_direct(self) -> bool:
        """Whether Polars' own parser reads the cells."""
        type_ = self.column.type
        if type_ == pl.String():
            return not self.strip
        return type_.is_numeric() and self.notation == Notation()

    def values(
        self,
        cells: pl.Series,
        missing: Sequence[str],
    ) -> tuple[pl.Series, pl.Series]:
        """Return the values of some cells, and which cells argue against the type.

        Args:
          cells: as they are written, null where there is nothing.
          missing: words for a missing value.
        """
        type_ = self.column.type
        if type_ == pl.String():
            text = cells.str.strip_chars() if self.strip else cells
            text = text.set(
                text.is_in(list(missing)),
                None,
            )
            return text, pl.repeat(
                False,
                len(cells),
                dtype=pl.Boolean,
                eager=True,
            )
        text = cells.str.strip_chars()
        text = text.set(
            text.is_in(list(missing)),
            None,
        )
        values = self._parsed(text)
        return values, text.is_not_null() & values.is_null()

    def _parsed(
        self,
        text: pl.Series,
    ) -> pl.Series:
        type_ = self.column.type
        if type_ == pl.Boolean():
            return _booleans(text, self.truth)
        if self.times:
            return parsed_times(text, self.times, type_)
        if self.notation == Notation():
            return plain_numbers(text, type_)
        return _spelled(text, self.notation).cast(
            type_,
            strict=False,
        )


Locate = Callable[[int], str]


def infer(
    cells: pl.DataFrame,
    settings: TypeSettings,
    locate: Locate,
    strip: bool = True,
) -> list[Plan]:
    """Find the types of columns.

    Args:
      cells: columns of text, null where there is nothing.
      settings: what somebody has set.
      locate: the number of a row to its place, for messages.
      strip: whether spaces around cells of text are taken away.

    Raises:
      DataError: most cells of a column look like numbers or dates that can't be read
        as such.
    """
    for name in settings.types:
        if name not in cells.columns:
            raise DataError(
                f"there is no column {name!r} to have a type"
                f"{nearest(name, cells.columns)}",
                where=locate(0).partition(",")[0],
                remedy=f"name some of {', '.join(cells.columns[:20])}",
            )
    views = views_of(cells, settings.missing, strip)
    looks: dict[str, Look] = {}
    counts: dict[str, Counter[str]] = {}
    for view in views:
        if view.needs_look() and view.name not in settings.types:
            counts[view.name] = view.counts()
            looks[view.name] = look(
                counts[view.name],
                settings.decimal,
                settings.thousands,
            )
    _settle_decimal(views, looks, counts, settings)
    plans = []
    for view in views:
        seen = looks.get(view.name)
        plan = _plan(
            view,
            seen,
            counts.get(view.name, Counter()),
            settings,
            locate,
        )
        plans.append(_counted(plan, view))
    return plans


def plain_numbers(
    text: pl.Series,
    type_: pl.DataType,
) -> pl.Series:
    """Return the numbers that cells spell in the plain notation."""
    if type_.is_integer():
        return text.cast(type_, strict=False)
    plain = text.str.replace(
        "\u2212",
        "-",
        literal=True,
    )
    # Rust reads the word nan in any case; it is no number here.
    return plain.cast(
        type_,
        strict=False,
    ).fill_nan(None)


def parsed_times(
    text: pl.Series,
    formats: Sequence[TimeFormat],
    type_: pl.DataType,
) -> pl.Series:
    """Return the dates or times that cells spell in the first format that fits."""
    values = pl.repeat(
        None,
        len(text),
        dtype=type_,
        eager=True,
    )
    for time_format in formats:
        found = time_format.parsed(text).cast(
            type_,
            strict=False,
        )
        values = values.zip_with(values.is_not_null(), found)
    return values


# ---- a column as it is looked at ----


@dataclass
class View:
    """A column of cells.

    Attributes:
      name: of the column.
      text: stripped cells, null where a value is missing.
      strip: whether spaces around text are taken away.
      missing: number of missing cells.
      numbers: of the cells that are plain numbers, Float64, else null.
      whole: whether all cells are whole numbers.
      points: whether some cell has a point.
    """

    name: str
    text: pl.Series
    strip: bool
    missing: int
    numbers: pl.Series
    whole: bool
    points: bool

    @property
    def filled(self) -> int:
        """Cells that have a value."""
        return len(self.text) - self.missing

    def is_plain(self) -> bool:
        """Whether all cells are plain numbers."""
        return len(self.numbers) - self.numbers.null_count() == self.filled

    def has_points(self) -> bool:
        """Whether all cells are plain numbers, some of them with a point."""
        return self.is_plain() and self.points

    def truth(self) -> tuple[str, str] | None:
        """Return the words for true and false, if there are no others."""
        lower = self.text.drop_nulls().str.to_lowercase()
        words = set(lower.unique().head(3))
        for pair in TRUTH:
            is_sure = pair == TRUTH[0] and words and words <= set(pair)
            if is_sure or words == set(pair):
                return pair
        return None

    def is_long(self) -> bool:
        """Whether most cells are too long for a number or a date."""
        lengths = self.text.str.len_bytes()
        long = (lengths > LONGEST_VALUE).sum()
        return 2 * int(long) > self.filled

    def needs_look(self) -> bool:
        """Whether only a look at all distinct cells tells the type."""
        if not self.filled or self.is_plain() or self.is_long():
            return False
        return self.truth() is None

    def counts(self) -> Counter[str]:
        """Return how often each distinct cell is there."""
        table = (
            self.text.drop_nulls()
            .value_counts(sort=True, name="count")
            .sort("count", self.name, descending=[True, False])
            .head(MOST_DISTINCT)
        )
        words = table[self.name].to_list()
        return Counter(
            dict(
                zip(
                    words,
                    table["count"].to_list(),
                    strict=True,
                )
            )
        )


def views_of(
    cells: pl.DataFrame,
    missing: Sequence[str],
    strip: bool,
) -> list[View]:
    """Look at all columns at once, as thousands of small queries take long."""
    text = pl.all().str.strip_chars()
    is_missing = text.is_in(list(missing))
    texts = cells.select(pl.when(~is_missing).then(text))
    numbers = texts.select(
        pl.all()
        .cast(
            pl.Float64,
            strict=False,
        )
        .fill_nan(None)
    )
    whole = texts.select(pl.all().str.contains(WHOLE).all())
    points = texts.select(
        pl.all()
        .str.contains(
            ".",
            literal=True,
        )
        .any()
    )
    nulls = texts.null_count()
    return [
        View(
            name,
            texts[name],
            strip,
            nulls[name][0],
            numbers[name],
            bool(whole[name][0]),
            bool(points[name][0]),
        )
        for name in cells.columns
    ]


# ---- internals ----


def _type(
    column: str,
    given: Any,
) -> pl.DataType:
    if isinstance(given, str):
        if given in _NAMED:
            return _NAMED[given]
    elif isinstance(given, pl.DataType):
        return given
    elif isinstance(given, type) and issubclass(
        given,
        pl.DataType,
    ):
        return given()
    raise DataError(
        f"the type of column {column!r} is {given!r}{nearest(str(given), _NAMED)}",
        where="types",
        remedy=f"use one of {', '.join(_NAMED)}",
    )


def _settle_decimal(
    views: list[View],
    looks: dict[str, Look],
    counts: dict[str, Counter[str]],
    settings: TypeSettings,
) -> None:
    """Look again at columns that leave the decimal mark open, by the file's mark.

    A file has one decimal mark: what other columns prove holds for these.
    """
    decimal = _proved_decimal(views, looks, counts)
    if decimal is None or settings.decimal is not None:
        return
    for view in views:
        if view.name in settings.types:
            continue
        seen = looks.get(view.name)
        if seen is None and not (decimal == "," and view.has_points()):
            continue
        if seen is not None and not _is_open(seen, decimal):
            continue
        counts[view.name] = view.counts()
        again = look(
            counts[view.name],
            decimal,
            settings.thousands,
        )
        if seen is None or again.kind == "numbers":
            looks[view.name] = again


def _is_open(seen: Look, decimal: str) -> bool:
    """Whether a column may be read with the file's decimal mark, but was not."""
    if seen.kind == "ambiguous":
        return True
    return seen.kind == "numbers" and seen.notation.decimal != decimal


def _proved_decimal(
    views: list[View],
    looks: dict[str, Look],
    counts: dict[str, Counter[str]],
) -> str | None:
    """Return the decimal mark, if all columns that prove one prove the same."""
    proofs = set()
    for view in views:
        seen = looks.get(view.name)
        if seen is not None and seen.kind == "numbers":
            proofs.add(
                decimal_of(
                    counts[view.name],
                    seen.notation,
                )
            )
        elif seen is None and view.has_points():
            points = view.text.filter(
                view.text.str.contains(
                    ".",
                    literal=True,
                )
            )
            cells = points.head(MOST_DISTINCT).to_list()
            proofs.add(decimal_of(cells, PLAIN))
    proofs.discard(None)
    return proofs.pop() if len(proofs) == 1 else None


def _plan(
    view: View,
    seen: Look | None,
    counts: Counter[str],
    settings: TypeSettings,
    locate: Locate,
) -> Plan:
    """Return how a column is read."""
    if view.name in settings.types:
        return _set_plan(view, settings)
    if not view.filled:
        return _text(view, "no cell has a value")
    if seen is None:
        return _plain(view) if view.is_plain() else _unlooked(view)
    if seen.kind == "numbers":
        return _numbers(view, seen, counts)
    if seen.kind == "dates":
        return _times(view, counts, settings, locate)
    if seen.kind == "codes":
        shown = ", ".join(
            map(
                repr,
                seen.cells[:3],
            )
        )
        return _text(
            view,
            f"codes: most distinct cells are numbers, others are not ({shown}, ...)",
        )
    if seen.kind == "categories":
        return _text(view, "cells are words")
    raise question(view, seen, counts, locate)


def _unlooked(view: View) -> Plan:
    """Return the plan of a column whose type its words or their length tell."""
    truth = view.truth()
    if truth is None:
        return _text(view, "most cells are long texts")
    column = Column(
        view.name,
        pl.Boolean(),
        f"all cells are {' or '.join(truth)}",
    )
    return Plan(column, truth=truth)


def _text(view: View, reason: str) -> Plan:
    column = Column(
        view.name,
        pl.String(),
        reason,
    )
    return Plan(column, strip=view.strip)


def _plain(view: View) -> Plan:
    """Return the plan of a column all of whose cells are plain numbers."""
    if not view.whole:
        infinite = int(view.numbers.is_infinite().sum())
        reason = "all cells are numbers"
        if infinite:
            reason += f", {infinite} of them infinite"
        return Plan(
            Column(
                view.name,
                pl.Float64(),
                reason,
            )
        )
    return _whole(view)


def _whole(view: View) -> Plan:
    text = view.text.drop_nulls()
    widths = text.str.len_bytes()
    has_zeros = bool(text.str.contains(LEADING_ZERO).any())
    if has_zeros and widths.min() == widths.max():
        return _text(
            view,
            "codes: all cells are digits of one length, some with zeros in front",
        )
    for type_ in (pl.Int64(), pl.UInt64()):
        if not text.cast(
            type_,
            strict=False,
        ).null_count():
            return Plan(Column(view.name, type_, "all cells are whole numbers"))
    return _text(view, "codes: whole numbers with more digits than 64 bits hold")


def _numbers(
    view: View,
    seen: Look,
    counts: Counter[str],
) -> Plan:
    """Return the plan of a column most of whose cells are numbers."""
    notation = seen.notation
    readable = [
        cell
        for cell in counts
        if number(
            cell,
            notation,
        )
        is not None
    ]
    cores = [_core(cell, notation) for cell in readable]
    if notation == Notation():
        is_whole = all(
            re.fullmatch(
                WHOLE,
                cell,
            )
            for cell in cores
        )
    else:
        is_whole = not any(
            re.search(rf"[eE{notation.decimal}]", core) for core in cores
        )
    is_small = all(len(core) <= MOST_DIGITS for core in cores)

    type_ = pl.Int64() if is_whole and is_small else pl.Float64()
    kind = "whole numbers" if type_ == pl.Int64() else "numbers"
    reason = f"most cells are {kind}"
    if notation != Notation():
        reason = f"cells are {kind} like {example(notation)}"
    return Plan(
        Column(view.name, type_, reason),
        notation,
    )


def _core(cell: str, notation: Notation) -> str:
    """Return a cell without the text around its number."""
    for part in notation.unit.split("#"):
        cell = cell.replace(part, "") if part else cell
    return cell


def example(notation: Notation) -> str:
    """Return a number that is written in a notation."""
    text = f"1{notation.thousands}234{notation.decimal}5"
    return (notation.unit or "#").replace(
        "#",
        text,
        1,
    )


def _set_plan(view: View, settings: TypeSettings) -> Plan:
    """Return the plan of a column whose type somebody has set."""
    type_ = settings.types[view.name]
    column = Column(view.name, type_, "set")
    if type_ == pl.String():
        return Plan(column, strip=view.strip)
    if type_ == pl.Boolean():
        return Plan(
            column,
            truth=view.truth() or TRUTH[0],
        )
    if type_.is_temporal():
        forms = [
            each.format
            for each in forms_of(
                view.counts(),
                settings.day_first,
            )
        ]
        return Plan(
            column,
            times=tuple(forms) or FORMATS[:1],
        )
    if view.is_plain():
        return Plan(column)
    seen = look(
        view.counts(),
        settings.decimal,
        settings.thousands,
    )
    return Plan(column, seen.notation)


def _times(
    view: View,
    counts: Counter[str],
    settings: TypeSettings,
    locate: Locate,
) -> Plan:
    """Return the plan of a column of dates or times.

    Raises:
      DataError: days and months may be either, or the forms are several.
    """
    forms = forms_of(counts, settings.day_first)
    if not forms:
        return _text(view, "dates or times in a form that is not read as such")
    best = forms[0]
    rivals = [each for each in forms[1:] if each.is_rival(best)]
    if rivals:
        raise _either(
            view,
            best,
            rivals[0],
            counts,
            locate,
        )
    chosen = [best]
    for each in forms[1:]:
        if (
            _goes_with(
                each,
                chosen,
            )
            and _read(chosen, counts) < counts.total()
        ):
            chosen.append(each)
    read = _read(chosen, counts)
    if read < NUMERIC_SHARE * counts.total():
        raise _several(view, chosen, counts, locate)

    types = {each.format.type for each in chosen}
    type_ = best.format.type
    if type_ == pl.Date() and len(types) > 1:
        type_ = pl.Datetime("us")
    called = " or ".join(each.format.called for each in chosen)
    column = Column(view.name, type_, f"cells are dates or times like {called}")
    return Plan(
        column,
        times=tuple(each.format for each in chosen),
    )


def _goes_with(
    form: Found,
    chosen: list[Found],
) -> bool:
    """Whether a form reads cells that others don't, as values of one type."""
    dates = (pl.Date(), pl.Datetime("us"))
    best = chosen[0].format.type
    of_one_kind = form.format.type == best or {form.format.type, best} <= set(dates)
    orders = {each.format.day_first for each in (*chosen, form)} - {None}
    if not of_one_kind or len(orders) > 1:
        return False
    return bool((form.values.is_not_null() & ~_is_read(chosen)).any())


def _is_read(chosen: list[Found]) -> pl.Series:
    read = chosen[0].values.is_not_null()
    for each in chosen[1:]:
        read |= each.values.is_not_null()
    return read


def _read(
    chosen: list[Found],
    counts: Counter[str],
) -> int:
    """Return the rows that one of some forms reads."""
    rows = pl.Series(
        list(counts.values()),
        dtype=pl.Int64,
    )
    return int(rows.filter(_is_read(chosen)).sum())


def _either(
    view: View,
    best: Found,
    rival: Found,
    counts: Counter[str],
    locate: Locate,
) -> DataError:
    """Return the error for dates whose day may be the month."""
    i = int((best.values != rival.values).arg_max() or 0)
    cell = list(counts)[i]
    row = int((view.text == cell).arg_max() or 0)
    return DataError(
        f"{cell!r} may be {best.values[i]} or {rival.values[i]}, and nothing in the"
        " column tells which",
        where=f"{locate(row)}, column {view.name!r}",
        remedy=(
            "set `day_first` to True or False, or"
            f" types={{{view.name!r}: 'String'}} to keep the column as text"
        ),
    )


def _several(
    view: View,
    chosen: list[Found],
    counts: Counter[str],
    locate: Locate,
) -> DataError:
    """Return the error for a column of dates many of which are written otherwise."""
    unread = ~_is_read(chosen)
    i = int(unread.arg_max() or 0)
    cell = list(counts)[i]
    rows = counts.total() - _read(chosen, counts)
    row = int((view.text == cell).arg_max() or 0)
    return DataError(
        f"{cell!r} is no date like {chosen[0].format.called}, as others of the column;"
        f" so are {rows} of its {counts.total()} cells",
        where=f"{locate(row)}, column {view.name!r}",
        remedy=(
            "write all dates in one form, or"
            f" types={{{view.name!r}: 'String'}} to keep the column as text"
        ),
    )


def _counted(plan: Plan, view: View) -> Plan:
    """Return a plan with the number of cells against it."""
    column = replace(plan.column, missing=view.missing)
    is_sure = plan.is_direct and view.is_plain() and column.reason != "set"
    if is_sure or column.type == pl.String():
        return replace(plan, column=column)
    _, wrong = plan.values(
        view.text,
        (),
    )
    against = int(wrong.sum())
    words = view.text.filter(wrong).unique(maintain_order=True)
    column = replace(
        column,
        against=against,
        examples=tuple(words.head(EXAMPLES).to_list()),
    )
    return replace(plan, column=column)


def _booleans(
    text: pl.Series,
    truth: tuple[str, str],
) -> pl.Series:
    lower = text.str.to_lowercase()
    words = {truth[0]: True, truth[1]: False}
    return lower.replace_strict(
        words,
        default=None,
        return_dtype=pl.Boolean,
    )


def _spelled(
    text: pl.Series,
    notation: Notation,
) -> pl.Series:
    """Return the numbers that cells spell in a notation, Float64.

    Most cells are spelled strictly, and are read by Polars; each other distinct one by
    `number`.
    """
    before, _, after = (notation.unit or "#").partition("#")
    marks = {" ": "[ \u00a0\u202f\u2009]", "'": "['\u2019]"}
    mark = marks.get(
        notation.thousands,
        re.escape(notation.thousands),
    )
    whole = r"[0-9]+"
    if notation.thousands:
        whole = rf"(?:[1-9][0-9]{{0,2}}(?:{mark}[0-9]{{3}})+|[0-9]+)"
    space = "[ \u00a0\u202f]*"
    strict = (
        rf"^([-+]?){re.escape(before)}{space}"
        rf"({whole}(?:{re.escape(notation.decimal)}[0-9]+)?)"
        rf"{space}{re.escape(after)}$"
    )
    sign = text.str.extract(strict, 1)
    digits = text.str.extract(strict, 2)
    if notation.thousands:
        digits = digits.str.replace_all(mark, "")
    clean = sign + digits.str.replace(
        notation.decimal,
        ".",
        literal=True,
    )
    values = clean.cast(pl.Float64, strict=False)

    odd = text.filter(text.is_not_null() & values.is_null()).unique()
    if not len(odd):
        return values
    spelled = {
        cell: number(
            cell,
            notation,
        )
        for cell in odd.to_list()
    }
    others = text.replace_strict(
        spelled,
        default=None,
        return_dtype=pl.Float64,
    )
    return values.zip_with(values.is_not_null(), others)


def question(
    view: View,
    seen: Look,
    counts: Counter[str],
    locate: Locate,
) -> DataError:
    """Return the error for a column most of whose cells may be meant as numbers."""
    cell = seen.cells[0]
    rows = sum(counts[each] for each in seen.cells)
    share = f"{rows} of the column's {counts.total()} cells"
    shown = ", ".join(
        map(
            repr,
            seen.cells[:4],
        )
    )
    as_text = f"types={{{view.name!r}: 'String'}} to keep the column as text"
    what, ways = _asked(seen, cell, share, shown)
    row = int((view.text == cell).arg_max() or 0)
    return DataError(
        what,
        where=f"{locate(row)}, column {view.name!r}",
        remedy="; or ".join([*ways, as_text]),
    )


def _asked(
    seen: Look,
    cell: str,
    share: str,
    shown: str,
) -> tuple[str, list[str]]:
    """Return what is the question, and the ways to answer it."""
    mark = seen.notation.thousands
    if seen.kind == "ambiguous":
        as_decimal = cell.replace(mark, seen.notation.decimal)
        as_thousands = cell.replace(mark, "")
        return (
            f"{cell!r} may be {as_decimal} with a decimal mark or {as_thousands} with"
            f" thousands, and nothing in the file tells which: so are {share}",
            [f"set decimal={mark!r} for the one", f"thousands={mark!r} for the other"],
        )
    if seen.kind == "units":
        around = seen.notation.unit.replace("#", "")
        return (
            f"{cell!r} is a number with {around!r}, and so are {share}",
            [f"write the numbers alone, without {around!r}"],
        )
    if seen.kind == "marks":
        return (
            f"{cell!r} is a number, but not with the marks that `decimal` and"
            f" `thousands` set; so are {share}",
            ["leave the two out, or correct them"],
        )
    if seen.kind == "notations":
        return (
            f"{cell!r} is a number that is spelled otherwise than others of the column:"
            f" {share} are such, {shown}",
            ["write all numbers of the column in one way and one unit"],
        )
    ways = ["write a number or nothing instead"]
    if len(seen.cells) <= MOST_WORDS:
        ways.insert(0, f"add {shown} to `missing` if no value is meant")
    return (
        f"{cell!r} is no number, as most of the column's distinct cells are; {share}"
        f" are not: {shown}",
        ways,
    )

"""The forms of dates and times that are read.

3/4/2024 may be the third of April or the fourth of March. Where one cell of the column
has a day after the twelfth, the order is known; where none has, it is a question.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import polars as pl

# Distinct cells by which the forms to try are chosen; assumption.
CELLS_LOOKED_AT = 200

_NUMBERS = r"[0-9]{1,2}"
_WORD = r"[A-Za-z]{3,9}"
_YEAR = r"[0-9]{4}"

# (pattern, format, whether the day comes first; None: no doubt, words)
_DATES = (
    (rf"{_YEAR}-{_NUMBERS}-{_NUMBERS}", "%Y-%m-%d", None, "2024-12-31"),
    (rf"{_YEAR}/{_NUMBERS}/{_NUMBERS}", "%Y/%m/%d", None, "2024/12/31"),
    (rf"{_YEAR}\.{_NUMBERS}\.{_NUMBERS}", "%Y.%m.%d", None, "2024.12.31"),
    (rf"{_NUMBERS}\.{_NUMBERS}\.{_YEAR}", "%d.%m.%Y", None, "31.12.2024"),
    (rf"{_NUMBERS}/{_NUMBERS}/{_YEAR}", "%d/%m/%Y", True, "31/12/2024"),
    (rf"{_NUMBERS}/{_NUMBERS}/{_YEAR}", "%m/%d/%Y", False, "12/31/2024"),
    (rf"{_NUMBERS}-{_NUMBERS}-{_YEAR}", "%d-%m-%Y", True, "31-12-2024"),
    (rf"{_NUMBERS}-{_NUMBERS}-{_YEAR}", "%m-%d-%Y", False, "12-31-2024"),
    (rf"{_NUMBERS}/{_NUMBERS}/[0-9][0-9]", "%d/%m/%y", True, "31/12/24"),
    (rf"{_NUMBERS}/{_NUMBERS}/[0-9][0-9]", "%m/%d/%y", False, "12/31/24"),
    (rf"{_NUMBERS}-{_NUMBERS}-[0-9][0-9]", "%d-%m-%y", True, "31-12-24"),
    (rf"{_NUMBERS}-{_NUMBERS}-[0-9][0-9]", "%m-%d-%y", False, "12-31-24"),
    (rf"{_NUMBERS} {_WORD} {_YEAR}", "%d %B %Y", None, "31 Dec 2024"),
    (rf"{_NUMBERS}-{_WORD}-{_YEAR}", "%d-%B-%Y", None, "31-Dec-2024"),
    (rf"{_NUMBERS}-{_WORD}-[0-9][0-9]", "%d-%B-%y", None, "31-Dec-24"),
    (rf"{_WORD} {_NUMBERS}, {_YEAR}", "%B %d, %Y", None, "Dec 31, 2024"),
    (rf"{_WORD} {_NUMBERS} {_YEAR}", "%B %d %Y", None, "Dec 31 2024"),
)
_TIMES = (
    (r"[0-9]{1,2}:[0-9][0-9]", "%H:%M", "23:59"),
    (r"[0-9]{1,2}:[0-9][0-9]:[0-9][0-9](?:\.[0-9]+)?", "%H:%M:%S%.f", "23:59:59"),
    (r"[0-9]{1,2}:[0-9][0-9] ?[AaPp][Mm]", "%I:%M %p", "11:59 PM"),
    (r"[0-9]{1,2}:[0-9][0-9]:[0-9][0-9] ?[AaPp][Mm]", "%I:%M:%S %p", "11:59:59 PM"),
)
_ZONE = r" ?(?:Z|[+-][0-9][0-9]:?[0-9][0-9])"


class TimeFormat(NamedTuple):
    """A form of dates or times.

    Attributes:
      pattern: regular expression of a whole cell.
      format: as Polars (chrono) writes it.
      type: of the values.
      day_first: whether the day comes before the month; None: no doubt.
      called: an example.
    """

    pattern: str
    format: str
    type: pl.DataType
    day_first: bool | None
    called: str

    def parsed(self, text: pl.Series) -> pl.Series:
        """Return the values of cells; null where they are not of this form."""
        fits = text.set(~text.str.contains(f"^{self.pattern}$"), None)
        if self.type == pl.Date():
            return fits.str.to_date(self.format, strict=False)
        if self.type == pl.Time():
            return fits.str.to_time(self.format, strict=False)
        return fits.str.to_datetime(
            self.format,
            strict=False,
            time_unit="us",
        )


class Found(NamedTuple):
    """A form, and what it reads of a column's distinct cells.

    Attributes:
      format: the form.
      rows: that it reads.
      values: of the distinct cells, null where it does not read one.
    """

    format: TimeFormat
    rows: int
    values: pl.Series

    def is_rival(self, other: Found) -> bool:
        """Whether both read as many cells, and some of them differently."""
        if self.rows < other.rows or self.format.pattern != other.format.pattern:
            return False
        return bool((self.values != other.values).any())


def _formats() -> Iterator[TimeFormat]:
    for pattern, form, day_first, called in _DATES:
        yield TimeFormat(pattern, form, pl.Date(), day_first, called)
    for pattern, form, called in _TIMES:
        yield TimeFormat(pattern, form, pl.Time(), None, called)
    for date, time, between in itertools.product(_DATES, _TIMES, ("T", " ", ", ")):
        pattern = f"{date[0]}{between}{time[0]}"
        form = f"{date[1]}{between}{time[1]}"
        called = f"{date[3]}{between}{time[2]}"
        naive = pl.Datetime("us")
        yield TimeFormat(pattern, form, naive, date[2], called)
        zoned = pl.Datetime("us", "UTC")
        yield TimeFormat(
            pattern + _ZONE,
            f"{form}%#z",
            zoned,
            date[2],
            f"{called}+00:00",
        )
        yield TimeFormat(
            f"{pattern} {_ZONE}",
            f"{form} %#z",
            zoned,
            date[2],
            f"{called} +00:00",
        )


FORMATS = tuple(_formats())


def forms_of(
    counts: Counter[str],
    day_first: bool | None,
) -> list[Found]:
    """Return the forms that read some cells, the one that reads most first.

    Args:
      counts: distinct cells, and how often each is there.
      day_first: whether days come before months, if somebody has set it.
    """
    words = pl.Series(list(counts), dtype=pl.String)
    first = words.head(CELLS_LOOKED_AT)
    rows = pl.Series(list(counts.values()), dtype=pl.Int64)
    found = []
    for each in FORMATS:
        is_other = None not in (day_first, each.day_first)
        if is_other and each.day_first != day_first:
            continue
        if not first.str.contains(f"^{each.pattern}$").any():
            continue
        values = each.parsed(words)
        read = int(rows.filter(values.is_not_null()).sum())
        if read:
            found.append(Found(each, read, values))
    return sorted(found, key=_rows, reverse=True)


def _rows(found: Found) -> int:
    return found.rows

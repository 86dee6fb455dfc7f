"""How the cells of a column spell numbers: decimal commas, thousands, percent,
currencies; and what only looks like it.

A column is looked at as a whole, since a cell alone may be read in two ways: "1,234" is
a thousand or little more than one, until "0,5" or "1,234.5" stands somewhere below it.
For the column

    "1,234.5"   "567"   "?"

each pair of a decimal mark and a mark of thousands is tried. ("." , ",") reads both
numbers, (",", ".") neither of the first, so the column is numeric with that notation.
Where two pairs read as many cells and disagree, the column is ambiguous, and somebody
has to say which one is meant.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

# of a column's cells that must parse for the others to count as faults
NUMERIC_SHARE = 0.9
# Of its distinct cells that must look like numbers or dates for the column not to pass
# silently as categories. Distinct ones, because the harm is done by each number
# becoming a category; a word that fills half of the rows changes nothing.
SUSPECT_SHARE = 0.5
# A column of so few distinct cells, each there so often, is one of categories, "3+"
# next to "1" and "2", say.
FEW_DISTINCT = 20
OFTEN = 5
# Different words that a column of numbers may have for a missing value; with more of
# them, and so large a share of the distinct cells, the column is one of codes: the
# tickets of the Titanic are "113803", "PC 17609", "LINE" ...
MOST_WORDS = 4
CODE_SHARE = 0.2
GREATEST = 3.4e38  # float32 ends here
MINUS = "\u2212"  # the minus of typesetters

CURRENCY_SIGNS = "$€£¥₹₽₩₺₪₫₱฿¢₴₦"
CURRENCY_CODES = (
    "USD",
    "EUR",
    "GBP",
    "JPY",
    "CNY",
    "INR",
    "CHF",
    "AUD",
    "CAD",
    "NZD",
    "SEK",
    "NOK",
    "DKK",
    "PLN",
    "CZK",
    "HUF",
    "RUB",
    "BRL",
    "MXN",
    "KRW",
    "ZAR",
    "TRY",
    "SGD",
    "HKD",
    "Rs",
    "Rs.",
    "kr",
    "kr.",
    "zł",
    "Fr.",
)
_CURRENCY = re.compile(
    rf"(?:[A-Z]{{0,3}}[{CURRENCY_SIGNS}]|{'|'.join(map(re.escape, CURRENCY_CODES))})",
    re.IGNORECASE,
)

QUOTES = "'\u2019"  # marks of thousands in Switzerland
_SPACES = " \u00a0\u202f\u2009"
_CELL = re.compile(
    rf"(?P<sign>[-+]?)(?P<before>(?:[^\d\s.,+-]|{'|'.join(map(re.escape, CURRENCY_CODES))}){{0,4}})\s*(?P<inner>[-+]?)"
    rf"(?P<number>(?:\d(?:[\d.,{QUOTES}{_SPACES}]*[\d.,])?|[.,]\d+)(?:[eE][-+]?\d+)?)"
    r"\s*(?P<after>\D{0,12})"
)
# decimal mark and mark of thousands, in the order in which they are preferred where
# they read the same
_MARKS = (
    (".", ""),
    (".", ","),
    (".", " "),
    (".", "'"),
    (",", ""),
    (",", "."),
    (",", " "),
    (",", "'"),
)

_MONTH = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_TIME = (
    r"\d{1,2}:\d\d(?::\d\d(?:[.,]\d+)?)?(?: ?[ap]\.?m\.?)?(?:"
    r" ?(?:z|utc|gmt|[-+]\d\d:?\d\d))?"
)
_DAY = (
    r"(?P<y1>\d{4})[-/.](?P<a1>\d{1,2})[-/.](?P<b1>\d{1,2})",
    r"(?P<a2>\d{1,2})[-/.](?P<b2>\d{1,2})[-/.]\d{4}",
    r"(?P<a3>\d{1,2})[-/](?P<b3>\d{1,2})[-/]\d{2}",
    r"\d{4}-(?P<b4>0[1-9]|1[0-2])",
    rf"(?:[a-z]{{3,9}},? )?\d{{1,2}}(?:\.|st|nd|rd|th)?[ -]{_MONTH}\.?,?[ -]\d{{2,4}}",
    rf"(?:[a-z]{{3,9}},? )?{_MONTH}\.? \d{{1,2}}(?:st|nd|rd|th)?,? \d{{2,4}}",
    rf"{_MONTH}\.?[ -]\d{{2,4}}",
)
_DATE = re.compile(rf"(?:{'|'.join(_DAY)})(?:(?:t|,? ){_TIME})?|{_TIME}", re.IGNORECASE)


class Notation(NamedTuple):
    """The spelling of a column's numbers.

    Attributes:
      decimal: "." or ",".
      thousands: ",", ".", " ", "'" or "" between groups of three digits; a space stands
        for narrow ones, too.
      unit: what stands around each number, with "#" for the number: "#%", "$#", "# EUR"
        without the space; "" for nothing.
    """

    decimal: str = "."
    thousands: str = ""
    unit: str = ""


class Look(NamedTuple):
    """The look of a column's cells.

    Attributes:
      kind: "numbers"; "categories"; "codes", categories most of which are numbers by
        chance; or a fault: "ambiguous", "mixed" (numbers and other cells), "notations"
        (numbers that are spelled differently), "dates", "units", "marks" (numbers, but
        not with the marks that were given).
      notation: of numbers.
      cells: with codes or a fault, the distinct cells that show it, the most frequent
        first.
    """

    kind: Literal[
        "numbers",
        "categories",
        "ambiguous",
        "mixed",
        "notations",
        "dates",
        "units",
        "marks",
        "codes",
    ]
    notation: Notation = Notation()
    cells: tuple[str, ...] = ()


def plain_number(cell: str) -> float | None:
    """The finite float32 that a cell stands for; None if it doesn't."""
    try:
        value = float(cell.replace(MINUS, "-"))
    except ValueError:
        return None
    # float() takes "1_000" too, which no CSV means as a thousand
    return (
        value
        if math.isfinite(value) and abs(value) <= GREATEST and "_" not in cell
        else None
    )


def number(cell: str, notation: Notation | tuple[str, str, str]) -> float | None:
    """The number that a cell spells by a notation; None if it spells none."""
    decimal, thousands, unit = notation
    if not unit and decimal == "." and not thousands:
        return plain_number(cell)
    parts = _parts(cell)
    if parts is None or parts.unit != unit:
        return None
    return parts.value(decimal, thousands)


def is_date(cell: str) -> bool:
    """Whether a cell is a date or a time of day, in a form that is common."""
    match = _DATE.fullmatch(cell)
    if match is None:
        return False
    pairs = [(match[f"a{i}"], match[f"b{i}"]) for i in (1, 2, 3)]
    for first, second in pairs:
        if first is None:
            continue
        low, high = sorted((int(first), int(second)))
        return 1 <= low <= 12 and high <= 31
    return True


def look(
    counts: Counter[str],
    decimal: str | None = None,
    thousands: str | None = None,
) -> Look:
    """Tell the kind of a column's cells.

    Args:
      counts: the cells that are not missing, and how often each is there.
      decimal, thousands: the marks of the file, where somebody has said so.
    """
    allowed = [
        marks
        for marks in _MARKS
        if decimal in (None, marks[0]) and thousands in (None, marks[1])
    ]
    plain = (
        {cell for cell in counts if plain_number(cell) is not None}
        if (".", "") in allowed
        else set()
    )
    if len(plain) == len(counts):
        return Look("numbers" if counts else "categories")

    digits = [cell for cell in counts if any(map(str.isdigit, cell))]
    if (
        len(digits) <= SUSPECT_SHARE * len(counts)
        and _rows(plain, counts) < NUMERIC_SHARE * counts.total()
    ):
        return Look("categories")

    parts = {cell: found for cell in digits if (found := _parts(cell)) is not None}
    readings = _readings(parts, plain, allowed)
    most = max(
        (_rows(values, counts) for values in readings.values()),
        default=0,
    )
    best = [
        notation
        for notation, values in readings.items()
        if _rows(values, counts) == most
    ]
    if most >= NUMERIC_SHARE * counts.total():
        # what float() reads as well as any other notation stays as float() reads it
        if best[0] == Notation() or all(
            readings[each] == readings[best[0]] for each in best
        ):
            return Look("numbers", best[0])
        differing = [
            c
            for c in readings[best[0]]
            if any(readings[each].get(c) != readings[best[0]][c] for each in best)
        ]
        return Look(
            "ambiguous",
            best[0],
            _frequent(differing, counts),
        )
    suspect = _suspect(counts, parts, readings, best)
    if (
        suspect.kind == "categories"
        and len(allowed) < len(_MARKS)
        and look(counts).kind in ("numbers", "ambiguous")
    ):
        return Look("marks", cells=_frequent(counts, counts))
    return suspect


def _suspect(
    counts: Counter[str],
    parts: Mapping[str, _Parts],
    readings: Mapping[Notation, Mapping[str, float]],
    best: list[Notation],
) -> Look:
    """A column that is not numeric, but may be meant so."""
    enough = SUSPECT_SHARE * len(counts)
    dates = {cell for cell in counts if is_date(cell)}
    if len(dates) > enough:
        return Look("dates", cells=_frequent(dates, counts))
    if len(counts) <= FEW_DISTINCT and counts.total() >= OFTEN * len(counts):
        return Look("categories")

    numbers = set(readings[best[0]]) if best else set()
    others = counts.keys() - numbers
    if (
        len(numbers) > enough
        and len(others) > MOST_WORDS
        and len(others) >= CODE_SHARE * len(counts)
    ):
        spelled_otherwise = {
            cell for values in readings.values() for cell in values
        } & others
        if len(spelled_otherwise) <= SUSPECT_SHARE * len(others):
            return Look("codes", cells=_frequent(others, counts))
    if len(numbers) > enough and not others & {
        cell for values in readings.values() for cell in values
    }:
        return Look(
            "mixed",
            best[0],
            _frequent(others, counts),
        )
    spelled = set().union(*readings.values())
    if len(spelled) > enough:
        return Look(
            "notations",
            best[0],
            _frequent(spelled - numbers, counts),
        )
    units = Counter(found.unit for found in parts.values())
    unit, with_unit = units.most_common(1)[0] if units else ("", 0)
    if unit and with_unit > enough:
        return Look(
            "units",
            Notation(unit=unit),
            _frequent((c for c, found in parts.items() if found.unit == unit), counts),
        )
    return Look("categories")


class _Parts(NamedTuple):
    """A cell taken apart: what stands around one number, and the number as it is
    written.
    """

    unit: str
    readable: bool
    negative: bool
    digits: str

    def value(
        self,
        decimal: str,
        thousands: str,
    ) -> float | None:
        """The number, if it is written with these marks."""
        digits = self.digits
        mantissa, exponent = re.fullmatch(r"([^eE]*)([eE].*)?", digits).groups()  # type: ignore[union-attr]
        whole, point, fraction = mantissa.partition(decimal)
        if thousands and not re.fullmatch(r"\d+", whole):
            mark = {" ": _SPACES, "'": QUOTES}.get(thousands, thousands)
            groups = re.split(f"[{mark}]", whole)
            if (
                len(groups) < 2
                or not _grouped([len(group) for group in groups])
                or whole[0] not in "123456789"
            ):
                return None
            whole = "".join(groups)
        if not re.fullmatch(r"\d*", whole) or not re.fullmatch(r"\d*", fraction):
            return None
        return plain_number(
            f"{'-' * self.negative}{whole}{point and '.'}{fraction}{exponent or ''}"
        )


def _grouped(sizes: list[int]) -> bool:
    """Whether these are the sizes of the groups of digits of one number; in India all
    but the last have two.
    """
    first, *middle, last = sizes
    return (
        last == 3
        and 1 <= first <= 3
        and (set(middle) <= {3} or (set(middle) == {2} and first <= 2))
    )


def _parts(cell: str) -> _Parts | None:
    text = cell.replace(MINUS, "-")
    negative = text.startswith("(") and text.endswith(")")  # as accountants write it
    match = _CELL.fullmatch(text[1:-1].strip() if negative else text)
    if match is None:
        return None
    before = match["before"]
    after = match["after"].strip()
    if match["sign"] and match["inner"]:
        return None
    if any(map(str.isalpha, before)) and not _CURRENCY.fullmatch(before):
        return None  # a code such as A12
    if negative and not _CURRENCY.fullmatch(before or after):
        return None  # a footnote, perhaps
    money = not (before and after) and _CURRENCY.fullmatch(before or after) is not None
    readable = money or (not before and after in ("", "%"))
    unit = f"{before}#{after}" if before or after else ""
    return _Parts(
        unit,
        readable,
        negative or "-" in (match["sign"], match["inner"]),
        match["number"],
    )


def _readings(
    parts: Mapping[str, _Parts],
    plain: set[str],
    allowed: Iterable[tuple[str, str]],
) -> dict[Notation, dict[str, float]]:
    """For each notation the cells that it reads, and as what."""
    readings: dict[Notation, dict[str, float]] = {}
    if plain:
        readings[Notation()] = {
            cell: value for cell in plain if (value := plain_number(cell)) is not None
        }
    units = Counter(found.unit for found in parts.values() if found.readable)
    for unit, _ in units.most_common(3):
        for decimal, thousands in allowed:
            if (decimal, thousands, unit) == Notation():
                continue
            values = {
                cell: found.value(decimal, thousands)
                for cell, found in parts.items()
                if found.unit == unit
            }
            readings[Notation(decimal, thousands, unit)] = {
                c: value for c, value in values.items() if value is not None
            }
    return readings


def decimal_of(cells: Iterable[str], notation: Notation) -> str | None:
    """The decimal mark that the cells of a numeric column prove; None where they may be
    read with either.

    "1.5" proves a point; "1.234" proves nothing, as thousands are written so, too.
    """
    other = "," if notation.decimal == "." else "."
    for cell in cells:
        if notation.decimal not in cell:
            continue
        parts = _parts(cell)
        if parts is None or notation.decimal not in parts.digits:
            continue
        if parts.value(other, notation.decimal) is None:
            return notation.decimal
    return None


def _rows(cells: Iterable[str], counts: Counter[str]) -> int:
    return sum(counts[cell] for cell in cells)


def _frequent(cells: Iterable[str], counts: Counter[str]) -> tuple[str, ...]:
    return tuple(
        sorted(
            cells,
            key=lambda cell: (-counts[cell], cell),
        )
    )

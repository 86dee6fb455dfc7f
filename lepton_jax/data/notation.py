"""The notation of a column's numbers: decimal commas, thousands, percent, currencies.

A column is looked at as a whole, since a cell alone may be read in two ways: "1,234" is
a thousand or little more than one, until "0,5" or "1,234.5" stands somewhere below it.
For the column

    "1,234.5"   "567"   "?"

each pair of a decimal mark and a mark of thousands is tried. ("." , ",") reads both
numbers, (",", ".") neither of the first, so the column is numeric with that notation.
Where two pairs read as many cells and disagree, the column is ambiguous, and somebody
has to say which one is meant. Columns that only look like numbers, such as dates and
codes, are told apart, too.

>>> look(Counter(["1,234.5", "567"])).notation
Notation(decimal='.', thousands=',', unit='')
>>> look(Counter(["1,234", "5,678"])).kind
'ambiguous'
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Literal, NamedTuple

# The shares and counts below are assumptions.

# Share of a column's cells that must parse for the others to count as faults.
NUMERIC_SHARE = 0.9

# Share of a column's distinct cells that must look like numbers or dates for it not to
# pass silently as categories. Distinct ones, because the harm is done by each number
# becoming a category; a word that fills half of the rows changes nothing.
SUSPECT_SHARE = 0.5

# A column of at most this many distinct cells, each of them this often, is one of
# categories: "3+" next to "1" and "2", say.
FEW_DISTINCT = 20
OFTEN = 5

# Different words that a column of numbers may have for a missing value. With more of
# them, and at least this share of the distinct cells, the column is one of codes: the
# tickets of the Titanic are "113803", "PC 17609", "LINE" ...
MOST_WORDS = 4
CODE_SHARE = 0.2

UNITS_TRIED = 3  # the most frequent ones

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
_CODES = "|".join(map(re.escape, CURRENCY_CODES))
_CURRENCY = re.compile(rf"(?:[A-Z]{{0,3}}[{CURRENCY_SIGNS}]|{_CODES})", re.IGNORECASE)

QUOTES = "'\u2019"  # marks of thousands in Switzerland
_SPACES = " \u00a0\u202f\u2009"
_CELL = re.compile(
    rf"(?P<sign>[-+]?)(?P<before>(?:[^\d\s.,+-]|{_CODES}){{0,4}})\s*"
    r"(?P<inner>[-+]?)"
    rf"(?P<number>(?:\d(?:[\d.,{QUOTES}{_SPACES}]*[\d.,])?|[.,]\d+)(?:[eE][-+]?\d+)?)"
    r"\s*(?P<after>\D{0,12})"
)

# The decimal mark and the mark of thousands, in the order in which they are preferred
# if they read the same.
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
      unit: the text around each number, with "#" for the number: "#%", "$#", "#EUR";
        "" for none.
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
    """Return the finite float32 that a cell stands for; None if it stands for none."""
    # float() takes "1_000" too, which no CSV means as a thousand
    if "_" in cell:
        return None
    try:
        value = float(cell.replace(MINUS, "-"))
    except ValueError:
        return None
    return value if math.isfinite(value) and abs(value) <= GREATEST else None


def number(cell: str, notation: Notation | tuple[str, str, str]) -> float | None:
    """Return the number that a cell spells by a notation; None if it spells none."""
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

    # a day and a month in either order, if both are written as numbers
    for i in (1, 2, 3):
        first = match[f"a{i}"]
        if first is not None:
            low, high = sorted((int(first), int(match[f"b{i}"])))
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
      decimal: the decimal mark of the file, if somebody has set it.
      thousands: the mark of thousands, if somebody has set it.
    """
    allowed = [
        marks
        for marks in _MARKS
        if decimal in (None, marks[0]) and thousands in (None, marks[1])
    ]
    plain = set()
    if (".", "") in allowed:
        plain = {cell for cell in counts if plain_number(cell) is not None}
    if len(plain) == len(counts):
        return Look("numbers" if counts else "categories")

    enough_rows = NUMERIC_SHARE * counts.total()
    with_digits = [cell for cell in counts if any(map(str.isdigit, cell))]
    few_digits = len(with_digits) <= SUSPECT_SHARE * len(counts)
    if few_digits and _rows(plain, counts) < enough_rows:
        return Look("categories")

    all_parts = {cell: _parts(cell) for cell in with_digits}
    parts = {cell: part for cell, part in all_parts.items() if part is not None}
    readings = _readings(parts, plain, allowed)
    rows = {notation: _rows(cells, counts) for notation, cells in readings.items()}
    most = max(rows.values(), default=0)
    best = [notation for notation in readings if rows[notation] == most]
    if most >= enough_rows:
        return _numeric(counts, readings, best)

    suspect = _suspect(counts, parts, readings, best)
    marks_are_set = len(allowed) < len(_MARKS)
    if suspect.kind != "categories" or not marks_are_set:
        return suspect
    if look(counts).kind in ("numbers", "ambiguous"):
        return Look("marks", cells=_frequent(counts, counts))
    return suspect


# The cells that each notation reads, and as what.
Readings = Mapping["Notation", Mapping[str, float]]


def _numeric(
    counts: Counter[str],
    readings: Readings,
    best: list[Notation],
) -> Look:
    """Return the look of a column that the `best` notations read equally well."""
    preferred = best[0]
    numbers = readings[preferred]
    # if float() reads it as well as any other notation, it stays as float() reads it
    if preferred == Notation() or all(readings[other] == numbers for other in best):
        return Look("numbers", preferred)

    differing = [
        cell
        for cell, value in numbers.items()
        if any(readings[other].get(cell) != value for other in best)
    ]
    return Look("ambiguous", preferred, _frequent(differing, counts))


def _suspect(
    counts: Counter[str],
    parts: Mapping[str, _Parts],
    readings: Readings,
    best: list[Notation],
) -> Look:
    """Return the look of a column that is not numeric, but may be meant so."""
    enough = SUSPECT_SHARE * len(counts)
    dates = {cell for cell in counts if is_date(cell)}
    if len(dates) > enough:
        return Look("dates", cells=_frequent(dates, counts))
    if len(counts) <= FEW_DISTINCT and counts.total() >= OFTEN * len(counts):
        return Look("categories")

    numbers = set(readings[best[0]]) if best else set()
    others = counts.keys() - numbers
    spelled = set().union(*readings.values())
    if len(numbers) > enough:
        if _are_codes(others, spelled, len(counts)):
            return Look("codes", cells=_frequent(others, counts))
        if not others & spelled:
            return Look("mixed", best[0], _frequent(others, counts))
    if len(spelled) > enough:
        return Look(
            "notations",
            best[0],
            _frequent(spelled - numbers, counts),
        )

    units = Counter(part.unit for part in parts.values())
    unit, with_unit = units.most_common(1)[0] if units else ("", 0)
    if unit and with_unit > enough:
        cells = [cell for cell, part in parts.items() if part.unit == unit]
        return Look(
            "units",
            Notation(unit=unit),
            _frequent(cells, counts),
        )
    return Look("categories")


def _are_codes(
    others: Set[str],
    spelled: Set[str],
    distinct: int,
) -> bool:
    """Whether a column's cells are codes, most of which are numbers by chance.

    Args:
      others: the distinct cells that are no numbers in the column's notation.
      spelled: the cells that are numbers in any notation.
      distinct: cells of the column.
    """
    many = len(others) > MOST_WORDS and len(others) >= CODE_SHARE * distinct
    return many and len(others & spelled) <= SUSPECT_SHARE * len(others)


class _Parts(NamedTuple):
    """A cell taken apart.

    Attributes:
      unit: the text around its number, as in `Notation`.
      readable: whether that is nothing, a percent sign or a currency.
      negative: whether the number is below zero.
      digits: the number as it is written, without its sign.
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
        """Return the number, if it is written with these marks."""
        split = len(re.split("[eE]", self.digits)[0])
        mantissa = self.digits[:split]
        exponent = self.digits[split:]
        whole, point, fraction = mantissa.partition(decimal)
        if thousands and not re.fullmatch(r"\d+", whole):
            groups = _groups(whole, thousands)
            if not groups:
                return None
            whole = "".join(groups)
        if not re.fullmatch(r"\d*", whole) or not re.fullmatch(r"\d*", fraction):
            return None

        sign = "-" if self.negative else ""
        return plain_number(f"{sign}{whole}{point and '.'}{fraction}{exponent}")


def _groups(whole: str, mark: str) -> list[str]:
    """Return a whole number's groups of digits; none if it is written otherwise."""
    marks = {" ": _SPACES, "'": QUOTES}.get(mark, mark)
    groups = re.split(f"[{marks}]", whole)
    sizes = [len(group) for group in groups]
    if len(groups) < 2 or not _grouped(sizes) or whole[0] not in "123456789":
        return []
    return groups


def _grouped(sizes: list[int]) -> bool:
    """Whether these are the sizes of the groups of digits of one number.

    They are 3 but for the first; in India, all but the last have 2: "12,34,567".
    """
    first, *middle, last = sizes
    if last != 3 or not 1 <= first <= 3:
        return False
    return set(middle) <= {3} or (set(middle) == {2} and first <= 2)


def _parts(cell: str) -> _Parts | None:
    """Take a cell apart; None if it is no number with a unit."""
    text = cell.replace(MINUS, "-")
    negative = text.startswith("(") and text.endswith(")")  # as accountants write it
    match = _CELL.fullmatch(text[1:-1].strip() if negative else text)
    if match is None:
        return None

    before = match["before"]
    after = match["after"].strip()
    is_currency = _CURRENCY.fullmatch(before or after) is not None
    if match["sign"] and match["inner"]:
        return None
    if any(map(str.isalpha, before)) and not is_currency:
        return None  # a code such as A12
    if negative and not is_currency:
        return None  # a footnote, perhaps

    one_sided = not (before and after)
    readable = (one_sided and is_currency) or (not before and after in ("", "%"))
    unit = f"{before}#{after}" if before or after else ""
    has_minus = "-" in (match["sign"], match["inner"])
    return _Parts(unit, readable, negative or has_minus, match["number"])


def _readings(
    parts: Mapping[str, _Parts],
    plain: set[str],
    allowed: Iterable[tuple[str, str]],
) -> dict[Notation, dict[str, float]]:
    """Return the cells that each notation reads, and as what."""
    readings: dict[Notation, dict[str, float]] = {}
    if plain:
        readings[Notation()] = _present({cell: plain_number(cell) for cell in plain})

    units = Counter(part.unit for part in parts.values() if part.readable)
    for unit, _ in units.most_common(UNITS_TRIED):
        with_unit = {cell: part for cell, part in parts.items() if part.unit == unit}
        for decimal, thousands in allowed:
            notation = Notation(decimal, thousands, unit)
            if notation != Notation():
                readings[notation] = _present(
                    {
                        cell: part.value(decimal, thousands)
                        for cell, part in with_unit.items()
                    }
                )
    return readings


def _present(values: Mapping[str, float | None]) -> dict[str, float]:
    return {cell: value for cell, value in values.items() if value is not None}


def decimal_of(cells: Iterable[str], notation: Notation) -> str | None:
    """Return the decimal mark that the cells of a numeric column prove, if any.

    "1.5" proves a point; "1.234" proves nothing, as thousands are written so, too.

    >>> decimal_of(["1.234", "1.5"], Notation())
    '.'
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

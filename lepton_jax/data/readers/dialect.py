"""The dialect of a delimited text file, found by its first rows."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lepton_jax.data.csv_file import DELIMITERS
from lepton_jax.data.notation import is_date
from lepton_jax.data.readers.inference import TypeSettings
from lepton_jax.data.readers.records import MARK, Grammar, cells_of, records_of
from lepton_jax.errors import DataError

# Assumption: enough to tell one dialect from another, and quick to read.
ROWS_LOOKED_AT = 200

# Least share of rows as wide as most for a delimiter to be taken for granted.
ALIKE_SHARE = 0.8  # assumption

# Least share of rows as wide as most for a text to be a table, if its name does not
# tell; assumption.
SURE_SHARE = 0.95

LONGEST_ROW = 2**26  # bytes; assumption: no row that is meant as one is longer

_NUMBER = re.compile(r"[-+(]?\W{0,3}\d[\d.,' ]*(?:[eE][-+]?\d+)?\s?\W{0,3}")

_YEAR = re.compile(r"(?:19|20)[0-9]{2}")


@dataclass(frozen=True)
class CsvSettings(TypeSettings):
    """The arguments by which a person overrides what is found out of a CSV file.

    Attributes:
      delimiter: one ASCII character, or "tab".
      quote: one ASCII character; "" for none.
      escape: the character before a quote inside of quotes; "": quotes are doubled.
      header: whether the first row has the columns' names.
      names: the columns' names, in place of the header's.
      encoding: Python's name of the codec.
      skip: lines before the header.
      strip: whether spaces around cells of text are taken away; around other cells they
        always are.
      bad_rows: "error": a row that can't be read is one; "refuse": it is left out, and
        counted with its text.
      longest_row: bytes that a row may have.
    """

    delimiter: str | None = None
    quote: str | None = None
    escape: str | None = None
    header: bool | None = None
    names: Sequence[str] | None = None
    encoding: str | None = None
    skip: int = 0
    strip: bool | None = None
    bad_rows: str = "error"
    longest_row: int = LONGEST_ROW

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bad_rows not in ("error", "refuse"):
            raise DataError(
                f"bad_rows is {self.bad_rows!r}",
                where="bad_rows",
                remedy="use 'error' or 'refuse'",
            )
        for name in ("delimiter", "quote", "escape"):
            _check_character(name, getattr(self, name))


@dataclass(frozen=True)
class Dialect:
    """The dialect of a file.

    Attributes:
      grammar: its characters.
      names: of the columns that hold data.
      width: cells of a row: one more than names if each row ends with a delimiter.
      start: bytes of UTF-8 before the first row of data.
      strip: whether spaces around cells of text are taken away.
      reasons: what was found, and why, in words.
      renamed: why a column has not the name that stands in the header.
    """

    grammar: Grammar
    names: tuple[str, ...]
    width: int
    start: int
    strip: bool
    reasons: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)


def dialect_of(
    sample: bytes,
    settings: CsvSettings,
    where: object,
) -> Dialect:
    """Find the dialect of a file.

    Args:
      sample: the beginning of the file in UTF-8.
      settings: what somebody has set.
      where: the file, for messages.

    Raises:
      DataError: the file has no rows, or its names can't be those of columns.
    """
    start, said = _first_line(sample, settings.skip)
    text = sample[start:]
    if not text.strip():
        raise DataError(
            "the file is empty",
            where=where,
            remedy="give a file with a header or with rows",
        )
    grammar = _grammar(text, settings, said)
    rows = _first_rows(text, grammar)
    first = next(records_of(text, grammar))
    if first.fault and settings.header is not False:
        raise DataError(
            f"the first row is not CSV: {first.fault}",
            where=f"{where}, the first row",
            remedy=(
                "correct it; set `quote` to '' if quotes mean nothing, or header=False"
                " if it is no header"
            ),
        )
    if rows and any("\0" in cell for cell in rows[0]):
        raise DataError(
            "the first row has zero bytes: the file is no text",
            where=where,
            remedy="give a text file, or set `encoding`",
        )
    if not rows:
        raise DataError(
            "no row could be read",
            where=where,
            remedy="set `delimiter`, `quote`, `encoding` or `skip`",
        )
    return _with_names(
        sample,
        start,
        grammar,
        rows,
        settings,
        where,
    )


def looks_delimited(text: bytes, settings: CsvSettings) -> bool:
    """Whether the first rows of a text all have the same number of cells."""
    start, said = _first_line(text, settings.skip)
    grammar = _grammar(text[start:], settings, said)
    rows = _first_rows(text[start:], grammar)
    if len(rows) < 2:
        return False
    width = _usual_width(rows)
    alike = sum(len(row) == width for row in rows)
    return width > 1 and alike >= SURE_SHARE * len(rows)


# ---- the beginning ----


def _check_character(
    name: str,
    value: str | None,
) -> None:
    if value in (None, "", "tab", "\\t"):
        return
    assert value is not None
    if len(value) != 1 or not value.isascii() or value in "\r\n\0":
        raise DataError(
            f"{name} is {value!r}, not one ASCII character",
            where=name,
            remedy="give one character (for a delimiter also 'tab'), or leave it out",
        )


def _first_line(
    sample: bytes,
    skip: int,
) -> tuple[int, bytes | None]:
    """Return where the first row begins, and the delimiter that a line above says.

    Excel writes a line such as "sep=;" above the header.
    """
    position = 0
    for _ in range(skip):
        newline = re.compile(rb"\r\n|\n|\r").search(
            sample,
            position,
        )
        position = newline.end() if newline else len(sample)
    line = re.compile(rb"sep=([^\r\n])(?:\r\n|\n|\r)").match(
        sample,
        position,
    )
    if line is not None:
        return line.end(), line[1]
    return position, None


def _grammar(
    text: bytes,
    settings: CsvSettings,
    said: bytes | None,
) -> Grammar:
    candidates = [name.encode() for name in DELIMITERS]
    if settings.delimiter is not None:
        given = {"tab": "\t", "\\t": "\t"}.get(
            settings.delimiter,
            settings.delimiter,
        )
        candidates = [given.encode()]
    elif said is not None:
        candidates = [said]

    grammars = []
    for delimiter in candidates:
        quote = _quote(text, delimiter, settings)
        plain = Grammar(delimiter, quote)
        escape = _escape(text, plain, settings)
        grammars.append(replace(plain, escape=escape))
    fits = [_fit(text, grammar) for grammar in grammars]
    return grammars[fits.index(max(fits))]


def _quote(
    text: bytes,
    delimiter: bytes,
    settings: CsvSettings,
) -> bytes:
    if settings.quote is not None:
        return settings.quote.encode()
    if b'"' in text or b"'" not in text:
        return b'"'
    # Single quotes are quotes if each of them stands where one can.
    edge = re.escape(delimiter)
    quoted = re.findall(
        rb"(?:^|(?<=" + edge + rb"))'(?:[^'\r\n]|'')*'(?=" + edge + rb"|[\r\n]|\Z)",
        text,
        re.MULTILINE,
    )
    marks = sum(cell.count(b"'") for cell in quoted)
    return b"'" if quoted and marks == text.count(b"'") else b'"'


def _escape(
    text: bytes,
    plain: Grammar,
    settings: CsvSettings,
) -> bytes:
    """Return the backslash if more of the first rows can be read with it."""
    if settings.escape is not None:
        return settings.escape.encode()
    if not plain.quote or b"\\" + plain.quote not in text:
        return b""
    escaped = replace(plain, escape=b"\\")
    better = _faults(text, escaped) < _faults(text, plain)
    return b"\\" if better else b""


def _faults(text: bytes, grammar: Grammar) -> int:
    """Return how many of the first records are broken."""
    first = itertools.islice(records_of(text, grammar), ROWS_LOOKED_AT)
    return sum(record.fault != "" for record in first)


def _first_rows(
    text: bytes,
    grammar: Grammar,
) -> list[list[str]]:
    rows: list[list[str]] = []
    for record in records_of(text, grammar):
        if len(rows) > ROWS_LOOKED_AT:
            break
        if record.fault:
            continue
        content = text[record.start : record.stop].removeprefix(MARK)
        cells = cells_of(content, grammar)
        rows.append(
            [
                cell.decode(
                    "utf-8",
                    "replace",
                )
                for cell in cells
            ]
        )
    # The sample may end within its last row.
    return rows[:-1] if len(rows) > 2 and not text.endswith(b"\n") else rows


def _fit(
    text: bytes,
    grammar: Grammar,
) -> tuple[bool, float, float, int]:
    """Return how well a grammar fits: rows as wide as most, with numbers as cells."""
    rows = _first_rows(text, grammar)
    widths = Counter(len(row) for row in rows)
    if not widths:
        return False, 0.0, 0.0, 0
    width = _usual_width(rows)
    if width < 2:
        return False, 0.0, 0.0, 0
    alike = widths[width] / len(rows)
    cells = [cell.strip() for row in rows for cell in row]
    filled = [cell for cell in cells if cell]
    numbers = sum(
        map(
            _is_value,
            filled,
        )
    ) / max(1, len(filled))
    header_fits = len(rows[0]) == width
    share = (1 + header_fits) * alike
    return (
        share >= ALIKE_SHARE,
        round(share, 2),
        round(
            numbers,
            1,
        ),
        width,
    )


def _usual_width(rows: list[list[str]]) -> int:
    """Return the width that most rows have; of equals that of the first row."""
    widths = Counter(len(row) for row in rows)
    most = max(widths.values())
    first = len(rows[0])
    if widths[first] == most:
        return first
    return max(width for width, count in widths.items() if count == most)


def _is_value(cell: str) -> bool:
    """Whether a cell is a number or a date."""
    cell = cell.strip()
    return _NUMBER.fullmatch(cell) is not None or is_date(cell)


# ---- names ----


def _with_names(
    sample: bytes,
    start: int,
    grammar: Grammar,
    rows: list[list[str]],
    settings: CsvSettings,
    where: object,
) -> Dialect:
    missing = frozenset(settings.missing)
    has_header = settings.header
    reasons = [f"cells are separated by {_called(grammar.delimiter)}"]
    if has_header is None:
        has_header = _has_header(rows, missing)
        found = "names the columns" if has_header else "is data"
        reasons.append(f"the first row {found}")

    body = rows[1:] if has_header else rows
    width = len(rows[0]) if has_header else _usual_width(body)
    trailing = _has_trailing(rows, body, has_header)
    if has_header and settings.header is None and not trailing:
        _check_first(rows[0], body, where)
    if trailing:
        width = len(body[0])
        reasons.append("each row ends with a delimiter")

    count = width - trailing
    renamed: dict[str, str] = {}
    header = rows[0][:count] if has_header else [""] * count
    names = _chosen_names(header, renamed, settings, where)
    strip = settings.strip
    if strip is None:
        strip = _is_padded(body)
    after = start
    if has_header:
        after += _length_of_first(sample[start:], grammar)
    return Dialect(
        grammar,
        names,
        width,
        after,
        strip,
        tuple(reasons),
        renamed,
    )


def _chosen_names(
    header: list[str],
    renamed: dict[str, str],
    settings: CsvSettings,
    where: object,
) -> tuple[str, ...]:
    """Return the names that the settings give, else those of the header."""
    if settings.names is None:
        return _names(header, renamed)
    return _given_names(settings.names, len(header), where)


def _length_of_first(text: bytes, grammar: Grammar) -> int:
    """Return the bytes of the first row of a text, with its end."""
    first = next(records_of(text, grammar))
    return first.end


def _check_first(
    first: list[str],
    body: list[list[str]],
    where: object,
) -> None:
    """Check that the first row is as wide as nearly all others, if it has names.

    Raises:
      DataError: it is not.
    """
    if len(body) < 2:
        return
    width = _usual_width(body)
    alike = sum(len(row) == width for row in body)
    if width == len(first) or alike < ALIKE_SHARE * len(body):
        return
    remedy = "set `skip` to the lines above the first row"
    if len(first) == width - 1:
        remedy = (
            "name every column: the header has one cell less than each row, for row"
            " names perhaps; or set `names`, header=False and `skip`"
        )
    raise DataError(
        f"expected {width} cells as in the other rows, found {len(first)}",
        where=f"{where}, the first row: {','.join(first)[:80]!r}",
        remedy=remedy,
    )


def _called(delimiter: bytes) -> str:
    text = delimiter.decode()
    return DELIMITERS.get(text, repr(text))


def _has_header(
    rows: list[list[str]],
    missing: frozenset[str],
) -> bool:
    """Whether the first row has names.

    It has if one of its cells is a word above a column of numbers, if its numbers are
    years one after another, or if no cell is a number at all.
    """
    width = len(rows[0])
    body = [row for row in rows[1:] if len(row) == width]
    values = 0
    for i, cell in enumerate(rows[0]):
        cell = cell.strip()
        below = [row[i].strip() for row in body]
        filled = [each for each in below if each not in missing]
        of_numbers = bool(filled) and all(
            map(
                _is_value,
                filled,
            )
        )
        if of_numbers and cell and cell not in missing and not _is_value(cell):
            return True
        values += _is_value(cell)
    if _has_years(rows[0]):
        return True
    if not values:
        first = [cell.strip() for cell in rows[0]]
        return not body or rows[0] not in body or len(set(first)) == width
    return False


def _has_years(row: list[str]) -> bool:
    """Whether the numbers of a row are years one after another, as in wide tables."""
    cells = [cell.strip() for cell in row]
    numbers = [cell for cell in cells if _is_value(cell)]
    if len(numbers) < 2 or not all(
        map(
            _YEAR.fullmatch,
            numbers,
        )
    ):
        return False
    years = list(map(int, numbers))
    return years == list(
        range(
            years[0],
            years[0] + len(years),
        )
    )


def _has_trailing(
    rows: list[list[str]],
    body: list[list[str]],
    has_header: bool,
) -> bool:
    """Whether each row ends with a delimiter that separates nothing."""
    if not body or len(body[0]) < 2:
        return False
    if any(row[-1].strip() for row in body):
        return False
    width = len(body[0])
    if any(len(row) != width for row in body):
        return False
    if not has_header:
        return False
    header = rows[0]
    if len(header) == width - 1:
        return True
    return len(header) == width and not header[-1].strip()


def _given_names(
    given: Sequence[str],
    count: int,
    where: object,
) -> tuple[str, ...]:
    names = tuple(given)
    different = len(set(names))
    if len(names) != count or different != count:
        raise DataError(
            f"`names` has {len(names)} names, {different} of them different, but"
            f" the rows have {count} cells",
            where=where,
            remedy="give each column a name of its own",
        )
    return names


def _names(
    header: list[str],
    renamed: dict[str, str],
) -> tuple[str, ...]:
    """Return names that differ; those that don't, or are empty, are numbered."""
    wanted = [name.strip().removeprefix("\ufeff") for name in header]
    taken = set(wanted)
    names: list[str] = []
    for position, name in enumerate(wanted, 1):
        chosen = name
        if not name:
            chosen = _free(f"column_{position}", taken)
        elif name in names:
            count = names.count(name) + 1
            chosen = _free(f"{name}_{count}", taken, count)
            renamed[chosen] = f"another column is named {name!r}"
        taken.add(chosen)
        names.append(chosen)
    return tuple(names)


def _free(
    name: str,
    taken: set[str],
    number: int = 1,
) -> str:
    stem = name.rpartition("_")[0]
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def _is_padded(body: list[list[str]]) -> bool:
    """Whether a space stands after or before nearly every delimiter."""
    inner = [cell for row in body for cell in row[1:]]
    spaced = sum(cell.startswith(" ") for cell in inner)
    outer = [cell for row in body for cell in row[:-1]]
    ended = sum(cell.endswith(" ") for cell in outer)
    return bool(inner) and max(
        spaced,
        ended,
    ) > ALIKE_SHARE * len(inner)

"""The cells of a CSV file by column, and errors that point at one of them."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.data.idx import read_bytes
from lepton_jax.errors import DataError, nearest

DELIMITERS = {
    ",": "a comma",
    ";": "a semicolon",
    "\t": "a tab",
    "|": "a bar",
}

# Assumptions: enough to tell one delimiter from another, and quick to read.
ROWS_LOOKED_AT = 50  # by which the delimiter is found
CHARACTERS_LOOKED_AT = 2**20

COLUMNS_LISTED = 20  # in an error, at most; assumption: as many as a terminal shows

# Settings of `table` that a person can usually set.
SETTINGS = (
    "categorical",
    "ignore",
    "missing",
    "delimiter",
    "decimal",
    "thousands",
    "label_kind",
)

# Files that are often given in place of CSV, by their first bytes.
OTHER_FORMATS = (
    (b"PK\x03\x04", "a ZIP archive, as .xlsx workbooks are"),
    (b"PAR1", "a Parquet file"),
    (b"\xd0\xcf\x11\xe0", "an old .xls workbook"),
    (b"SQLite format 3", "an SQLite database"),
)

# In this order, as the mark of UTF-32 begins with that of UTF-16.
ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class RawTable:
    """A table as it is written: stripped cells by column.

    Attributes:
      path: the file.
      label: name of the label's column.
      columns: the cells of each column.
      lines: the line in the file at which each row starts.
      settings: arguments that a person who reads an error can set.
      own: whether the schema is made of this file, not of another.
      parsed: the numbers of each numeric column's distinct cells, once they are known.
    """

    path: str
    label: str
    columns: dict[str, list[str]]
    lines: list[int]
    settings: Collection[str] = SETTINGS
    own: bool = True
    parsed: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def rows(self, indices: np.ndarray) -> RawTable:
        """Return some of the rows."""
        chosen = indices.tolist()
        columns = {
            name: [cells[i] for i in chosen] for name, cells in self.columns.items()
        }
        lines = [self.lines[i] for i in chosen]
        return RawTable(
            self.path,
            self.label,
            columns,
            lines,
            self.settings,
            self.own,
        )

    def error(
        self,
        what: str,
        column: str,
        cells: Collection[str],
        remedy: str,
    ) -> DataError:
        """Return an error at the first row that has one of some cells.

        Args:
          what: the error, after the cell itself.
          column: in which the cell stands.
          cells: any of them.
          remedy: what to do about it.
        """
        row = next(i for i, cell in enumerate(self.columns[column]) if cell in cells)
        return DataError(
            f"{self.columns[column][row]!r} {what}",
            remedy=remedy,
            where=f"{self.path}, line {self.lines[row]}, column {column!r}",
        )

    def advice(self, *ways: str | tuple[str, str]) -> str:
        """Return a remedy of several ways.

        Args:
          *ways: sentences; one that needs a setting is a pair (setting, sentence), and
            is left out if the setting can't be set.
        """
        settable = self.settings if self.own else ()
        possible = []
        for way in ways:
            if isinstance(way, str):
                possible.append(way)
            elif way[0] in settable:
                possible.append(way[1])

        if len(possible) < 2:
            return "".join(possible)
        return f"{', '.join(possible[:-1])}, or {possible[-1]}"

    def hint(self, *ways: tuple[str, str]) -> str:
        """Return ": " and a remedy of several ways; "" if none can be gone.

        Args:
          *ways: pairs (setting, sentence), as in `advice`.
        """
        possible = [sentence for setting, sentence in ways if setting in self.settings]
        return f": {', '.join(possible)}" if possible else ""

    def check(
        self,
        names: Iterable[str],
        purpose: str,
    ) -> None:
        """Check that all of these are columns.

        Raises:
          DataError: one is not; the error says its `purpose`.
        """
        for name in names:
            if name not in self.columns:
                raise DataError(
                    f"there is no column {name!r}"
                    f" {purpose}{nearest(name, self.columns)}",
                    where=self.path,
                    remedy=f"name some of {listed(self.columns)}",
                )


def listed(names: Iterable[str]) -> str:
    """Return the first names, with commas between."""
    first = list(itertools.islice(names, COLUMNS_LISTED + 1))
    more = ", ..." if len(first) > COLUMNS_LISTED else ""
    return ", ".join(first[:COLUMNS_LISTED]) + more


def read_csv(
    path: str | Path,
    label: str,
    delimiter: str | None,
    settings: Collection[str],
) -> RawTable:
    """Read a CSV file with a header, every row as wide as it.

    Args:
      path: the file.
      label: name of the label's column.
      delimiter: what separates the cells; None: found out.
      settings: arguments that a person who reads an error can set.

    Raises:
      DataError: with file and line, if it is no such file.
    """
    text, said = _without_sep_line(_text(path))
    if not text.strip():
        raise DataError(
            "the file is empty",
            where=path,
            remedy="give a CSV file with a header",
        )
    if delimiter is None:
        delimiter = said
    remedies = _delimiter_remedies(delimiter, settings)
    if delimiter is None:
        separator = _likely_separator(text, label)
    else:
        separator = _separator(delimiter)

    rows, lines = _rows(text, separator, path, remedies)
    header_line = f"{path}, line {lines[0]}"
    header = _header(rows[0], label, header_line, remedies)
    rows = rows[1:]
    lines = lines[1:]
    if not rows:
        raise DataError(
            "the file has a header but no rows",
            where=path,
            remedy="give at least one row",
        )
    _check_widths(rows, lines, header, separator, path)

    cells_by_column = zip(*rows, strict=True)
    columns = {
        name: [cell.strip() for cell in cells]
        for name, cells in zip(header, cells_by_column, strict=True)
    }
    return RawTable(str(path), label, columns, lines, settings)


# ---- characters ----


def _text(path: str | Path) -> str:
    """Return a file's characters.

    They are UTF-16 or UTF-32 if the first bytes say so, as in Excel's "Unicode text".
    """
    data = read_bytes(path)
    for mark, name in OTHER_FORMATS:
        if data.startswith(mark):
            raise DataError(
                f"the file is {name}, not text",
                where=path,
                remedy="export the table as a CSV file",
            )

    names = (name for mark, name in ENCODINGS if data.startswith(mark))
    encoding = next(names, "utf-8-sig")
    if encoding == "utf-8-sig" and b"\0" in data:
        line = data[: data.index(b"\0")].count(b"\n") + 1
        raise DataError(
            "the file has zero bytes: it is no text, or UTF-16 without its mark",
            where=f"{path}, line {line}",
            remedy="save the file as UTF-8, e.g. iconv -f utf-16le -t utf-8",
        )
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        name = encoding.upper().removesuffix("-SIG")
        raise DataError(
            f"byte {byte:#04x} is not {name} text",
            where=f"{path}, line {line}",
            remedy=_encoding_remedy(encoding, byte),
        ) from error


def _encoding_remedy(encoding: str, byte: int) -> str:
    if encoding != "utf-8-sig":
        return "save the file as UTF-8: it is cut short or damaged"
    # 0x80 to 0x9f are the euro, quotes and dashes of Windows; nothing in Latin-1
    likely = "cp1252" if 0x80 <= byte < 0xA0 else "latin1"
    return f"save the file as UTF-8, e.g. iconv -f {likely} -t utf-8"


# ---- the delimiter ----


def _without_sep_line(text: str) -> tuple[str, str | None]:
    """Empty a first line such as "sep=;", and return what it says.

    Excel writes it above the header.
    """
    line, _, rest = text.partition("\n")
    if line.startswith("sep=") and len(line.rstrip()) == len("sep=;"):
        return f"\n{rest}", line[len("sep=")]
    return text, None


def _delimiter_remedies(
    delimiter: str | None,
    settings: Collection[str],
) -> list[str]:
    if "delimiter" not in settings:
        return []
    if delimiter is None:
        return ["set `delimiter` if another character separates the cells"]
    return ["correct `delimiter`, or leave it out"]


def _separator(delimiter: str) -> str:
    separator = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if len(separator) != 1 or separator in '"\r\n':
        raise DataError(
            f"delimiter is {delimiter!r}, not one character",
            where="delimiter",
            remedy="give one character, or 'tab', or leave it out",
        )
    return separator


def _likely_separator(text: str, label: str) -> str:
    """Return the delimiter that fits best.

    Its header has the label, and its rows are as wide as the header.
    """
    beginning = text[:CHARACTERS_LOOKED_AT]

    def fit(separator: str) -> tuple[bool, float, int]:
        rows = list(_first_rows(beginning, separator))
        if not rows or len(rows[0]) < 2:
            return False, 0.0, 0
        width = len(rows[0])
        share_alike = sum(len(row) == width for row in rows) / len(rows)
        has_label = label in [cell.strip() for cell in rows[0]]
        return has_label, share_alike, width

    return max(DELIMITERS, key=fit)  # the first of equals


def _first_rows(text: str, separator: str) -> Iterator[list[str]]:
    rows = filter(None, _reader(text, separator))
    # an error is of a wrong separator, or of the text itself, which is read again
    with contextlib.suppress(csv.Error):
        yield from itertools.islice(rows, ROWS_LOOKED_AT + 1)


# ---- rows ----


def _reader(text: str, separator: str) -> Any:
    return csv.reader(
        io.StringIO(text, newline=""),
        skipinitialspace=True,
        strict=True,
        delimiter=separator,
    )


def _rows(
    text: str,
    separator: str,
    path: str | Path,
    remedies: list[str],
) -> tuple[list[list[str]], list[int]]:
    """Return all rows that are not empty, and the line at which each starts."""
    rows = []
    lines = []
    start = 1
    reader = _reader(text, separator)
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        ways = ['close every quote, and write a quote inside a quoted cell as ""']
        if not rows:
            ways += remedies
        raise DataError(
            f"the line is not CSV: {error}",
            where=f"{path}, line {start}",
            remedy="; ".join(ways),
        ) from error
    return rows, lines


def _header(
    cells: list[str],
    label: str,
    where: str,
    remedies: list[str],
) -> list[str]:
    header = [cell.strip() for cell in cells]
    for position, name in enumerate(header):
        if not name:
            raise DataError(
                f"column {position + 1} has no name",
                where=where,
                remedy=(
                    "name it in the header; if it only counts rows, leave it out"
                    " (pandas: index=False)"
                ),
            )
        if name in header[:position]:
            raise DataError(
                f"column {name!r} is there twice",
                where=where,
                remedy="give each column a name of its own",
            )

    if label not in header:
        ways = [f"name one of {listed(header)} as the label"]
        if len(header) == 1:
            ways += remedies
        raise DataError(
            f"there is no label column {label!r}{nearest(label, header)}",
            where=where,
            remedy="; ".join(ways),
        )
    if len(header) == 1:
        raise DataError(
            f"{label!r} is the only column",
            where=where,
            remedy="; ".join(["give columns to predict it from", *remedies]),
        )
    return header


def _check_widths(
    rows: list[list[str]],
    lines: list[int],
    header: list[str],
    separator: str,
    path: str | Path,
) -> None:
    for row, line in zip(rows, lines, strict=True):
        if len(row) == len(header):
            continue
        remedy = (
            "make the row as wide as the header; quote cells that contain"
            f" {DELIMITERS.get(separator, repr(separator))}"
        )
        if all(len(row) == len(header) + 1 for row in rows):
            remedy = (
                "name every column: the header has one cell less than each row, for row"
                " names perhaps"
            )
        raise DataError(
            f"expected {len(header)} cells, found {len(row)}",
            where=f"{path}, line {line}",
            remedy=remedy,
        )

"""CSV tables: numbers with quantile edges, categories with vocabularies, both fitted on
the training rows alone.
"""

from __future__ import annotations

import codecs
import csv
import dataclasses
import io
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lepton_jax.data.arrays import Arrays, partition
from lepton_jax.data.idx import read_bytes
from lepton_jax.data.notation import (
    MOST_WORDS,
    Look,
    Notation,
    decimal_of,
    look,
    number,
    plain_number,
)
from lepton_jax.errors import DataError, nearest

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
    "\\N",
)
# a numeric label with more distinct values than this is a quantity, unless somebody
# says otherwise
MOST_CLASSES = 20
BINS = 48
DELIMITERS = {
    ",": "a comma",
    ";": "a semicolon",
    "\t": "a tab",
    "|": "a bar",
}
LOOKED_AT = 50  # rows by which the delimiter is found
NAMED = 20  # columns that an error lists at most
SETTINGS = (
    "categorical",
    "ignore",
    "missing",
    "delimiter",
    "decimal",
    "thousands",
    "label_kind",
)
LABEL_KINDS = ("auto", "classes", "quantity")


@dataclass(frozen=True)
class Schema:
    """What a training table taught: enough to encode another table in the same way.
    Plain data.

    Attributes:
      label: name of the label's column.
      classes: the label's values, a target is an index into them; None where the label
        is a quantity.
      numbers: names of the numeric columns.
      edges: for each of them ascending quantiles of the training values, at most BINS +
        1; one for a constant column.
      categories: names of the categorical columns.
      vocabularies: for each of them its training values; index i + 1 stands for the
        i-th, 0 for missing or unseen.
      missing: cells that stand for no value.
      notations: how each numeric column spells its numbers: (decimal mark, mark of
        thousands, what stands around them); none for a schema in which all are plain.
      label_notation: the same of a label that is a quantity.
    """

    label: str
    classes: tuple[str, ...] | None
    numbers: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    categories: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    missing: tuple[str, ...] = MISSING
    notations: tuple[tuple[str, str, str], ...] = ()
    label_notation: tuple[str, str, str] = Notation()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of each categorical column, how many indices there are."""
        return tuple(len(values) + 1 for values in self.vocabularies)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """The schema that `to_json` wrote; DataError if it is none."""
        try:
            return cls(
                **{name: _tuples(value) for name, value in json.loads(text).items()}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"this is no schema of a table: {error}",
                where="Schema.from_json",
                remedy="give the text that Schema.to_json returned",
            ) from error


@dataclass(frozen=True, eq=False)
class Table:
    """A table as samples.

    Attributes:
      arrays: inputs {"numbers": float32 (n, a), NaN where missing; "categories": int32
        (n, c)}, without the block that has no columns; targets int32 (n,) indices into
        `schema.classes`, or float32 (n,) quantities.
      schema: how to encode another table in the same way, and the sizes that a model
        needs.
    """

    arrays: Arrays
    schema: Schema


def table(
    path: str | Path,
    label: str,
    *,
    categorical: Sequence[str] = (),
    missing: Sequence[str] = MISSING,
    schema: Schema | None = None,
    ignore: Sequence[str] = (),
    delimiter: str | None = None,
    decimal: str | None = None,
    thousands: str | None = None,
    label_kind: Literal["auto", "classes", "quantity"] = "auto",
    settings: Collection[str] = SETTINGS,
) -> Table:
    """A CSV file with a header, UTF-8 or UTF-16 and gzipped or not, as samples.

    A column is numeric if at least 90 % of its cells that are not missing parse as
    finite numbers, else categorical; "3,5", "1,234.5", "1.234,5", "1 234", "12%", "$3"
    and "3 €" are numbers, too, if the whole column (or, for the decimal mark, another
    column of the file) leaves no doubt. Spaces around cells and empty lines don't
    count.

    Args:
      path: the file.
      label: name of the column to predict.
      categorical: names of columns that are categories though they look like numbers or
        dates.
      missing: cells that stand for no value.
      schema: of the training table, to encode a test table by; its `missing` and kinds
        of columns hold then, and columns that it doesn't know are left out. None: fit
        one on this table.
      ignore: names of columns that are left out.
      delimiter: what separates the cells: one character, or "tab". None: found out of
        comma, semicolon, tab and bar.
      decimal, thousands: the marks within numbers, "." and "," for 1,234.5, for every
        column. None: found out.
      label_kind: whether the label has classes or is a quantity; "auto": a quantity if
        it is numeric with more than 20 distinct values.
      settings: which of these arguments whoever reads an error can set, where this is
        called by a recipe that has not all of them as settings.

    Raises:
      DataError: with file, line and column, for anything that doesn't fit; also for a
        column most of whose distinct cells look like numbers or dates, but can't be
        read as such.
    """
    marks = _marks(decimal, thousands, label_kind)
    raw = _read(path, label, delimiter, settings)
    if schema is None:
        schema = _fit(
            raw,
            raw,
            categorical,
            ignore,
            missing,
            marks,
            label_kind,
        )
    elif schema.label != label:
        raise DataError(
            f"the label is {label!r}, but the schema's is {schema.label!r}",
            where=raw.path,
            remedy=f"use label={schema.label!r}, or fit a new schema",
        )
    else:
        raw = dataclasses.replace(raw, own=False)
    return Table(_encode(raw, schema), schema)


def table_split(
    path: str | Path,
    label: str,
    fraction: float,
    seed: int,
    *,
    categorical: Sequence[str] = (),
    missing: Sequence[str] = MISSING,
    ignore: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    delimiter: str | None = None,
    decimal: str | None = None,
    thousands: str | None = None,
    label_kind: Literal["auto", "classes", "quantity"] = "auto",
    settings: Collection[str] = SETTINGS,
) -> tuple[Table, Table]:
    """A random split of one file into (train, test); edges and vocabularies are fitted
    on the training rows alone.

    What the file says about itself holds for both parts: which columns are numbers and
    how they are spelled, and which classes there are. A class of which no row is left
    to train on is a warning: no model can learn it.

    Args:
      fraction: share of the rows that goes to test, which gets round(fraction * n) of
        them.
      seed: decides which rows.
      columns: names of the columns to predict from; None: all but the label.
      categorical, missing, ignore, delimiter, decimal, thousands, label_kind, settings:
      as of `table`.
    """
    marks = _marks(decimal, thousands, label_kind)
    raw = _read(path, label, delimiter, settings)
    if columns is not None:
        raw.check(columns, "to predict from")
        ignore = (
            *ignore,
            *(name for name in raw.columns if name not in columns and name != label),
        )
    train, test = (raw.rows(part) for part in partition(len(raw.lines), fraction, seed))
    schema = _fit(
        raw,
        train,
        categorical,
        ignore,
        missing,
        marks,
        label_kind,
    )
    tables = Table(_encode(train, schema), schema), Table(_encode(test, schema), schema)
    _warn_of_classes(train, test, schema)
    return tables


def _warn_of_classes(
    train: _Raw,
    test: _Raw,
    schema: Schema,
) -> None:
    if schema.classes is None:
        return
    lost = set(schema.classes) - set(train.columns[schema.label])
    if lost:
        first = next(
            i for i, cell in enumerate(test.columns[schema.label]) if cell in lost
        )
        rows = sum(cell in lost for cell in test.columns[schema.label])
        warnings.warn(
            f"{train.path}: no training row has the label"
            f" {', '.join(map(repr, sorted(lost)[:8]))}; the model can't learn it and"
            f" is wrong on the {rows} held-out rows that have it (the first is line"
            f" {test.lines[first]})",
            stacklevel=3,
        )


def _marks(
    decimal: str | None, thousands: str | None, label_kind: str
) -> tuple[str | None, str | None]:
    """The two marks, if they and the kind of label are possible."""
    if label_kind not in LABEL_KINDS:
        raise DataError(
            f"label_kind is {label_kind!r}{nearest(str(label_kind), LABEL_KINDS)}",
            where="label_kind",
            remedy=f"use one of {', '.join(LABEL_KINDS)}",
        )
    if decimal not in (None, ".", ","):
        raise DataError(
            f"decimal is {decimal!r}",
            where="decimal",
            remedy="use '.' or ',', or leave it out",
        )
    if thousands not in (None, "", ",", ".", " ", "'") or (
        thousands is not None and thousands == decimal
    ):
        raise DataError(
            f"thousands is {thousands!r} with decimal {decimal!r}",
            where="thousands",
            remedy=(
                "use a mark other than decimal's: ',', '.', ' ' or \"'\", or leave"
                " it out"
            ),
        )
    if decimal is None and thousands in (",", "."):
        decimal = "." if thousands == "," else ","
    return decimal, thousands


@dataclass(frozen=True)
class _Raw:
    """Stripped cells by column, and the line in the file at which each row starts.

    Attributes:
      settings: arguments that whoever reads an error can set.
      own: whether the schema is made of this file, not of another.
    """

    path: str
    label: str
    columns: dict[str, list[str]]
    lines: list[int]
    settings: Collection[str] = SETTINGS
    own: bool = True
    # by column, for `_parsed`
    parsed: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def rows(self, indices: np.ndarray) -> _Raw:
        chosen = indices.tolist()
        columns = {
            name: [cells[i] for i in chosen] for name, cells in self.columns.items()
        }
        return _Raw(
            self.path,
            self.label,
            columns,
            [self.lines[i] for i in chosen],
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
        """An error at the first row whose cell in `column` is among `cells`; it begins
        with that cell.
        """
        row = next(i for i, cell in enumerate(self.columns[column]) if cell in cells)
        return DataError(
            f"{self.columns[column][row]!r} {what}",
            remedy=remedy,
            where=f"{self.path}, line {self.lines[row]}, column {column!r}",
        )

    def advice(self, *ways: str | tuple[str, str]) -> str:
        """A remedy of several ways; one that needs a setting is a pair (setting, way),
        and left out if there is none.
        """
        known = self.settings if self.own else ()
        possible = [
            way if isinstance(way, str) else way[1]
            for way in ways
            if isinstance(way, str) or way[0] in known
        ]
        return ", or ".join(
            [", ".join(possible[:-1]), possible[-1]] if len(possible) > 1 else possible
        )

    def hint(self, *ways: tuple[str, str]) -> str:
        """A remedy as a part of a sentence, empty if nothing can be set."""
        return f": {', '.join(way for setting, way in ways if setting in self.settings)}".rstrip(
            ": "
        )

    def check(
        self,
        names: Iterable[str],
        purpose: str,
    ) -> None:
        """Check that all of these are columns."""
        for name in names:
            if name not in self.columns:
                raise DataError(
                    f"there is no column {name!r}"
                    f" {purpose}{nearest(name, self.columns)}",
                    where=self.path,
                    remedy=f"name some of {_listed(self.columns)}",
                )


def _listed(names: Iterable[str]) -> str:
    first = list(itertools.islice(names, NAMED + 1))
    return ", ".join(first[:NAMED]) + ", ..." * (len(first) > NAMED)


def _read(
    path: str | Path,
    label: str,
    delimiter: str | None,
    settings: Collection[str],
) -> _Raw:
    """The file's cells, every row as wide as the header."""
    text = _text(path)
    if not text.strip():
        raise DataError(
            "the file is empty", where=path, remedy="give a CSV file with a header"
        )
    line, _, rest = text.partition("\n")
    # as Excel says it, above the header
    if line.startswith("sep=") and len(line.rstrip()) == len("sep=;"):
        delimiter = line[len("sep=")] if delimiter is None else delimiter
        text = f"\n{rest}"
    separator = (
        _separator(delimiter)
        if delimiter is not None
        else _found_separator(text, label)
    )
    other = (
        [
            (
                "set `delimiter` if another character separates the cells"
                if delimiter is None
                else "correct `delimiter`, or leave it out"
            )
        ]
        if "delimiter" in settings
        else []
    )

    rows = []
    lines = []
    start = 1
    reader = csv.reader(
        io.StringIO(text, newline=""),
        skipinitialspace=True,
        strict=True,
        delimiter=separator,
    )
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        ways = [
            'close every quote, and write a quote inside a quoted cell as ""',
            *([] if rows else other),
        ]
        raise DataError(
            f"the line is not CSV: {error}",
            where=f"{path}, line {start}",
            remedy="; ".join(ways),
        ) from error

    header = _header(
        rows.pop(0),
        label,
        f"{path}, line {lines.pop(0)}",
        other,
    )
    if not rows:
        raise DataError(
            "the file has a header but no rows",
            where=path,
            remedy="give at least one row",
        )
    _check_widths(rows, lines, header, separator, path)
    columns = {
        name: list(map(str.strip, cells))
        for name, cells in zip(header, zip(*rows, strict=True), strict=True)
    }
    return _Raw(
        str(path),
        label,
        columns,
        lines,
        settings,
    )


def _text(path: str | Path) -> str:
    """The file's characters; of UTF-16 if it says so in its first bytes, as Excel's
    "Unicode text" does.
    """
    data = read_bytes(path)
    for mark, name in (
        (b"PK\x03\x04", "a ZIP archive, as .xlsx workbooks are"),
        (b"PAR1", "a Parquet file"),
        (b"\xd0\xcf\x11\xe0", "an old .xls workbook"),
        (b"SQLite format 3", "an SQLite database"),
    ):
        if data.startswith(mark):
            raise DataError(
                f"the file is {name}, not text",
                where=path,
                remedy="export the table as a CSV file",
            )
    # the mark of UTF-32 begins with that of UTF-16
    encoding = next(
        (
            name
            for mark, name in (
                (codecs.BOM_UTF32_LE, "utf-32"),
                (codecs.BOM_UTF32_BE, "utf-32"),
                (codecs.BOM_UTF16_LE, "utf-16"),
                (codecs.BOM_UTF16_BE, "utf-16"),
            )
            if data.startswith(mark)
        ),
        "utf-8-sig",
    )
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
        # 0x80 to 0x9f are the euro, quotes and dashes of Windows; nothing in Latin-1
        remedy = (
            "save the file as UTF-8, e.g. iconv -f"
            f" {'cp1252' if 0x80 <= byte < 0xA0 else 'latin1'} -t utf-8"
            if encoding == "utf-8-sig"
            else "save the file as UTF-8: it is cut short or damaged"
        )
        raise DataError(
            f"byte {byte:#04x} is not {name} text",
            where=f"{path}, line {line}",
            remedy=remedy,
        ) from error


def _separator(delimiter: str) -> str:
    separator = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter)
    if len(separator) != 1 or separator in '"\r\n':
        raise DataError(
            f"delimiter is {delimiter!r}, not one character",
            where="delimiter",
            remedy="give one character, or 'tab', or leave it out",
        )
    return separator


def _found_separator(text: str, label: str) -> str:
    """What separates the cells: the candidate whose header has the label, and whose
    rows are as wide as it.
    """

    def fit(separator: str) -> tuple[bool, float, int]:
        reader = csv.reader(
            io.StringIO(text[: 1 << 20], newline=""),
            skipinitialspace=True,
            strict=True,
            delimiter=separator,
        )
        rows: list[list[str]] = []
        try:
            for row in filter(None, reader):
                rows.append(row)
                if len(rows) > LOOKED_AT:
                    break
        # of a wrong separator, or of the text itself, which is read again
        except csv.Error:
            pass
        if not rows or len(rows[0]) < 2:
            return False, 0.0, 0
        width = len(rows[0])
        alike = sum(len(row) == width for row in rows) / len(rows)
        return label in [cell.strip() for cell in rows[0]], alike, width

    return max(DELIMITERS, key=fit)  # the first of equals


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


def _header(
    cells: list[str],
    label: str,
    where: str,
    other: list[str],
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
        raise DataError(
            f"there is no label column {label!r}{nearest(label, header)}",
            where=where,
            remedy="; ".join(
                [
                    f"name one of {_listed(header)} as the label",
                    *(other if len(header) == 1 else ()),
                ]
            ),
        )
    if len(header) == 1:
        raise DataError(
            f"{label!r} is the only column",
            where=where,
            remedy="; ".join(["give columns to predict it from", *other]),
        )
    return header


def _fit(
    raw: _Raw,
    train: _Raw,
    categorical: Sequence[str],
    ignore: Sequence[str],
    missing: Sequence[str],
    marks: tuple[str | None, str | None],
    label_kind: str,
) -> Schema:
    """The schema: kinds, notations and classes by all rows, edges and vocabularies by
    those to train on.
    """
    raw.check(categorical, "to be categorical")
    raw.check(ignore, "to be ignored")
    if raw.label in ignore:
        raise DataError(
            f"the label {raw.label!r} is to be ignored",
            where=raw.path,
            remedy="take it out of `ignore`",
        )
    absent = frozenset(missing)
    used = [name for name in raw.columns if name != raw.label and name not in ignore]
    if not used:
        raise DataError(
            "no column is left to predict from",
            where=raw.path,
            remedy="take some out of `ignore`",
        )

    spelled, proved = _notations(
        raw,
        [name for name in used if name not in categorical],
        absent,
        marks,
    )
    numbers = []
    edges = []
    notations = []
    categories = []
    vocabularies = []
    for name in used:
        cells = train.columns[name]
        if name in spelled and not absent.issuperset(cells):
            numbers.append(name)
            notations.append(spelled[name])
            edges.append(
                _quantiles(
                    _numbers(
                        train,
                        name,
                        absent,
                        spelled[name],
                    )
                )
            )
        else:
            categories.append(name)
            vocabularies.append(tuple(sorted(set(cells) - absent)))
    classes, label_notation = _label(
        raw, raw.label in categorical, absent, marks, proved, label_kind
    )
    return Schema(
        raw.label,
        classes,
        tuple(numbers),
        tuple(edges),
        tuple(categories),
        tuple(vocabularies),
        tuple(missing),
        tuple(notations),
        label_notation,
    )


def _notations(
    raw: _Raw,
    names: Sequence[str],
    absent: frozenset[str],
    marks: tuple[str | None, str | None],
    proved: str | None = None,
) -> tuple[dict[str, Notation], str | None]:
    """(how the numeric ones of these columns spell their numbers, the decimal mark that
    the file is proved to have).

    A file has one decimal mark: where a column leaves open which one, the others
    decide, or what is `proved` already.
    """
    counts = {
        name: Counter(cell for cell in raw.columns[name] if cell not in absent)
        for name in names
    }
    looks = {name: look(found, *marks) for name, found in counts.items()}
    proofs = {
        decimal_of(counts[name], found.notation)
        for name, found in looks.items()
        if found.kind == "numbers"
    }
    proofs = (proofs | {proved}) - {None}
    decimal = proofs.pop() if len(proofs) == 1 else None
    if decimal is not None and marks[0] is None:
        for name, found in looks.items():
            open_to_both = found.kind == "ambiguous" or (
                found.kind == "numbers"
                and found.notation.decimal != decimal
                and any(found.notation.decimal in cell for cell in counts[name])
            )
            if open_to_both:
                again = look(
                    counts[name],
                    decimal,
                    marks[1],
                )
                looks[name] = again if again.kind == "numbers" else found
    for name, found in looks.items():
        if found.kind == "codes" and name != raw.label:
            examples = ", ".join(map(repr, found.cells[:3]))
            warnings.warn(
                f"{raw.path}, column {name!r}: most of its distinct cells are numbers,"
                f" others are not ({examples}, ...); each is taken for a category"
                + raw.hint(
                    ("categorical", "name it in `categorical` if that is meant"),
                    ("ignore", "in `ignore` to leave the column out"),
                ),
                stacklevel=4,
            )
        if found.kind not in ("numbers", "categories", "codes"):
            raise _not_read(raw, name, found, counts[name])
    return {
        name: found.notation for name, found in looks.items() if found.kind == "numbers"
    }, decimal


def _not_read(
    raw: _Raw,
    name: str,
    found: Look,
    counts: Counter[str],
) -> DataError:
    """The error for a column that looks like numbers or dates, but can't be read as
    such.
    """
    rows = sum(counts[cell] for cell in found.cells)
    share = (
        f"{rows} of the column's {counts.total()} cells"
        f" ({100 * rows / counts.total():.0f} %)"
    )
    examples = ", ".join(map(repr, found.cells[:4])) + ", ..." * (len(found.cells) > 4)
    classes = (
        ("label_kind", "set `label_kind` to 'classes'")
        if name == raw.label
        else (
            "categorical",
            f"name {name!r} in `categorical` to keep each as a category",
        )
    )
    left_out = (
        ()
        if name == raw.label
        else (("ignore", "name it in `ignore` to leave the column out"),)
    )

    if found.kind == "ambiguous":
        first = found.cells[0]
        as_decimal = first.replace(found.notation.thousands, found.notation.decimal)
        what = (
            f"may be {as_decimal} with a decimal mark or"
            f" {first.replace(found.notation.thousands, '')} with thousands"
        )
        mark = found.notation.thousands
        return raw.error(
            f"{what}, and nothing in the file tells which: so are {share}",
            name,
            found.cells,
            raw.advice(
                ("decimal", f"set `decimal` to {mark!r} for the one"),
                ("thousands", f"`thousands` to {mark!r} for the other"),
                f"write the numbers without {mark!r} as thousands",
                classes,
                *left_out,
            ),
        )
    if found.kind == "dates":
        return raw.error(
            f"is a date or a time, and so are {share}",
            name,
            found.cells,
            raw.advice(
                "write it as numbers (days since the first, the month, the weekday)",
                *left_out,
                classes,
            ),
        )
    if found.kind == "units":
        around = found.notation.unit.replace("#", "")
        return raw.error(
            f"is a number with {around!r}, and so are {share}",
            name,
            found.cells,
            raw.advice(
                f"write the numbers alone, without {around!r}", classes, *left_out
            ),
        )
    if found.kind == "marks":
        return raw.error(
            "is a number, but not with the marks that `decimal` and `thousands` set;"
            f" so are {share}",
            name,
            found.cells,
            raw.advice("leave the two out, or correct them", classes, *left_out),
        )
    if found.kind == "notations":
        return raw.error(
            f"is a number that is spelled otherwise than others of the column: {share}"
            f" are such, {examples}",
            name,
            found.cells,
            raw.advice(
                "write all numbers of the column in one way and one unit",
                classes,
                *left_out,
            ),
        )
    ways: list[str | tuple[str, str]] = []
    if name == raw.label:
        ways.append("write numbers, and leave rows without a label out")
    elif len(found.cells) <= MOST_WORDS:
        ways.append(
            (
                "missing",
                (
                    f"add {', '.join(map(repr, found.cells))} to `missing` if no value"
                    " is meant"
                ),
            )
        )
        ways.append("write a number or nothing instead")
    return raw.error(
        f"is no number, as most of the column's distinct cells are; {share} are not:"
        f" {examples}",
        name,
        found.cells,
        raw.advice(*ways, classes, *left_out),
    )


def _label(
    raw: _Raw,
    categorical: bool,
    absent: frozenset[str],
    marks: tuple[str | None, str | None],
    proved: str | None,
    label_kind: str,
) -> tuple[tuple[str, ...] | None, Notation]:
    """(the label's values in order, or None for a quantity; how a quantity is
    spelled).
    """
    values = _label_values(raw, absent)
    if categorical and label_kind == "quantity":
        raise DataError(
            f"the label {raw.label!r} is named in `categorical`, and is to be a"
            " quantity",
            where=raw.path,
            remedy="take it out of `categorical`, or set `label_kind` to 'classes'",
        )
    if len(values) == 1:
        raise raw.error(
            "is the label of every row",
            raw.label,
            values,
            "give rows of at least two classes (or quantities); there is nothing to"
            " learn from one",
        )
    if label_kind == "quantity" or (
        label_kind == "auto" and not categorical and len(values) > MOST_CLASSES
    ):
        notation = _notations(raw, [raw.label], absent, marks, proved)[0].get(raw.label)
        if notation is not None:
            _numbers(raw, raw.label, absent, notation)  # for its errors
            return None, notation
        if label_kind == "quantity":
            bad = {value for value in values if plain_number(value) is None}
            raise raw.error(
                f"is one of {len(bad)} distinct labels that are no numbers, but the"
                " label is to be a quantity",
                raw.label,
                bad,
                raw.advice(
                    "write numbers",
                    ("label_kind", "set `label_kind` to 'classes' or 'auto'"),
                    "name another column as the label",
                ),
            )

    parsed = {value: plain_number(value) for value in values}
    if all(each is not None for each in parsed.values()):
        return (
            tuple(
                sorted(
                    values,
                    key=lambda value: (parsed[value], value),
                )
            ),
            Notation(),
        )
    return tuple(sorted(values)), Notation()


def _label_values(raw: _Raw, absent: frozenset[str]) -> set[str]:
    values = set(raw.columns[raw.label])
    if values & absent:
        raise raw.error(
            "stands for a missing label",
            raw.label,
            absent,
            raw.advice(
                "fill it in or leave the row out",
                ("missing", "if the cell is a class, take it out of `missing`"),
            ),
        )
    return values


def _encode(raw: _Raw, schema: Schema) -> Arrays:
    absent = frozenset(schema.missing)
    for name in (*schema.numbers, *schema.categories):
        if name not in raw.columns:
            raise DataError(
                f"the column {name!r} of the training table is not"
                f" there{nearest(name, raw.columns)}",
                where=raw.path,
                remedy="give a table with the training table's columns",
            )
    inputs = {}
    if schema.numbers:
        notations = schema.notations or (Notation(),) * len(schema.numbers)
        inputs["numbers"] = np.stack(
            [
                _numbers(raw, name, absent, notation)
                for name, notation in zip(schema.numbers, notations, strict=True)
            ],
            axis=1,
        )
    if schema.categories:
        codes = [
            {value: i for i, value in enumerate(values, 1)}
            for values in schema.vocabularies
        ]
        inputs["categories"] = np.stack(
            [
                _codes(raw.columns[name], code, 0)
                for name, code in zip(schema.categories, codes, strict=True)
            ],
            axis=1,
        )
    values = _label_values(raw, absent)
    if schema.classes is None:
        return Arrays(
            inputs,
            _numbers(
                raw,
                raw.label,
                absent,
                schema.label_notation,
            ),
        )
    unseen = values.difference(schema.classes)
    if unseen:
        near = nearest(
            next(cell for cell in raw.columns[raw.label] if cell in unseen),
            schema.classes,
        )
        raise raw.error(
            f"is not among the labels of the training table{near}",
            raw.label,
            unseen,
            f"correct the cell (the labels are {_listed(schema.classes)}), leave its"
            " rows out, or put rows with this label into the training table, and train"
            " again",
        )
    return Arrays(
        inputs,
        _codes(
            raw.columns[raw.label],
            {value: i for i, value in enumerate(schema.classes)},
            -1,
        ),
    )


def _parsed(
    raw: _Raw,
    name: str,
    absent: frozenset[str],
    notation: Sequence[str],
) -> dict[str, float | None]:
    """Each distinct cell of a column that is not missing, and the number that it
    spells.
    """
    if name not in raw.parsed:
        how = Notation(*notation)
        raw.parsed[name] = {
            cell: number(cell, how) for cell in set(raw.columns[name]) - absent
        }
    return raw.parsed[name]


def _numbers(
    raw: _Raw,
    name: str,
    absent: frozenset[str],
    notation: Sequence[str] = Notation(),
) -> np.ndarray:
    """A numeric column as float32 (n,), NaN where missing."""
    parsed = _parsed(raw, name, absent, notation)
    bad = {cell for cell, value in parsed.items() if value is None}
    if bad:
        how = (
            ""
            if Notation(*notation) == Notation()
            else f" (they are spelled like {_example(Notation(*notation))})"
        )
        others = (
            "as the column's other cells are"
            if raw.own
            else "as the training table's are"
        )
        word = next(cell for cell in raw.columns[name] if cell in bad)
        label = name == raw.label
        raise raw.error(
            f"is not a finite number, {others}{how}",
            name,
            bad,
            raw.advice(
                "correct the cell",
                *([] if label else [("missing", f"add {word!r} to `missing`")]),
                *(
                    [("label_kind", "set `label_kind` to 'classes'")]
                    if label
                    else [
                        ("categorical", f"name {name!r} in `categorical`"),
                        ("ignore", "name it in `ignore`"),
                    ]
                ),
                *(
                    []
                    if raw.own
                    else ["read the training table anew with the column as it is here"]
                ),
            ),
        )
    return _codes(
        raw.columns[name],
        parsed,
        math.nan,
        np.float32,
    )


def _example(notation: Notation) -> str:
    text = f"1{notation.thousands}234{notation.decimal}5"
    return (notation.unit or "#").replace("#", text, 1)


def _codes(
    cells: Sequence[str],
    codes: dict,
    default: float,
    dtype: type = np.int32,
) -> np.ndarray:
    return np.fromiter(
        map(
            codes.get,
            cells,
            itertools.repeat(default),
        ),
        dtype,
        len(cells),
    )


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    """Edges of at most BINS bins. A value that fills a bin alone is an edge; the others
    share what is left.
    """
    present = values[~np.isnan(values)].astype(np.float64)
    distinct, counts = np.unique(present, return_counts=True)
    frequent = distinct[counts >= len(present) / BINS][: BINS - 1]
    rest = present[~np.isin(present, frequent)]
    if rest.size:
        frequent = np.append(
            frequent,
            np.quantile(
                rest,
                np.linspace(
                    0,
                    1,
                    BINS + 1 - len(frequent),
                ),
            ),
        )
    # Both casts matter: quantiles are interpolated in float64, and edges must still
    # differ in float32.
    return tuple(np.unique(frequent.astype(np.float32)).tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

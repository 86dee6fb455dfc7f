"""CSV tables: numbers with quantile edges, categories with vocabularies, both fitted on the training rows alone."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.data.arrays import Arrays, partition
from lepton_jax.data.idx import read_bytes
from lepton_jax.errors import DataError, nearest

MISSING = ("", "?", "NA", "NaN", "nan", "null")
NUMERIC_SHARE = 0.9  # of a column's cells that must parse for the others to count as faults
MOST_CLASSES = 20  # a numeric label with more distinct values than this is a quantity
BINS = 48


@dataclass(frozen=True)
class Schema:
    """What a training table taught: enough to encode another table in the same way. Plain data.

    Attributes:
      label: name of the label's column.
      classes: the label's values, a target is an index into them; None where the label is a quantity.
      numbers: names of the numeric columns.
      edges: for each of them ascending quantiles of the training values, at most BINS + 1; one for a constant column.
      categories: names of the categorical columns.
      vocabularies: for each of them its training values; index i + 1 stands for the i-th, 0 for missing or unseen.
      missing: cells that stand for no value.
    """

    label: str
    classes: tuple[str, ...] | None
    numbers: tuple[str, ...]
    edges: tuple[tuple[float, ...], ...]
    categories: tuple[str, ...]
    vocabularies: tuple[tuple[str, ...], ...]
    missing: tuple[str, ...] = MISSING

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
            return cls(**{name: _tuples(value) for name, value in json.loads(text).items()})
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"this is no schema of a table: {error}", where="Schema.from_json",
                            remedy="give the text that Schema.to_json returned") from error


@dataclass(frozen=True, eq=False)
class Table:
    """A table as samples.

    Attributes:
      arrays: inputs {"numbers": float32 (n, a), NaN where missing; "categories": int32 (n, c)}, without the block that
        has no columns; targets int32 (n,) indices into `schema.classes`, or float32 (n,) quantities.
      schema: how to encode another table in the same way, and the sizes that a model needs.
    """

    arrays: Arrays
    schema: Schema


def table(path: str | Path, label: str, *, categorical: Sequence[str] = (), missing: Sequence[str] = MISSING,
          schema: Schema | None = None) -> Table:
    """A CSV file with a header, UTF-8 and gzipped or not, as samples.

    A column is numeric if at least 90 % of its cells that are not missing parse as finite numbers, else categorical.
    The label is a quantity if it is numeric with more than 20 distinct values, else it has classes. Spaces around
    cells and empty lines don't count.

    Args:
      path: the file.
      label: name of the column to predict.
      categorical: names of columns that are categories though they look like numbers.
      missing: cells that stand for no value.
      schema: of the training table, to encode a test table by; its `missing` and kinds of columns hold then, and
        columns that it doesn't know are left out. None: fit one on this table.

    Raises:
      DataError: with file, line and column, for anything that doesn't fit.
    """
    raw = _read(path, label)
    if schema is None:
        schema = _fit(raw, categorical, missing)
    elif schema.label != label:
        raise DataError(f"the label is {label!r}, but the schema's is {schema.label!r}", where=raw.path,
                        remedy=f"use label={schema.label!r}, or fit a new schema")
    return Table(_encode(raw, schema), schema)


def table_split(path: str | Path, label: str, fraction: float, seed: int, *, categorical: Sequence[str] = (),
                missing: Sequence[str] = MISSING) -> tuple[Table, Table]:
    """A random split of one file into (train, test); the schema is fitted on the training rows alone.

    Args:
      fraction: share of the rows that goes to test, which gets round(fraction * n) of them.
      seed: decides which rows.
    """
    raw = _read(path, label)
    train, test = (raw.rows(part) for part in partition(len(raw.lines), fraction, seed))
    schema = _fit(train, categorical, missing)
    return Table(_encode(train, schema), schema), Table(_encode(test, schema), schema)


@dataclass(frozen=True)
class _Raw:
    """Stripped cells by column, and the line in the file at which each row starts."""

    path: str
    label: str
    columns: dict[str, list[str]]
    lines: list[int]
    parsed: dict[str, dict[str, float | None]] = field(default_factory=dict)  # by column, for `_parsed`

    def rows(self, indices: np.ndarray) -> _Raw:
        chosen = indices.tolist()
        columns = {name: [cells[i] for i in chosen] for name, cells in self.columns.items()}
        return _Raw(self.path, self.label, columns, [self.lines[i] for i in chosen])

    def error(self, what: str, column: str, cells: frozenset[str] | set[str], remedy: str) -> DataError:
        """An error at the first row whose cell in `column` is among `cells`; it begins with that cell."""
        row = next(i for i, cell in enumerate(self.columns[column]) if cell in cells)
        return DataError(f"{self.columns[column][row]!r} {what}", remedy=remedy,
                         where=f"{self.path}, line {self.lines[row]}, column {column!r}")


def _read(path: str | Path, label: str) -> _Raw:
    """The file's cells, every row as wide as the header."""
    data = read_bytes(path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[:error.start].count(b"\n") + 1
        raise DataError(f"byte {error.object[error.start]:#04x} is not UTF-8 text", where=f"{path}, line {line}",
                        remedy="save the file as UTF-8, e.g. iconv -f latin1 -t utf-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    rows, lines, start = [], [], 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"the line is not CSV: {error}", where=f"{path}, line {start}",
                        remedy='close every quote, and write a quote inside a quoted cell as ""') from error
    if not rows:
        raise DataError("the file is empty", where=path, remedy="give a CSV file with a header")
    header = _header(rows.pop(0), label, f"{path}, line {lines.pop(0)}")
    if not rows:
        raise DataError("the file has a header but no rows", where=path, remedy="give at least one row")
    for row, line in zip(rows, lines, strict=True):
        if len(row) != len(header):
            raise DataError(f"expected {len(header)} cells, found {len(row)}", where=f"{path}, line {line}",
                            remedy="make the row as wide as the header; quote cells that contain a comma")
    columns = {name: list(map(str.strip, cells)) for name, cells in zip(header, zip(*rows, strict=True), strict=True)}
    return _Raw(str(path), label, columns, lines)


def _header(cells: list[str], label: str, where: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    for position, name in enumerate(header):
        if not name:
            raise DataError(f"column {position + 1} has no name", where=where,
                            remedy="name it in the header; if it only counts rows, leave it out (pandas: index=False)")
        if name in header[:position]:
            raise DataError(f"column {name!r} is there twice", where=where, remedy="give each column a name of its own")
    if label not in header:
        raise DataError(f"there is no label column {label!r}{nearest(label, header)}", where=where,
                        remedy=f"name one of {', '.join(header)} as the label")
    if len(header) == 1:
        raise DataError(f"{label!r} is the only column", where=where, remedy="give columns to predict it from")
    return header


def _fit(raw: _Raw, categorical: Sequence[str], missing: Sequence[str]) -> Schema:
    for name in categorical:
        if name not in raw.columns:
            raise DataError(f"there is no column {name!r} to be categorical{nearest(name, raw.columns)}",
                            where=raw.path, remedy=f"name some of {', '.join(raw.columns)}")
    absent = frozenset(missing)
    numbers, edges, categories, vocabularies = [], [], [], []
    for name, cells in raw.columns.items():
        if name == raw.label:
            continue
        if name not in categorical and _numeric(raw, name, absent):
            numbers.append(name)
            edges.append(_quantiles(_numbers(raw, name, absent)))
        else:
            categories.append(name)
            vocabularies.append(tuple(sorted(set(cells) - absent)))
    return Schema(raw.label, _classes(raw, raw.label in categorical, absent), tuple(numbers), tuple(edges),
                  tuple(categories), tuple(vocabularies), tuple(missing))


def _classes(raw: _Raw, categorical: bool, absent: frozenset[str]) -> tuple[str, ...] | None:
    """The label's values in order, or None for a quantity."""
    values = _label_values(raw, absent)
    numeric = not categorical and _numeric(raw, raw.label, absent)
    if numeric and len(values) > MOST_CLASSES:
        _numbers(raw, raw.label, absent)  # for its errors
        return None
    if len(values) == 1:
        raise raw.error("is the label of every row", raw.label, values,
                        "give rows of at least two classes; there is nothing to learn from one")
    parsed = {value: _parse(value) for value in values}
    if all(number is not None for number in parsed.values()):
        return tuple(sorted(values, key=lambda value: (parsed[value], value)))
    return tuple(sorted(values))


def _label_values(raw: _Raw, absent: frozenset[str]) -> set[str]:
    values = set(raw.columns[raw.label])
    if values & absent:
        raise raw.error("stands for a missing label", raw.label, absent,
                        "fill it in or leave the row out; if the cell is a class, change `missing`")
    return values


def _encode(raw: _Raw, schema: Schema) -> Arrays:
    absent = frozenset(schema.missing)
    for name in (*schema.numbers, *schema.categories):
        if name not in raw.columns:
            raise DataError(f"the column {name!r} of the training table is not there{nearest(name, raw.columns)}",
                            where=raw.path, remedy="give a table with the training table's columns")
    inputs = {}
    if schema.numbers:
        inputs["numbers"] = np.stack([_numbers(raw, name, absent) for name in schema.numbers], axis=1)
    if schema.categories:
        codes = [{value: i for i, value in enumerate(values, 1)} for values in schema.vocabularies]
        inputs["categories"] = np.stack([_codes(raw.columns[name], code, 0)
                                         for name, code in zip(schema.categories, codes, strict=True)], axis=1)
    values = _label_values(raw, absent)
    if schema.classes is None:
        return Arrays(inputs, _numbers(raw, raw.label, absent))
    unseen = values.difference(schema.classes)
    if unseen:
        near = nearest(next(cell for cell in raw.columns[raw.label] if cell in unseen), schema.classes)
        raise raw.error(f"is not among the labels of the training table{near}", raw.label, unseen,
                        f"use the labels {', '.join(schema.classes[:8])}{', ...' * (len(schema.classes) > 8)}")
    return Arrays(inputs, _codes(raw.columns[raw.label], {value: i for i, value in enumerate(schema.classes)}, -1))


def _parse(cell: str) -> float | None:
    """The finite float32 that a cell stands for; None if it doesn't."""
    try:
        value = float(cell)
    except ValueError:
        return None
    # float() takes "1_000" too, which no CSV means as a thousand; 3.4e38 is float32's end.
    return value if math.isfinite(value) and abs(value) <= 3.4e38 and "_" not in cell else None


def _parsed(raw: _Raw, name: str, absent: frozenset[str]) -> dict[str, float | None]:
    """Each distinct cell of a column that is not missing, and what `_parse` makes of it."""
    if name not in raw.parsed:
        raw.parsed[name] = {cell: _parse(cell) for cell in set(raw.columns[name]) - absent}
    return raw.parsed[name]


def _numeric(raw: _Raw, name: str, absent: frozenset[str]) -> bool:
    parsed = _parsed(raw, name, absent)
    bad = {cell for cell, value in parsed.items() if value is None}
    if not (parsed and bad):
        return bool(parsed)
    counts = Counter(cell in bad for cell in raw.columns[name] if cell not in absent)
    return counts[False] >= NUMERIC_SHARE * counts.total()


def _numbers(raw: _Raw, name: str, absent: frozenset[str]) -> np.ndarray:
    """A numeric column as float32 (n,), NaN where missing."""
    parsed = _parsed(raw, name, absent)
    bad = {cell for cell, value in parsed.items() if value is None}
    if bad:
        raise raw.error("is not a finite number, as the column's other cells are", name, bad,
                        f"correct the cell, list it in `missing`, or name {name!r} in `categorical`")
    return _codes(raw.columns[name], parsed, math.nan, np.float32)


def _codes(cells: Sequence[str], codes: dict, default: float, dtype: type = np.int32) -> np.ndarray:
    return np.fromiter(map(codes.get, cells, itertools.repeat(default)), dtype, len(cells))


def _quantiles(values: np.ndarray) -> tuple[float, ...]:
    """Edges of at most BINS bins. A value that fills a bin alone is an edge; the others share what is left."""
    present = values[~np.isnan(values)].astype(np.float64)
    distinct, counts = np.unique(present, return_counts=True)
    frequent = distinct[counts >= len(present) / BINS][:BINS - 1]
    rest = present[~np.isin(present, frequent)]
    if rest.size:
        frequent = np.append(frequent, np.quantile(rest, np.linspace(0, 1, BINS + 1 - len(frequent))))
    # Both casts matter: quantiles are interpolated in float64, and edges must still differ in float32.
    return tuple(np.unique(frequent.astype(np.float32)).tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

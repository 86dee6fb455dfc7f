"""CSV tables as samples: numbers with quantile edges, categories with vocabularies.

Both are fitted on the training rows alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lepton_jax.data.arrays import Arrays, partition
from lepton_jax.data.csv_file import SETTINGS, RawTable, listed, read_csv
from lepton_jax.data.notation import (
    Look,
    Notation,
    decimal_of,
    look,
    number,
    plain_number,
)
from lepton_jax.data.unreadable import not_read
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

# A numeric label with more distinct values than this is a quantity, unless somebody
# says otherwise. Assumption: few data sets number more classes.
MOST_CLASSES = 20

BINS = 48  # of a number, at most; assumption

LABEL_KINDS = ("auto", "classes", "quantity")


@dataclass(frozen=True)
class Schema:
    """The columns of a training table: enough to encode another table in the same way.

    It is plain data.

    Attributes:
      label: name of the label's column.
      classes: the label's values, a target is an index into them; None if the label is
        a quantity.
      numbers: names of the numeric columns.
      edges: for each of them ascending quantiles of the training values, at most BINS +
        1; one for a constant column.
      categories: names of the categorical columns.
      vocabularies: for each of them its training values; index i + 1 stands for the
        i-th, 0 for missing or unseen.
      missing: cells that stand for no value.
      notations: how each numeric column spells its numbers: (decimal mark, mark of
        thousands, unit); none for a schema in which all are plain.
      label_notation: how a label that is a quantity spells its numbers.
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
        """Count of indices of each categorical column."""
        return tuple(len(values) + 1 for values in self.vocabularies)

    def to_json(self) -> str:
        """Return the schema as text for `from_json`."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Schema:
        """Return the schema that `to_json` wrote.

        Raises:
          DataError: the text is no schema.
        """
        try:
            fields = json.loads(text).items()
            return cls(**{name: _tuples(value) for name, value in fields})
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
    """Read a CSV file with a header, UTF-8 or UTF-16 and gzipped or not, as samples.

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
      decimal: the decimal mark of every column, "." for 1,234.5. None: found out.
      thousands: the mark between groups of three digits of every column, "," for
        1,234.5. None: found out.
      label_kind: whether the label has classes or is a quantity; "auto": a quantity if
        it is numeric with more than 20 distinct values.
      settings: which of these arguments a person who reads an error can set; for a
        recipe that does not offer all of them.

    Raises:
      DataError: with file, line and column, for anything that doesn't fit; also for a
        column most of whose distinct cells look like numbers or dates, but can't be
        read as such.
    """
    _check_label_kind(label_kind)
    marks = _marks(decimal, thousands)
    raw = read_csv(path, label, delimiter, settings)
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
    """Split the rows of one file at random into (train, test).

    Edges and vocabularies are fitted on the training rows alone. The kinds of the
    columns, how their numbers are spelled, and the classes are those of the whole file.
    If no training row has some class, there is a warning: no model can learn it.

    Args:
      path: the file.
      label: name of the column to predict.
      fraction: share of the rows that goes to test, which gets round(fraction * n) of
        them.
      seed: decides which rows.
      categorical: as in `table`.
      missing: as in `table`.
      ignore: as in `table`.
      columns: names of the columns to predict from; None: all but the label.
      delimiter: as in `table`.
      decimal: as in `table`.
      thousands: as in `table`.
      label_kind: as in `table`.
      settings: as in `table`.
    """
    _check_label_kind(label_kind)
    marks = _marks(decimal, thousands)
    raw = read_csv(path, label, delimiter, settings)
    if columns is not None:
        raw.check(columns, "to predict from")
        used = {*columns, label}
        ignore = (*ignore, *(name for name in raw.columns if name not in used))

    train_rows, test_rows = partition(len(raw.lines), fraction, seed)
    train = raw.rows(train_rows)
    test = raw.rows(test_rows)
    schema = _fit(
        raw,
        train,
        categorical,
        ignore,
        missing,
        marks,
        label_kind,
    )
    train_table = Table(_encode(train, schema), schema)
    test_table = Table(_encode(test, schema), schema)
    _warn_of_classes(train, test, schema)
    return train_table, test_table


# ---- internals ----


class Marks(NamedTuple):
    """The marks within numbers that somebody has set; None: found out."""

    decimal: str | None
    thousands: str | None


def _warn_of_classes(
    train: RawTable,
    test: RawTable,
    schema: Schema,
) -> None:
    if schema.classes is None:
        return
    lost = set(schema.classes) - set(train.columns[schema.label])
    lines = [
        line
        for cell, line in zip(test.columns[schema.label], test.lines, strict=True)
        if cell in lost
    ]
    if lost:
        warnings.warn(
            f"{train.path}: no training row has the label"
            f" {', '.join(map(repr, sorted(lost)[:8]))}; the model can't learn it and"
            f" is wrong on the {len(lines)} held-out rows that have it (the first is"
            f" line {lines[0]})",
            stacklevel=3,
        )


def _check_label_kind(label_kind: str) -> None:
    if label_kind not in LABEL_KINDS:
        raise DataError(
            f"label_kind is {label_kind!r}{nearest(str(label_kind), LABEL_KINDS)}",
            where="label_kind",
            remedy=f"use one of {', '.join(LABEL_KINDS)}",
        )


def _marks(decimal: str | None, thousands: str | None) -> Marks:
    """Return the two marks, if they are possible."""
    if decimal not in (None, ".", ","):
        raise DataError(
            f"decimal is {decimal!r}",
            where="decimal",
            remedy="use '.' or ',', or leave it out",
        )
    the_same = thousands is not None and thousands == decimal
    if the_same or thousands not in (None, "", ",", ".", " ", "'"):
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
    return Marks(decimal, thousands)


def _fit(
    raw: RawTable,
    train: RawTable,
    categorical: Sequence[str],
    ignore: Sequence[str],
    missing: Sequence[str],
    marks: Marks,
    label_kind: str,
) -> Schema:
    """Return the schema.

    Kinds, notations and classes are those of all rows, `raw`; edges and vocabularies
    those of the rows to train on.
    """
    absent = frozenset(missing)
    used = _columns_to_use(raw, categorical, ignore)
    maybe_numeric = [name for name in used if name not in categorical]
    notations, decimal = _notations(raw, maybe_numeric, absent, marks)

    numbers = {}
    edges = []
    vocabularies = {}
    for name in used:
        cells = train.columns[name]
        if name in notations and not absent.issuperset(cells):
            numbers[name] = notations[name]
            values = _numbers(train, name, absent, notations[name])
            edges.append(quantile_edges(values))
        else:
            vocabularies[name] = tuple(sorted(set(cells) - absent))

    label_is_categorical = raw.label in categorical
    classes, label_notation = _label(
        raw, label_is_categorical, absent, marks, decimal, label_kind
    )
    return Schema(
        label=raw.label,
        classes=classes,
        numbers=tuple(numbers),
        edges=tuple(edges),
        categories=tuple(vocabularies),
        vocabularies=tuple(vocabularies.values()),
        missing=tuple(missing),
        notations=tuple(numbers.values()),
        label_notation=label_notation,
    )


def _columns_to_use(
    raw: RawTable,
    categorical: Sequence[str],
    ignore: Sequence[str],
) -> list[str]:
    raw.check(categorical, "to be categorical")
    raw.check(ignore, "to be ignored")
    if raw.label in ignore:
        raise DataError(
            f"the label {raw.label!r} is to be ignored",
            where=raw.path,
            remedy="take it out of `ignore`",
        )

    used = [name for name in raw.columns if name != raw.label and name not in ignore]
    if not used:
        raise DataError(
            "no column is left to predict from",
            where=raw.path,
            remedy="take some out of `ignore`",
        )
    return used


# ---- how columns spell their numbers ----


def _notations(
    raw: RawTable,
    names: Sequence[str],
    absent: frozenset[str],
    marks: Marks,
    proved: str | None = None,
) -> tuple[dict[str, Notation], str | None]:
    """Find out how columns spell their numbers.

    A file has one decimal mark: if a column leaves open which one, the other columns
    decide, or what is `proved` already.

    Returns:
      the notation of each column that is numeric, and the decimal mark that the file is
      proved to have.
    """
    counts = {
        name: Counter(cell for cell in raw.columns[name] if cell not in absent)
        for name in names
    }
    looks = {name: look(cells, *marks) for name, cells in counts.items()}
    decimal = _proved_decimal(counts, looks, proved)
    if decimal is not None and marks.decimal is None:
        for name in names:
            if _is_open_to_both(looks[name], decimal, counts[name]):
                again = look(counts[name], decimal, marks.thousands)
                if again.kind == "numbers":
                    looks[name] = again

    for name, seen in looks.items():
        if seen.kind == "codes" and name != raw.label:
            examples = ", ".join(map(repr, seen.cells[:3]))
            hint = raw.hint(
                ("categorical", "name it in `categorical` if that is meant"),
                ("ignore", "in `ignore` to leave the column out"),
            )
            warnings.warn(
                f"{raw.path}, column {name!r}: most of its distinct cells are numbers,"
                f" others are not ({examples}, ...); each is taken for a category"
                f"{hint}",
                stacklevel=4,
            )
        if seen.kind not in ("numbers", "categories", "codes"):
            raise not_read(raw, name, seen, counts[name])
    numeric = {
        name: seen.notation for name, seen in looks.items() if seen.kind == "numbers"
    }
    return numeric, decimal


def _proved_decimal(
    counts: dict[str, Counter[str]],
    looks: dict[str, Look],
    proved: str | None,
) -> str | None:
    """Return the decimal mark, if all columns that prove one prove the same."""
    proofs = {proved}
    for name, seen in looks.items():
        if seen.kind == "numbers":
            proofs.add(decimal_of(counts[name], seen.notation))
    proofs.discard(None)
    return proofs.pop() if len(proofs) == 1 else None


def _is_open_to_both(
    seen: Look,
    decimal: str,
    counts: Counter[str],
) -> bool:
    """Whether a column may be read with the file's decimal mark, but was not."""
    if seen.kind == "ambiguous":
        return True
    if seen.kind != "numbers" or seen.notation.decimal == decimal:
        return False
    return any(seen.notation.decimal in cell for cell in counts)


# ---- the label ----


def _label(
    raw: RawTable,
    categorical: bool,
    absent: frozenset[str],
    marks: Marks,
    proved: str | None,
    label_kind: str,
) -> tuple[tuple[str, ...] | None, Notation]:
    """Return the label's classes in order, or None for a quantity and its notation."""
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

    may_be_quantity = not categorical and len(values) > MOST_CLASSES
    if label_kind == "quantity" or (label_kind == "auto" and may_be_quantity):
        notations, _ = _notations(
            raw,
            [raw.label],
            absent,
            marks,
            proved,
        )
        if raw.label in notations:
            notation = notations[raw.label]
            _numbers(raw, raw.label, absent, notation)  # for its errors
            return None, notation
        if label_kind == "quantity":
            raise _no_quantity(raw, values)
    return _ordered_classes(values), Notation()


def _no_quantity(raw: RawTable, values: set[str]) -> DataError:
    bad = {value for value in values if plain_number(value) is None}
    return raw.error(
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


def _ordered_classes(values: set[str]) -> tuple[str, ...]:
    """Return classes in the order of their numbers, if all are numbers, else sorted."""
    numbers = {value: plain_number(value) for value in values}
    if None in numbers.values():
        return tuple(sorted(values))
    return tuple(
        sorted(
            values,
            key=lambda value: (numbers[value], value),
        )
    )


def _label_values(raw: RawTable, absent: frozenset[str]) -> set[str]:
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


# ---- from cells to arrays ----


def _encode(raw: RawTable, schema: Schema) -> Arrays:
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
        numbers = [
            _numbers(raw, name, absent, notation)
            for name, notation in zip(schema.numbers, notations, strict=True)
        ]
        inputs["numbers"] = np.stack(numbers, axis=1)
    if schema.categories:
        categories = [
            _codes(
                raw.columns[name],
                _numbered(values, first=1),
                0,
            )
            for name, values in zip(schema.categories, schema.vocabularies, strict=True)
        ]
        inputs["categories"] = np.stack(categories, axis=1)
    return Arrays(inputs, _encode_label(raw, schema, absent))


def _encode_label(
    raw: RawTable,
    schema: Schema,
    absent: frozenset[str],
) -> np.ndarray:
    values = _label_values(raw, absent)
    if schema.classes is None:
        return _numbers(raw, raw.label, absent, schema.label_notation)

    cells = raw.columns[raw.label]
    unseen = values.difference(schema.classes)
    if unseen:
        first = next(cell for cell in cells if cell in unseen)
        near = nearest(first, schema.classes)
        raise raw.error(
            f"is not among the labels of the training table{near}",
            raw.label,
            unseen,
            f"correct the cell (the labels are {listed(schema.classes)}), leave its"
            " rows out, or put rows with this label into the training table, and train"
            " again",
        )
    return _codes(
        cells,
        _numbered(schema.classes, first=0),
        -1,
    )


def _numbered(values: Sequence[str], first: int) -> dict[str, int]:
    return {value: i for i, value in enumerate(values, first)}


def _numbers(
    raw: RawTable,
    name: str,
    absent: frozenset[str],
    notation: Sequence[str] = Notation(),
) -> np.ndarray:
    """Return a numeric column as float32 (n,), NaN where missing."""
    parsed = _parsed(raw, name, absent, notation)
    bad = {cell for cell, value in parsed.items() if value is None}
    if bad:
        raise _no_number(raw, name, bad, Notation(*notation))
    return _codes(
        raw.columns[name],
        parsed,
        math.nan,
        np.float32,
    )


def _parsed(
    raw: RawTable,
    name: str,
    absent: frozenset[str],
    notation: Sequence[str],
) -> dict[str, float | None]:
    """Return the number that each distinct cell of a column spells, if it does."""
    if name not in raw.parsed:
        how = Notation(*notation)
        raw.parsed[name] = {
            cell: number(cell, how) for cell in set(raw.columns[name]) - absent
        }
    return raw.parsed[name]


def _no_number(
    raw: RawTable,
    name: str,
    bad: set[str],
    notation: Notation,
) -> DataError:
    others = "the training table's are"
    if raw.own:
        others = "the column's other cells are"
    spelled = ""
    if notation != Notation():
        spelled = f" (they are spelled like {_example(notation)})"

    word = next(cell for cell in raw.columns[name] if cell in bad)
    ways: list[str | tuple[str, str]] = ["correct the cell"]
    if name == raw.label:
        ways.append(("label_kind", "set `label_kind` to 'classes'"))
    else:
        ways.append(("missing", f"add {word!r} to `missing`"))
        ways.append(("categorical", f"name {name!r} in `categorical`"))
        ways.append(("ignore", "name it in `ignore`"))
    if not raw.own:
        ways.append("read the training table anew with the column as it is here")
    return raw.error(
        f"is not a finite number, as {others}{spelled}",
        name,
        bad,
        raw.advice(*ways),
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
    values = map(codes.get, cells, itertools.repeat(default))
    return np.fromiter(values, dtype, len(cells))


def quantile_edges(
    values: np.ndarray,
    bins: int = BINS,
) -> tuple[float, ...]:
    """Return the edges of at most so many bins.

    A value that fills a bin alone is an edge; the others share the edges that are left,
    at their quantiles.
    """
    present = values[~np.isnan(values)].astype(np.float64)
    distinct, counts = np.unique(present, return_counts=True)
    frequent = distinct[counts >= len(present) / bins][: bins - 1]
    rest = present[~np.isin(present, frequent)]
    edges = frequent
    if rest.size:
        shares = np.linspace(
            0,
            1,
            bins + 1 - len(frequent),
        )
        edges = np.append(frequent, np.quantile(rest, shares))

    # Both casts matter: quantiles are interpolated in float64, and edges must still
    # differ in float32.
    return tuple(np.unique(edges.astype(np.float32)).tolist())


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

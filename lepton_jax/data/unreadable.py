"""Errors for columns that look like numbers or dates, but can't be read as such."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from lepton_jax.data.csv_file import RawTable
from lepton_jax.data.notation import MOST_WORDS, Look
from lepton_jax.errors import DataError

EXAMPLES = 4  # cells that an error shows, at most

# A sentence, or (a setting that it needs, a sentence); see `RawTable.advice`.
Way = str | tuple[str, str]


class Fault(NamedTuple):
    """A column's fault: what is wrong, said of one of its cells, and what to do."""

    what: str
    ways: list[Way]


class Column(NamedTuple):
    """The words that the errors of one column have in common.

    Attributes:
      look: of the column.
      share: how many of its cells are faulty.
      examples: some of these.
      as_classes: how to keep its cells as classes or categories.
      left_out: how to leave the column out, if that can be done.
    """

    look: Look
    share: str
    examples: str
    as_classes: Way
    left_out: list[Way]


def not_read(
    raw: RawTable,
    name: str,
    look: Look,
    counts: Counter[str],
) -> DataError:
    """Return the error for a column that can't be read.

    Args:
      raw: the table.
      name: of the column.
      look: of the column: a fault.
      counts: its cells that are not missing, and how often each is there.
    """
    rows = sum(counts[cell] for cell in look.cells)
    percent = 100 * rows / counts.total()
    share = f"{rows} of the column's {counts.total()} cells ({percent:.0f} %)"
    examples = ", ".join(map(repr, look.cells[:EXAMPLES]))
    if len(look.cells) > EXAMPLES:
        examples += ", ..."

    is_label = name == raw.label
    as_classes = (
        "categorical",
        f"name {name!r} in `categorical` to keep each as a category",
    )
    left_out: list[Way] = [("ignore", "name it in `ignore` to leave the column out")]
    if is_label:
        as_classes = ("label_kind", "set `label_kind` to 'classes'")
        left_out = []

    column = Column(look, share, examples, as_classes, left_out)
    if look.kind == "mixed":
        fault = _mixed(column, is_label)
    else:
        fault = _FAULTS[look.kind](column)
    return raw.error(
        fault.what,
        name,
        look.cells,
        raw.advice(*fault.ways),
    )


def _ambiguous(column: Column) -> Fault:
    first = column.look.cells[0]
    mark = column.look.notation.thousands
    as_decimal = first.replace(mark, column.look.notation.decimal)
    as_thousands = first.replace(mark, "")
    return Fault(
        f"may be {as_decimal} with a decimal mark or {as_thousands} with thousands, and"
        f" nothing in the file tells which: so are {column.share}",
        [
            ("decimal", f"set `decimal` to {mark!r} for the one"),
            ("thousands", f"`thousands` to {mark!r} for the other"),
            f"write the numbers without {mark!r} as thousands",
            column.as_classes,
            *column.left_out,
        ],
    )


def _dates(column: Column) -> Fault:
    return Fault(
        f"is a date or a time, and so are {column.share}",
        [
            "write it as numbers (days since the first, the month, the weekday)",
            *column.left_out,
            column.as_classes,
        ],
    )


def _units(column: Column) -> Fault:
    around = column.look.notation.unit.replace("#", "")
    return Fault(
        f"is a number with {around!r}, and so are {column.share}",
        [
            f"write the numbers alone, without {around!r}",
            column.as_classes,
            *column.left_out,
        ],
    )


def _marks(column: Column) -> Fault:
    return Fault(
        "is a number, but not with the marks that `decimal` and `thousands` set;"
        f" so are {column.share}",
        ["leave the two out, or correct them", column.as_classes, *column.left_out],
    )


def _notations(column: Column) -> Fault:
    return Fault(
        f"is a number that is spelled otherwise than others of the column:"
        f" {column.share} are such, {column.examples}",
        [
            "write all numbers of the column in one way and one unit",
            column.as_classes,
            *column.left_out,
        ],
    )


def _mixed(column: Column, is_label: bool) -> Fault:
    ways: list[Way] = []
    if is_label:
        ways.append("write numbers, and leave rows without a label out")
    elif len(column.look.cells) <= MOST_WORDS:
        words = ", ".join(map(repr, column.look.cells))
        ways.append(("missing", f"add {words} to `missing` if no value is meant"))
        ways.append("write a number or nothing instead")
    return Fault(
        f"is no number, as most of the column's distinct cells are; {column.share} are"
        f" not: {column.examples}",
        [*ways, column.as_classes, *column.left_out],
    )


_FAULTS = {
    "ambiguous": _ambiguous,
    "dates": _dates,
    "units": _units,
    "marks": _marks,
    "notations": _notations,
}

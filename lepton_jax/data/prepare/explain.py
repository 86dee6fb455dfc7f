"""What happened to one row, step by step."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import polars as pl

from lepton_jax.data.prepare.pieces import collected, fit_columns
from lepton_jax.data.prepare.preparation import RESERVED, Checked, Preparation, check
from lepton_jax.data.prepare.prepared import Prepared
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.readers.reader import ROW, SOURCE, Piece, Reader
from lepton_jax.errors import DataError, nearest

LONGEST_CELL = 60  # characters that a cell is shown with
PLACE = re.compile(r"(.+):(\d+)")


@dataclasses.dataclass(frozen=True)
class Happening:
    """Effect of one step on the row.

    Attributes:
      step: its name; "read" for the reader.
      what: in words, a line for each note or change.
      row: the row after it; None: it is gone.
    """

    step: str
    what: tuple[str, ...]
    row: dict[str, Any] | None

    def __str__(self) -> str:
        return "\n".join(
            f"{self.step if number == 0 else '':<20} {line}"
            for number, line in enumerate(self.what)
        )


def explain(
    preparation: Preparation,
    prepared: Prepared,
    place: str,
) -> list[Happening]:
    """Replay a row through the steps.

    Args:
      preparation: that has made the folder.
      prepared: the folder.
      place: "SOURCE:ROW", the row counted from 0 in its source.

    Returns:
      A happening for reading, and for each step up to the one that dropped the row.

    Raises:
      DataError: there is no such source or row, or the folder was made by other steps.
    """
    checked = check(preparation)
    _check_same(checked, prepared)
    source, row = _place(checked, place)
    reader = checked.readers[source]
    piece = _piece_of(reader, row, preparation.piece_bytes, place)
    rows = reader.read(piece)

    number = pl.lit(
        source,
        dtype=pl.UInt32,
    ).alias(SOURCE)
    table = fit_columns(rows.table.with_columns(number), checked.raw)
    before = _row(table, row)
    if before is None:
        return [
            Happening(
                "read",
                _refused(rows.refused, row, place),
                None,
            )
        ]

    happenings = [Happening("read", _shown(before), before)]
    for one in prepared.steps:
        # A step may look at a row's neighbours, so that it gets all of them.
        table, notes = collected(
            one.step.run(table.lazy(), one.state),
        )
        after = _row(table, row)
        lines = [] if notes is None else _notes(notes, row, checked)
        lines += _changes(before, after)
        name = type(one.step).__name__
        happenings.append(
            Happening(name, tuple(lines or ["nothing"]), after),
        )
        if after is None:
            break
        before = after
    return happenings


def _check_same(checked: Checked, prepared: Prepared) -> None:
    """Raise DataError if the folder was made by other steps."""
    names = [entry["arguments"]["step"] for entry in prepared.manifest["steps"]]
    sources = [entry["name"] for entry in prepared.manifest["sources"]]
    own = [type(step).__name__ for step in checked.steps]
    if names != own or sources != list(checked.names):
        raise DataError(
            "the folder was prepared by another specification",
            where=prepared.folder,
            remedy="prepare again, then explain",
        )


def _place(
    checked: Checked,
    place: str,
) -> tuple[int, int]:
    match = PLACE.fullmatch(place)
    if match is None:
        raise DataError(
            f"{place!r} names no row",
            where="--explain",
            remedy="write SOURCE:ROW, such as people:17; rows are counted from 0",
        )
    name, row = match.groups()
    if name not in checked.names:
        raise DataError(
            f"there is no source {name!r}{nearest(name, checked.names)}",
            where="--explain",
            remedy=f"the sources are: {', '.join(checked.names)}",
        )
    return checked.names.index(name), int(row)


def _piece_of(
    reader: Reader,
    row: int,
    size: int,
    place: str,
) -> Piece:
    """Return the piece that a row is in."""
    before = [
        piece
        for piece in reader.pieces(
            size,
        )
        if piece.first_row <= row
    ]
    if not before:
        raise _no_row(place)
    return before[-1]


def _no_row(place: str) -> DataError:
    return DataError(
        f"there is no row {place}",
        where="--explain",
        remedy="rows are counted from 0, without the header; the manifest has their"
        " number",
    )


def _row(
    table: pl.DataFrame,
    row: int,
) -> dict[str, Any] | None:
    """Return one row of a table; None: it is not there."""
    found = table.filter(pl.col(ROW) == row)
    return found.row(0, named=True) if found.height else None


def _refused(
    refused: pl.DataFrame,
    row: int,
    place: str,
) -> tuple[str, ...]:
    notes = refused.filter(pl.col(ROW) == row)
    if not notes.height:
        raise _no_row(place)
    return tuple(
        f"DROPPED: {note['reason']}: {_cell(note['before'])}"
        for note in notes.iter_rows(named=True)
    )


def _notes(
    notes: pl.DataFrame,
    row: int,
    checked: Checked,
) -> list[str]:
    lines = []
    for note in notes.filter(
        pl.col(ROW) == row,
    ).iter_rows(named=True):
        if note["action"] == "changed":
            continue  # the change itself is shown
        partner = ""
        if note["partner_row"] is not None:
            source = note["partner_source"]
            name = checked.names[source] if source is not None else "the existing set"
            partner = f" as row {name}:{note['partner_row']}, which stays"
        column = "" if note["column"] is None else f" ({note['column']})"
        lines.append(f"{note['action'].upper()}: {note['reason']}{column}{partner}")
    return lines


def _shown(
    row: dict[str, Any],
) -> tuple[str, ...]:
    names = [name for name in row if not name.startswith(RESERVED)]
    return tuple(f"{name} = {_cell(row[name])}" for name in names)


def _changes(
    before: dict[str, Any],
    after: dict[str, Any] | None,
) -> list[str]:
    if after is None:
        return []
    lines = []
    for name, value in after.items():
        if name == SPLIT:
            if name not in before:
                lines.append(f"goes into the split {value!r}")
        elif name not in before:
            lines.append(f"{name} = {_cell(value)}")
        elif repr(before[name]) != repr(value):
            lines.append(f"{name}: {_cell(before[name])} -> {_cell(value)}")
    return [*lines, *(f"{name} is gone" for name in before if name not in after)]


def _cell(value: Any) -> str:
    if value is None:
        return "missing"
    text = repr(value)
    if len(text) <= LONGEST_CELL:
        return text
    return f"{text[: LONGEST_CELL - 3]}..."


def in_words(happenings: list[Happening], folder: Path) -> str:
    """Return happenings as text, with what became of the row."""
    last = happenings[-1]
    end = "the row is in the shards"
    if last.row is None:
        end = f"the row was dropped by {last.step}; see {folder / 'quarantine'}"
    return "\n".join(
        [*map(str, happenings), "", end],
    )

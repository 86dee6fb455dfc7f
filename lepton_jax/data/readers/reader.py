"""The protocol of a reader.

A reader divides its source into pieces: byte ranges of a text file that begin and end
between two rows, row groups of a Parquet file, entries of a folder, rows of a table in
memory. The pieces depend on the source and the piece's size alone, never on how many
workers read them. Each row keeps the number that it has in its source, so that any row
of a result can be traced back:

    ratings.csv (3 rows)       piece 0: bytes 12 to 40      SOURCE  ROW  user  rating
    user,rating                  read by any worker      ->      0    0     7     4.0
    7,4.0                                                        0    1     7     3.5
    7,3.5                      piece 1: bytes 40 to 46
    9,1.0                                                ->      0    2     9     1.0
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import polars as pl

# Columns that every table of rows has next to those of its source. A dot keeps them
# apart from names that people give.
SOURCE = "lepton.source"  # number of the source in its preparation, UInt32
ROW = "lepton.row"  # number of the row in its source, from 0, UInt64

# Columns of a table of notes. A note says what happened to one row, or to one of its
# cells, and why.
NOTES = pl.Schema(
    {
        SOURCE: pl.UInt32(),
        ROW: pl.UInt64(),
        "action": pl.String(),  # "dropped", "changed" or "flagged"
        "reason": pl.String(),
        "column": pl.String(),  # null: the whole row
        "before": pl.String(),  # the cell as it was; for an unreadable row its text
        "after": pl.String(),
        "partner_source": pl.UInt32(),  # of a duplicate: the row that stays
        "partner_row": pl.UInt64(),
    }
)


def no_notes() -> pl.LazyFrame:
    """Return a table of notes without rows."""
    return pl.LazyFrame(schema=NOTES)


@dataclass(frozen=True)
class Column:
    """What was inferred of a column.

    Attributes:
      name: its name; of a nameless one "column_1", counted from 1.
      type: Polars' type of its values.
      reason: why it has this type, in words for a person.
      against: number of cells that argue against it: those that became missing values
        although they are not words for a missing value. 0 if all fit.
      missing: number of missing cells; -1: not counted yet.
      examples: up to five of the cells that argue against the type.
    """

    name: str
    type: pl.DataType
    reason: str
    against: int = 0
    missing: int = -1
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """A part of a source that is read at once.

    Attributes:
      path: the file; "" for a table in memory.
      start: where it begins: bytes of a text file, row groups of a Parquet file,
        entries of a folder, rows of a table in memory.
      stop: where it ends, exclusive.
      first_row: number of its first row in the source.
      digest: hash of its content, hexadecimal: the same content has the same digest on
        any machine.
    """

    path: str
    start: int
    stop: int
    first_row: int
    digest: str


class Rows(NamedTuple):
    """The rows of a piece.

    Attributes:
      table: the reader's columns, in their order, then ROW (UInt64).
      refused: notes of the rows that could not be read ("dropped"), and of the cells
        that became missing as they argue against their column's type ("changed");
        SOURCE is null.
    """

    table: pl.DataFrame
    refused: pl.DataFrame


class Reader(ABC):
    """A source of rows.

    A reader can be pickled for a worker, and holds no open file.

    Attributes:
      name: what messages and manifests call it; a file's name, say.
    """

    name: str

    @abstractmethod
    def columns(self) -> Sequence[Column]:
        """Return what was inferred of the columns, in their order.

        Raises:
          DataError: the source can't be read, or what it means is a question.
        """

    @abstractmethod
    def pieces(self, size: int) -> Sequence[Piece]:
        """Divide the source.

        Args:
          size: bytes of the source that a piece has at most, as far as its rows allow.

        Raises:
          DataError: the source can't be divided: a file is damaged.
        """

    @abstractmethod
    def read(self, piece: Piece) -> Rows:
        """Read a piece.

        Raises:
          DataError: the content is no longer that of the piece's digest, or a row can't
            be read and the reader was not told to refuse such rows.
        """

"""Text files: a row is a line, or a whole file."""

from __future__ import annotations

import polars as pl

from lepton_jax.data.readers.counted import numbered
from lepton_jax.data.readers.dialect import LONGEST_ROW
from lepton_jax.data.readers.files import Stored
from lepton_jax.data.readers.lines import LinesReader
from lepton_jax.data.readers.notes import refused_rows
from lepton_jax.data.readers.reader import ROW, Column, Piece, Rows
from lepton_jax.data.readers.records import MARK, Refused
from lepton_jax.errors import DataError


class TextReader(LinesReader):
    """The lines of a text file, empty ones too, without their ends.

    Joined with newlines, the rows are the text again.

    Args:
      stored: the file, or the entry of an archive.
      encoding: Python's name of the codec; None: found out.
      longest_row: bytes that a line may have.
      bad_rows: "error", or "refuse" to leave lines out that are not of the encoding.
      file: name of the file for a column; None: no such column.
    """

    def __init__(
        self,
        stored: Stored,
        encoding: str | None = None,
        longest_row: int = LONGEST_ROW,
        bad_rows: str = "error",
        file: str | None = None,
    ):
        super().__init__(stored, encoding, longest_row)
        if bad_rows not in ("error", "refuse"):
            raise DataError(
                f"bad_rows is {bad_rows!r}",
                where="bad_rows",
                remedy="use 'error' or 'refuse'",
            )
        self.bad_rows = bad_rows
        self.file = file

    def columns(self) -> list[Column]:
        self.head()
        text = Column("text", pl.String(), "a row is a line", missing=0)
        if self.file is None:
            return [text]
        return [Column("file", pl.String(), "the file's name", missing=0), text]

    def rows_in(self, utf8: bytes) -> int:
        has_tail = utf8 != b"" and not utf8.endswith(b"\n")
        return utf8.count(b"\n") + has_tail

    def read(self, piece: Piece) -> Rows:
        utf8 = self.content(piece)
        lines = utf8.removesuffix(b"\n").split(b"\n")
        try:
            utf8.decode()
        except UnicodeDecodeError:
            return self._slowly(lines, piece)
        texts = [line.removesuffix(b"\r").decode() for line in lines]
        table = self._named(pl.DataFrame({"text": texts}))
        return numbered(table, piece.first_row)

    # ---- internals ----

    def _slowly(self, lines: list[bytes], piece: Piece) -> Rows:
        texts = []
        numbers = []
        refused = []
        for number, line in enumerate(lines):
            try:
                texts.append(line.removesuffix(b"\r").removeprefix(MARK).decode())
                numbers.append(piece.first_row + number)
            except UnicodeDecodeError as error:
                fault = f"byte {line[error.start]:#04x} is not UTF-8 text"
                bad = Refused(number, 0, line, fault)
                if self.bad_rows == "error":
                    raise self._bad_line(bad, piece) from error
                refused.append(bad)
        table = pl.DataFrame(
            {"text": texts, ROW: numbers},
            schema={"text": pl.String, ROW: pl.UInt64},
        )
        notes = refused_rows(refused, piece.first_row)
        return Rows(self._named(table), notes)

    def _named(self, table: pl.DataFrame) -> pl.DataFrame:
        """Return a table with the file's name in front, if there are several files."""
        if self.file is None:
            return table
        return table.select(pl.lit(self.file).alias("file"), pl.all())

    def _bad_line(self, refused: Refused, piece: Piece) -> DataError:
        line = self.line_before(piece.start) + refused.number + 1
        return DataError(
            refused.fault,
            where=f"{self.stored}, line {line}",
            remedy=(
                "set `encoding` (latin-1 or cp1252, perhaps), or bad_rows='refuse' to"
                " leave such lines out and count them"
            ),
        )

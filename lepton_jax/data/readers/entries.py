"""Folders and archives of files: a row is a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import polars as pl

from lepton_jax.data.readers.counted import CountedReader, numbered
from lepton_jax.data.readers.encoding import encoding_of
from lepton_jax.data.readers.files import Stored, digest
from lepton_jax.data.readers.notes import refused_rows
from lepton_jax.data.readers.reader import Column, Piece, Rows
from lepton_jax.data.readers.records import Refused
from lepton_jax.errors import DataError, nearest

# Names of the column of a table of labels that has the file's name. The first is that
# of Hugging Face's ImageFolder.
FILE_COLUMNS = ("file_name", "file", "filename", "path", "image")

LARGEST = 2**30  # bytes of one file that is a row; assumption


class Entry(NamedTuple):
    """A file that is a row.

    Attributes:
      stored: the file.
      path: its path below the folder or in the archive, with "/" between the parts.
      size: bytes.
    """

    stored: Stored
    path: str
    size: int


class FilesReader(CountedReader):
    """Files, one a row.

    Args:
      name: what messages call it.
      entries: the files, in their order.
      text: whether they are read as text rather than as bytes.
      table: more columns, a row for each file.
      encoding: of text; None: found out for each file.
      bad_rows: "error", or "refuse" to leave out files that can't be read.
    """

    def __init__(
        self,
        name: str,
        entries: Sequence[Entry],
        text: bool = False,
        table: pl.DataFrame | None = None,
        encoding: str | None = None,
        bad_rows: str = "error",
    ):
        if bad_rows not in ("error", "refuse"):
            raise DataError(
                f"bad_rows is {bad_rows!r}",
                where="bad_rows",
                remedy="use 'error' or 'refuse'",
            )
        self.name = name
        self.entries = list(entries)
        self.text = text
        self.table = labels_of(self.entries) if table is None else table
        self.encoding = encoding
        self.bad_rows = bad_rows

    def columns(self) -> list[Column]:
        content = pl.String() if self.text else pl.Binary()
        columns = [Column("path", pl.String(), "the file's name", missing=0)]
        for series in self.table:
            reason = "the folder that the file is in"
            if series.name != "label" or self.table.width > 1:
                reason = "of the table of labels"
            columns.append(
                Column(
                    series.name,
                    series.dtype,
                    reason,
                    missing=series.null_count(),
                )
            )
        name = "text" if self.text else "bytes"
        return [*columns, Column(name, content, "the file's content", missing=0)]

    def count(self) -> int:
        return len(self.entries)

    def pieces(self, size: int) -> list[Piece]:
        pieces = []
        start = 0
        while start < len(self.entries):
            stop = start + 1
            total = self.entries[start].size
            while stop < len(self.entries):
                total += self.entries[stop].size
                if total > size:
                    break
                stop += 1
            contents = [self._content(entry) for entry in self.entries[start:stop]]
            hashed = self._digest(start, stop, contents)
            pieces.append(Piece("", start, stop, start, hashed))
            start = stop
        return pieces

    def read(self, piece: Piece) -> Rows:
        entries = self.entries[piece.start : piece.stop]
        contents = [self._content(entry) for entry in entries]
        if self._digest(piece.start, piece.stop, contents) != piece.digest:
            raise DataError(
                "a file changed after the source was divided",
                where=f"{self.name}, {entries[0].path} to {entries[-1].path}",
                remedy="read a copy that nobody writes to, or start again",
            )
        paths = pl.Series("path", [entry.path for entry in entries])
        labels = self.table[piece.start : piece.stop]
        if not self.text:
            values = pl.Series("bytes", contents, dtype=pl.Binary)
            table = pl.DataFrame([paths, *labels, values])
            return numbered(table, piece.first_row)

        texts, refused = self._texts(entries, contents)
        values = pl.Series("text", texts, dtype=pl.String)
        table = pl.DataFrame([paths, *labels, values])
        rows = numbered(table, piece.first_row)
        kept = rows.table.filter(pl.col("text").is_not_null())
        return Rows(kept, refused_rows(refused, piece.first_row))

    # ---- internals ----

    def _content(self, entry: Entry) -> bytes:
        return entry.stored.whole(LARGEST)

    def _digest(
        self,
        start: int,
        stop: int,
        contents: list[bytes],
    ) -> str:
        parts = [repr(self.table[start:stop].rows()).encode()]
        for entry, content in zip(self.entries[start:stop], contents, strict=True):
            parts += [entry.path.encode(), len(content).to_bytes(8, "little"), content]
        return digest(*parts)

    def _texts(
        self,
        entries: list[Entry],
        contents: list[bytes],
    ) -> tuple[list[str | None], list[Refused]]:
        texts: list[str | None] = []
        refused = []
        for number, content in enumerate(contents):
            where = entries[number].stored
            encoding = encoding_of(content, self.encoding, where)
            try:
                text = content[encoding.mark :].decode(encoding.name)
                texts.append(text.replace("\r\n", "\n"))
            except UnicodeDecodeError as error:
                fault = f"byte {content[error.start]:#04x} is not {encoding.name} text"
                if self.bad_rows == "error":
                    raise DataError(
                        fault,
                        where=where,
                        remedy=(
                            "set `encoding`, or bad_rows='refuse' to leave such files"
                            " out and count them"
                        ),
                    ) from error
                refused.append(Refused(number, 0, content, fault))
                texts.append(None)
        return texts, refused


def entries_below(files: Sequence[Stored], folder: str) -> list[Entry]:
    """Return files as rows, named by their place below a folder."""
    entries = []
    for file in files:
        if file.entry:
            path = file.entry.removeprefix("./")
            size = file.size
        else:
            path = file.path
            if folder:
                path = os.path.relpath(file.path, folder)
            path = path.replace(os.sep, "/")
            size = file.stamp().size
        entries.append(Entry(file, path, size))
    return entries


def labels_of(entries: Sequence[Entry]) -> pl.DataFrame:
    """Return the column "label": the folders of files, if they are in several."""
    folders = [PurePosixPath(entry.path).parent.name for entry in entries]
    if len(set(folders)) < 2:
        return pl.DataFrame()
    return pl.DataFrame({"label": folders})


def labelled(
    entries: Sequence[Entry],
    table: pl.DataFrame,
    column: str | None,
    where: Any,
) -> tuple[list[Entry], pl.DataFrame]:
    """Return the files of a table of labels, and its other columns.

    Args:
      entries: all files.
      table: has the names of files in one column.
      column: its name; None: found out.
      where: the table, for messages.

    Raises:
      DataError: a file of the table is not there, or is there twice.
    """
    if column is None:
        column = next((name for name in FILE_COLUMNS if name in table.columns), None)
    if column is None or column not in table.columns:
        near = nearest(column or "file", table.columns)
        raise DataError(
            f"the table of labels has no column {column or FILE_COLUMNS[0]!r} with the"
            f" files' names{near}",
            where=where,
            remedy=f"set `file_column` to one of {', '.join(table.columns)}",
        )
    by_path = _by_path(entries)
    chosen = []
    for row, name in enumerate(table[column].to_list()):
        entry = by_path.get(str(name))
        if entry is None:
            raise DataError(
                f"there is no file {name!r}{nearest(str(name), list(by_path)[:1000])}",
                where=f"{where}, row {row}, column {column!r}",
                remedy="put the file into the folder, or take the row out",
            )
        chosen.append(entry)
    return chosen, table.drop(column)


def _by_path(entries: Sequence[Entry]) -> dict[str, Entry]:
    """Return files by their paths, and by their names where these differ."""
    by_path = {entry.path: entry for entry in entries}
    names: dict[str, list[Entry]] = {}
    for entry in entries:
        path = PurePosixPath(entry.path)
        for name in (path.name, path.stem):
            names.setdefault(name, []).append(entry)
    for name, found in names.items():
        if len(found) == 1:
            by_path.setdefault(name, found[0])
    return by_path

"""Files of one array each, and several of them as the columns of a table.

The rows run along the first dim. A row of an array of more dims is an array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import polars as pl

from lepton_jax.data.readers.counted import CountedReader, check_names, numbered
from lepton_jax.data.readers.files import Stored, digest
from lepton_jax.data.readers.memory import column_of
from lepton_jax.data.readers.reader import Column, Piece, Rows
from lepton_jax.errors import DataError


class ArrayFile(NamedTuple):
    """An array in a file, row after row.

    Attributes:
      stored: the file.
      dtype: of its values, in the file's byte order.
      shape: of the array, rows first.
      offset: of its first value, bytes.
    """

    stored: Stored
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def content(self, start: int, stop: int) -> bytes:
        """Return the bytes of some rows.

        Raises:
          DataError: the file is cut short.
        """
        length = (stop - start) * self.row_bytes
        data = self.stored.read(self.offset + start * self.row_bytes, length)
        if len(data) < length:
            raise self.error(
                f"the file is cut short: expected {self.shape[0]:,} rows of"
                f" {self.row_bytes:,} bytes"
            )
        return data

    def check_end(self) -> None:
        """Check that the file ends with the array.

        Raises:
          DataError: it does not.
        """
        end = self.offset + self.shape[0] * self.row_bytes
        if self.stored.read(end, 1):
            raise self.error("the array is followed by other bytes")

    def error(self, what: str) -> DataError:
        """Return an error about the file."""
        return DataError(
            what,
            where=self.stored,
            remedy="get the file again: it is damaged, or not what its name says",
        )


class ArrayFilesReader(CountedReader):
    """Arrays in files as the columns of a table.

    Args:
      name: what messages call it.
      files: the arrays by the names of their columns.
      part: of the data set that they are, such as "train"; None: no such column.
    """

    def __init__(
        self,
        name: str,
        files: Mapping[str, ArrayFile],
        part: str | None = None,
    ):
        check_names(files, name)
        self.name = name
        self.files = dict(files)
        self.part = part
        first = next(iter(self.files.values()))
        self.stored = first.stored
        for column, file in self.files.items():
            if file.shape[0] != first.shape[0]:
                raise DataError(
                    f"{column!r} has {file.shape[0]:,} rows, but {first.shape[0]:,} are"
                    f" in {first.stored}",
                    where=file.stored,
                    remedy="give the files of one data set",
                )

    def columns(self) -> list[Column]:
        empty = self._table(0, dict.fromkeys(self.files, b""))
        return [
            Column(series.name, series.dtype, "the file's own type", missing=0)
            for series in empty
        ]

    def count(self) -> int:
        return next(iter(self.files.values())).shape[0]

    def pieces(self, size: int) -> list[Piece]:
        row_bytes = sum(file.row_bytes for file in self.files.values())
        step = max(1, size // max(1, row_bytes))
        pieces = []
        for start in range(0, self.count(), step):
            stop = min(start + step, self.count())
            hashed = self._digest(self._contents(start, stop))
            pieces.append(Piece(str(self.stored), start, stop, start, hashed))
        for file in self.files.values():
            file.check_end()
        return pieces

    def read(self, piece: Piece) -> Rows:
        contents = self._contents(piece.start, piece.stop)
        if self._digest(contents) != piece.digest:
            raise DataError(
                "the file changed after it was divided",
                where=self.stored,
                remedy="read a copy that nobody writes to, or start again",
            )
        table = self._table(piece.stop - piece.start, contents)
        return numbered(table, piece.first_row)

    # ---- internals ----

    def _contents(self, start: int, stop: int) -> dict[str, bytes]:
        return {name: file.content(start, stop) for name, file in self.files.items()}

    def _digest(self, contents: Mapping[str, bytes]) -> str:
        parts: list[bytes] = [(self.part or "").encode()]
        for name, content in contents.items():
            file = self.files[name]
            head = f"{name} {file.dtype.str} {file.shape[1:]}"
            parts += [head.encode(), content]
        return digest(*parts)

    def _table(self, rows: int, contents: Mapping[str, bytes]) -> pl.DataFrame:
        columns = {}
        for name, content in contents.items():
            file = self.files[name]
            array = np.frombuffer(content, file.dtype)
            array = array.reshape(rows, *file.shape[1:])
            columns[name] = column_of(array, str(file.stored))
        if self.part is not None:
            columns["part"] = pl.Series([self.part] * rows, dtype=pl.String)
        return pl.DataFrame(columns)

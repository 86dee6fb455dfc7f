"""Arrow IPC files and streams, Feather among them: pieces are record batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import polars as pl

from lepton_jax.data.extras import needs
from lepton_jax.data.readers.counted import (
    CountedReader,
    check_names,
    numbered,
    table_digest,
)
from lepton_jax.data.readers.files import Stored
from lepton_jax.data.readers.memory import plain_types
from lepton_jax.data.readers.reader import Column, Piece, Rows
from lepton_jax.errors import DataError, first_line

MAGIC = b"ARROW1"
STREAM = b"\xff\xff\xff\xff"  # the marker that each message of a stream begins with
MOST_BATCHES = 2**62
LARGEST = 2**36  # bytes of a file in an archive, or packed; assumption


class ArrowReader(CountedReader):
    """An Arrow IPC file or stream.

    Args:
      stored: the file, or the entry of an archive.
    """

    def __init__(self, stored: Stored):
        self.name = stored.name
        self.stored = stored

    def columns(self) -> list[Column]:
        with self._opened() as file:
            empty = self._frame(file.schema.empty_table())
        check_names(empty.columns, self.stored)
        return [
            Column(name, type_, "the file's own type")
            for name, type_ in empty.schema.items()
        ]

    def count(self) -> int:
        with self._opened() as file:
            return sum(table.height for table in self._tables(file))

    def pieces(
        self,
        size: int,
    ) -> list[Piece]:
        pieces: list[Piece] = []
        parts: list[pl.DataFrame] = []
        row = 0
        first = 0
        with self._opened() as file:
            for number, table in enumerate(self._tables(file)):
                total = sum(part.estimated_size() for part in (*parts, table))
                if parts and total > size:
                    pieces.append(
                        self._piece(
                            first,
                            number,
                            row,
                            parts,
                        )
                    )
                    row += sum(part.height for part in parts)
                    first = number
                    parts = []
                parts.append(table)
        if parts:
            pieces.append(
                self._piece(
                    first,
                    first + len(parts),
                    row,
                    parts,
                )
            )
        return pieces

    def read(self, piece: Piece) -> Rows:
        with self._opened() as file:
            parts = list(
                self._tables(
                    file,
                    piece.start,
                    piece.stop,
                )
            )
        if not parts or table_digest(pl.concat(parts)) != piece.digest:
            raise DataError(
                "the file changed after it was divided",
                where=self.stored,
                remedy="read a copy that nobody writes to, or start again",
            )
        return numbered(pl.concat(parts), piece.first_row)

    # ---- internals ----

    def _piece(
        self,
        start: int,
        stop: int,
        row: int,
        parts: list[pl.DataFrame],
    ) -> Piece:
        hashed = table_digest(pl.concat(parts))
        return Piece(
            str(self.stored),
            start,
            stop,
            row,
            hashed,
        )

    def _opened(self) -> Any:
        arrow = needs("pyarrow", extra="data", purpose="reading Arrow files")
        ipc = needs("pyarrow.ipc", extra="data", purpose="reading Arrow files")
        first = self.stored.read(
            0,
            len(MAGIC),
        )
        is_plain = not self.stored.entry and _is_plain(
            self.stored,
            first,
        )
        try:
            if is_plain:
                # Not mapped into memory: a file that shrinks would kill the process.
                source = arrow.OSFile(self.stored.path)
            else:
                source = arrow.BufferReader(self.stored.whole(LARGEST))
            if first.startswith(MAGIC):
                return ipc.open_file(source)
            return ipc.open_stream(source)
        except (arrow.ArrowException, OSError, ValueError) as error:
            raise self._damaged(error) from error

    def _tables(
        self,
        file: Any,
        start: int = 0,
        stop: int = MOST_BATCHES,
    ) -> Iterator[pl.DataFrame]:
        """Yield record batches as tables."""
        try:
            for batch in itertools.islice(
                _batches(file, start),
                stop - start,
            ):
                batch.validate(full=True)
                yield self._frame(batch)
        except DataError:
            raise
        except Exception as error:
            raise self._damaged(error) from error

    def _frame(self, arrow: Any) -> pl.DataFrame:
        frame = pl.from_arrow(arrow)
        assert isinstance(frame, pl.DataFrame)
        return plain_types(frame)

    def _damaged(self, error: Exception) -> DataError:
        message = first_line(error)
        return DataError(
            f"the Arrow file can't be read: {message}",
            where=self.stored,
            remedy="get the file again: it is cut short or damaged",
        )


def _batches(
    file: Any,
    start: int,
) -> Iterator[Any]:
    """Yield record batches from number `start` on."""
    if hasattr(file, "num_record_batches"):
        for number in range(start, file.num_record_batches):
            yield file.get_batch(number)
        return
    yield from itertools.islice(file, start, None)


def _is_plain(stored: Stored, first: bytes) -> bool:
    """Whether a file is not packed."""
    with open(stored.path, "rb") as file:
        return file.read(len(first)) == first

"""Parquet files: pieces are row groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import polars as pl

from lepton_jax.data.extras import needs
from lepton_jax.data.readers.counted import CountedReader, check_names, numbered
from lepton_jax.data.readers.files import Stamp, Stored, digest
from lepton_jax.data.readers.memory import plain_types
from lepton_jax.data.readers.reader import Column, Piece, Rows
from lepton_jax.errors import DataError, first_line


class Group(NamedTuple):
    """A row group.

    Attributes:
      rows: that it has.
      start: its first byte in the file.
      stop: the byte after its last one.
    """

    rows: int
    start: int
    stop: int


class ParquetReader(CountedReader):
    """A Parquet file.

    Args:
      stored: the file, or the entry of an archive.
    """

    def __init__(self, stored: Stored):
        self.name = stored.name
        self.stored = stored
        self._stamp: Stamp | None = None
        self._groups: list[Group] = []
        self._columns: list[Column] = []

    def columns(self) -> list[Column]:
        self._look()
        return self._columns

    def count(self) -> int:
        self._look()
        return sum(group.rows for group in self._groups)

    def pieces(
        self,
        size: int,
    ) -> list[Piece]:
        self._look()
        pieces = []
        first = 0
        row = 0
        while first < len(self._groups):
            last = first + 1
            while (
                last < len(self._groups)
                and self._bytes(
                    first,
                    last + 1,
                )
                <= size
            ):
                last += 1
            pieces.append(
                Piece(
                    str(self.stored),
                    first,
                    last,
                    row,
                    self._digest(first, last),
                )
            )
            row += sum(group.rows for group in self._groups[first:last])
            first = last
        return pieces

    def read(self, piece: Piece) -> Rows:
        self._look()
        assert self._stamp is not None
        is_sure = self._stamp.is_sure(self.stored.stamp())
        if (
            not is_sure
            and self._digest(
                piece.start,
                piece.stop,
            )
            != piece.digest
        ):
            raise DataError(
                "the file changed after it was divided",
                where=self.stored,
                remedy="read a copy that nobody writes to, or start again",
            )
        table = self._directly(piece)
        if table is None:
            table = self._by_arrow(piece)
        return numbered(table, piece.first_row)

    # ---- internals ----

    def _directly(self, piece: Piece) -> pl.DataFrame | None:
        """Read a piece with Polars, which takes a third of Arrow's time.

        None: the file is in an archive, or Polars would read other types.
        """
        if self.stored.entry:
            return None
        # its first row in this file, which may be one of several
        first = sum(group.rows for group in self._groups[: piece.start])
        rows = sum(group.rows for group in self._groups[piece.start : piece.stop])
        try:
            lazy = pl.scan_parquet(self.stored.path, glob=False).slice(first, rows)
            table = plain_types(lazy.collect(engine="in-memory"))
        except Exception as error:
            raise self._damaged(error) from error
        types = {column.name: column.type for column in self._columns}
        return table if dict(table.schema) == types else None

    def _by_arrow(self, piece: Piece) -> pl.DataFrame:
        file = self._open()
        try:
            groups = list(
                range(
                    piece.start,
                    piece.stop,
                )
            )
            arrow = file.read_row_groups(groups, use_threads=True)
            return plain_types(_as_frame(arrow))
        except Exception as error:
            raise self._damaged(error) from error
        finally:
            file.close()

    def _bytes(
        self,
        first: int,
        last: int,
    ) -> int:
        return self._groups[last - 1].stop - self._groups[first].start

    def _digest(
        self,
        first: int,
        last: int,
    ) -> str:
        start = self._groups[first].start
        data = self.stored.read(
            start,
            self._bytes(first, last),
        )
        names = ",".join(f"{each.name}:{each.type}" for each in self._columns)
        return digest(names.encode(), data)

    def _open(self) -> Any:
        parquet = needs(
            "pyarrow.parquet",
            extra="data",
            purpose="reading Parquet files",
        )
        source: Any = self.stored.path
        self.stored.stamp()
        if self.stored.entry:
            arrow = needs("pyarrow", extra="data", purpose="reading Parquet files")
            source = arrow.BufferReader(b"".join(self.stored.blocks()))
        try:
            return parquet.ParquetFile(source)
        except Exception as error:
            raise self._damaged(error) from error

    def _look(self) -> None:
        """Read the file's metadata once."""
        if self._stamp is not None:
            return
        stamp = self.stored.stamp()
        file = self._open()
        try:
            self._groups = [
                _group(file.metadata.row_group(i))
                for i in range(file.metadata.num_row_groups)
            ]
            empty = plain_types(_as_frame(file.schema_arrow.empty_table()))
            self._columns = _columns(file.metadata, empty.schema)
        except Exception as error:
            raise self._damaged(error) from error
        finally:
            file.close()
        check_names(empty.columns, self.stored)
        self._stamp = stamp

    def _damaged(self, error: Exception) -> DataError:
        if isinstance(error, DataError):
            return error
        message = first_line(error)
        return DataError(
            f"the Parquet file can't be read: {message}",
            where=self.stored,
            remedy="get the file again: it is cut short or damaged",
        )


def _as_frame(arrow: Any) -> pl.DataFrame:
    frame = pl.from_arrow(arrow)
    assert isinstance(frame, pl.DataFrame)
    return frame


def _group(metadata: Any) -> Group:
    starts = []
    stops = []
    for i in range(metadata.num_columns):
        column = metadata.column(i)
        start = column.data_page_offset
        if column.dictionary_page_offset:
            start = min(start, column.dictionary_page_offset)
        starts.append(start)
        stops.append(start + column.total_compressed_size)
    return Group(
        metadata.num_rows,
        min(starts, default=0),
        max(stops, default=0),
    )


def _columns(
    metadata: Any,
    schema: pl.Schema,
) -> list[Column]:
    missing = dict.fromkeys(schema, 0)
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        for j in range(metadata.num_columns):
            column = group.column(j)
            name = column.path_in_schema
            statistics = column.statistics
            if name not in missing or missing[name] < 0:
                continue
            if statistics is None or not statistics.has_null_count:
                missing[name] = -1
            else:
                missing[name] += statistics.null_count
    flat = {metadata.schema.column(j).path for j in range(metadata.num_columns)}
    return [
        Column(
            name,
            type_,
            "the file's own type",
            missing=missing[name] if name in flat else -1,
        )
        for name, type_ in schema.items()
    ]

"""Files of shards: what is in them, and how a part of them is read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lepton_jax.data.columns import Leaf, Ragged, leaf_of
from lepton_jax.data.extras import needs
from lepton_jax.errors import DataError, first_line

# The one column of an ArrayRecord file: its records as bytes.
RECORD = "record"

# Bytes of the records of an ArrayRecord file that are read together, and the most of
# them. Assumption: enough that opening the file costs little, few enough that a window
# has many groups.
GROUP_BYTES = 2**20
MOST_RECORDS = 1024

PARQUET = ".parquet"
SUFFIXES = (PARQUET, ".arrayrecord", ".array_record")  # of the files' names

PURPOSE = "reading shards"


class ShardFile(Protocol):
    """A file of shards.

    Attributes:
      path: of the file.
      names: of its columns.
      sizes: rows of each of its row groups.
      bytes: of all of them in memory, about.
    """

    path: Path
    names: list[str]
    sizes: list[int]
    bytes: int

    def read(
        self,
        path: Path,
        group: int,
        columns: Sequence[str],
    ) -> Mapping[str, Leaf]:
        """Read some columns of a row group.

        Args:
          path: where the file is now: perhaps a copy.
          group: its number.
          columns: their names.
        """


class ParquetShard:
    """A Parquet file.

    Its footer is read once; no file stays open, however many there are.
    """

    def __init__(self, path: Path):
        parquet = needs("pyarrow.parquet", extra="data", purpose=PURPOSE)
        arrow = needs("pyarrow", extra="data", purpose=PURPOSE)
        self.path = path
        try:
            self._footer = parquet.read_metadata(path)
        except (OSError, arrow.ArrowException) as error:
            raise _unreadable(path, error) from error
        self.names = list(self._footer.schema.to_arrow_schema().names)
        groups = range(self._footer.num_row_groups)
        rows = [self._footer.row_group(i) for i in groups]
        self.sizes = [group.num_rows for group in rows]
        self.bytes = sum(group.total_byte_size for group in rows)

    def read(
        self,
        path: Path,
        group: int,
        columns: Sequence[str],
    ) -> Mapping[str, Leaf]:
        parquet = needs("pyarrow.parquet", extra="data", purpose=PURPOSE)
        arrow = needs("pyarrow", extra="data", purpose=PURPOSE)
        where = f"{self.path}, row group {group}"
        try:
            with parquet.ParquetFile(path, metadata=self._footer) as file:
                table = file.read_row_group(
                    group,
                    columns=list(columns),
                    use_threads=False,
                )
        except FileNotFoundError:
            raise
        except (OSError, arrow.ArrowException) as error:
            raise _unreadable(where, error) from error
        return {name: leaf_of(table[name], name, where) for name in columns}


class ArrayRecordShard:
    """An ArrayRecord file.

    Args:
      path: of the file.
      is_packed: whether its records are MessagePack maps from column to value, as
        preparation writes them; else they are the bytes of one column, `record`.
    """

    def __init__(
        self,
        path: Path,
        is_packed: bool,
    ):
        self.path = path
        self._is_packed = is_packed
        reader = _open_records(path)
        try:
            rows = reader.num_records()
            first = reader.read(0, 1)[0] if rows else None
        finally:
            reader.close()
        self.names = [RECORD]
        if is_packed:
            self.names = list(_unpacked(first, path)) if first else []
        self.bytes = path.stat().st_size
        mean = max(1, self.bytes // max(1, rows))
        self._together = min(MOST_RECORDS, max(1, GROUP_BYTES // mean))
        full, left = divmod(rows, self._together)
        self.sizes = [self._together] * full + [left] * bool(left)

    def read(
        self,
        path: Path,
        group: int,
        columns: Sequence[str],
    ) -> Mapping[str, Leaf]:
        first = group * self._together
        where = f"{self.path}, record {first}"
        reader = _open_records(path)
        try:
            records = reader.read(first, first + self.sizes[group])
        except (RuntimeError, ValueError) as error:
            raise _unreadable(where, error) from error
        finally:
            reader.close()
        if not self._is_packed:
            return {RECORD: _of_bytes(records)}
        rows = [_unpacked(record, where) for record in records]
        arrow = needs("pyarrow", extra="data", purpose=PURPOSE)
        table = arrow.Table.from_pylist([{n: row[n] for n in columns} for row in rows])
        return {name: leaf_of(table[name], name, where) for name in columns}


def _of_bytes(records: Sequence[bytes]) -> Ragged:
    ends = np.cumsum([0, *map(len, records)])
    return Ragged(np.frombuffer(b"".join(records), np.uint8), ends)


def _unpacked(
    record: bytes,
    where: object,
) -> dict[str, Any]:
    """Return the values of a record by column."""
    msgpack = needs("msgpack", extra="data", purpose=PURPOSE)
    try:
        return msgpack.unpackb(record, timestamp=3)
    except ValueError as error:
        raise _unreadable(where, error) from error


def open_shard(
    path: Path,
    is_packed: bool,
) -> ShardFile:
    """Open a file of shards by its name's end.

    Args:
      path: of the file.
      is_packed: whether records of an ArrayRecord file are maps; see there.

    Raises:
      DataError: it can't be read.
    """
    if path.suffix == PARQUET:
        return ParquetShard(path)
    return ArrayRecordShard(path, is_packed)


# The library fails when two threads open files at the same time for the first time.
_OPENING = threading.Lock()


def _open_records(path: Path) -> Any:
    module = needs(
        "array_record.python.array_record_module",
        extra="data",
        purpose="reading ArrayRecord shards",
    )
    if not path.is_file():
        raise FileNotFoundError(path)
    try:
        with _OPENING:
            # without read-ahead of its own: the threads of the feed read ahead
            return module.ArrayRecordReader(
                str(path), options="readahead_buffer_size:0"
            )
    except (RuntimeError, ValueError) as error:
        raise _unreadable(path, error) from error


def _unreadable(
    where: object,
    error: Exception,
) -> DataError:
    message = first_line(error)
    return DataError(
        f"the shard can't be read: {message}",
        where=where,
        remedy="prepare the data again, or restore the file from a copy",
    )

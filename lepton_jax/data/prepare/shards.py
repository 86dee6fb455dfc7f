"""Shards: the samples of one piece and one split, in one file.

A shard's bytes depend on its rows alone: there is no date in it, and it is written by
one thread in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgpack
import polars as pl

from lepton_jax.data.extras import needs
from lepton_jax.data.prepare.statistics import statistics
from lepton_jax.data.prepare.step import SPLIT
from lepton_jax.data.prepare.store import checksum, replacing
from lepton_jax.data.readers.reader import ROW, SOURCE
from lepton_jax.errors import DataError

FOLDER = "shards"
ONLY_SPLIT = "train"  # where no step splits the rows
# Rows and bytes that a reader of a Parquet shard has in memory at once, at most. The
# feed shuffles the groups of a window of 64 MiB (data/indexed.py), so a window of wide
# rows, such as pictures, must have many groups, too. Assumption: 16 are enough.
GROUP_ROWS = 2**16
GROUP_BYTES = 4 * 2**20
NUMBER_BYTES = 8  # of a cell of fixed width, at most
SUFFIXES = {"parquet": "parquet", "arrayrecord": "array_record"}


def write_shards(
    folder: Path,
    name: str,
    table: pl.DataFrame,
    outputs: Sequence[str],
    output: str,
) -> list[dict[str, Any]]:
    """Write the rows of a piece, a file for each split.

    Args:
      folder: of the preparation.
      name: of the piece.
      table: rows after all steps.
      outputs: columns that are written, after SOURCE and ROW.
      output: "parquet" or "arrayrecord".

    Returns:
      Split, path, rows, bytes, checksum and statistics of each shard.

    Raises:
      DataError: a row is in no split, or a split's name can't be that of a folder.
    """
    columns = [SOURCE, ROW, *outputs]
    shards = []
    for split in splits_of(table):
        rows = table
        if SPLIT in table.columns:
            rows = table.filter(pl.col(SPLIT) == split)
        rows = rows.select(columns).rechunk()
        path = Path(FOLDER) / split / f"{name}.{SUFFIXES[output]}"
        with replacing(folder / path) as draft:
            WRITERS[output](draft, rows)
            size = draft.stat().st_size
            digest = checksum(draft)
        shards.append(
            {
                "split": split,
                "path": path.as_posix(),
                "rows": rows.height,
                "bytes": size,
                "sha256": digest,
                "statistics": statistics(rows.select(outputs)),
            }
        )
    return shards


def splits_of(table: pl.DataFrame) -> list[str]:
    """Return the names of a table's splits, in their order.

    Raises:
      DataError: see `write_shards`.
    """
    if SPLIT not in table.columns:
        return [ONLY_SPLIT] if table.height else []
    names = table[SPLIT].unique().sort().to_list()
    for name in names:
        if (
            name is None
            or not name.replace(
                "_",
                "",
            )
            .replace("-", "")
            .isalnum()
        ):
            raise DataError(
                f"a row is in the split {name!r}",
                where=SPLIT,
                remedy=(
                    "give each row a split whose name has letters, digits, '_' and '-'"
                ),
            )
    return names


def read_shard(
    path: Path,
    schema: pl.Schema,
) -> pl.DataFrame:
    """Read a shard, of either format.

    Args:
      path: the file.
      schema: its columns.
    """
    if path.suffix == ".parquet":
        return pl.read_parquet(path)
    module = needs("array_record.python.array_record_module", **NEEDED)
    reader = module.ArrayRecordReader(str(path))
    records = reader.read_all() if reader.num_records() else []
    reader.close()
    rows = [
        msgpack.unpackb(
            record,
            timestamp=3,
        )
        for record in records
    ]
    return pl.DataFrame(
        rows,
        schema=_stored(schema),
        orient="row",
    ).cast(schema)


def _stored(schema: pl.Schema) -> dict[str, Any]:
    """Return the types that a record's values have."""
    physical = pl.DataFrame(schema=schema).select(
        _plain(schema),
    )
    return dict(physical.schema)


def _plain(schema: pl.Schema) -> list[pl.Expr]:
    """Return each column as values that a record can hold."""
    return [
        pl.col(
            name,
        ).to_physical()
        if kind.is_temporal()
        else pl.col(name)
        for name, kind in schema.items()
    ]


NEEDED: dict[str, Any] = {"extra": "data", "purpose": "an ArrayRecord shard"}


def _write_parquet(path: Path, rows: pl.DataFrame) -> None:
    rows.write_parquet(
        path,
        compression="zstd",
        row_group_size=_rows_of_a_group(rows),
    )


def _rows_of_a_group(rows: pl.DataFrame) -> int:
    """Return how many rows a group has: by their content, not by how it is held."""
    total = sum(_bytes_of(column) for column in rows)
    fitting = GROUP_BYTES * rows.height // max(1, total)
    return max(1, min(GROUP_ROWS, fitting))


def _bytes_of(column: pl.Series) -> int:
    """Return the bytes of a column's cells, about."""
    if column.dtype == pl.Binary:
        return int(column.bin.size().sum())
    if column.dtype == pl.String:
        return int(column.str.len_bytes().sum())
    if isinstance(column.dtype, pl.List):
        return NUMBER_BYTES * int(column.list.len().sum())
    if isinstance(column.dtype, pl.Array):
        return NUMBER_BYTES * len(column) * column.dtype.size
    return NUMBER_BYTES * len(column)


def _write_records(path: Path, rows: pl.DataFrame) -> None:
    """Write each row as one record: a MessagePack map of column and value."""
    module = needs("array_record.python.array_record_module", **NEEDED)
    options = "group_size:1,zstd:3,max_parallelism:1"
    writer = module.ArrayRecordWriter(str(path), options)
    for row in rows.select(
        _plain(rows.schema),
    ).iter_rows(named=True):
        writer.write(msgpack.packb(row))
    writer.close()


WRITERS: dict[str, Callable[[Path, pl.DataFrame], None]] = {
    "parquet": _write_parquet,
    "arrayrecord": _write_records,
}

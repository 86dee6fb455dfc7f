"""Pipelines of Grain's for `tools.bench data`, and the files that both sides read.

Each is `grain.MapDataset`, shuffled globally, decoded, batched and put on the device,
as Grain's own documentation builds one. Threads, read-ahead and worker processes are
options, of which the benchmark takes the best.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from absl import flags

GROUP_ROWS = 1024  # of Parquet shards


class Options(NamedTuple):
    """Options of a Grain pipeline.

    Attributes:
      threads: that read.
      ahead: elements that are read ahead, before they are batched.
      processes: that read; 0: none but this one.
      batched: whether threads make whole batches, rather than samples.
    """

    threads: int
    ahead: int
    processes: int
    batched: bool


CANDIDATES = (
    Options(16, 500, 0, False),  # Grain's defaults
    Options(2, 64, 0, False),
    Options(1, 4, 0, True),
    Options(2, 8, 0, True),
    Options(4, 16, 0, True),
    Options(1, 8, 1, True),
    Options(1, 8, 2, True),
)


def finished(
    data: grain.MapDataset,
    batch_size: int,
    options: Options,
) -> Any:
    """Return an iterator of a data set's batches on the device."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's processes ask for them
    read = grain.ReadOptions(
        num_threads=options.threads,
        prefetch_buffer_size=options.ahead,
    )
    if options.batched:
        batches = data.batch(batch_size).to_iter_dataset(read)
    else:
        batches = data.to_iter_dataset(read).batch(batch_size)
    if options.processes:
        workers = grain.MultiprocessingOptions(options.processes, 4)
        batches = batches.mp_prefetch(workers)
    return Closing(iter(batches))


class Closing:
    """An iterator that puts what another gives on the device."""

    def __init__(self, batches: Any):
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return jax.device_put(next(self.batches))

    def close(self) -> None:
        """Stop reading."""
        self.batches.close()


class Decode(grain.transforms.Map):
    """A JPEG file's pixels with its label."""

    def __init__(self, side: int):
        self.side = side

    def map(self, element: tuple[str, int]) -> tuple[np.ndarray, np.int32]:
        """Decode with Pillow, as small as the decoder can."""
        from PIL import Image

        file, label = element
        size = (self.side, self.side)
        with Image.open(io.BytesIO(Path(file).read_bytes())) as picture:
            picture.draft("RGB", size)
            pixels = picture.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        return np.asarray(pixels), np.int32(label)


class Record(grain.transforms.Map):
    """A record's pixels with its label, which is the last byte."""

    def map(self, element: bytes) -> tuple[np.ndarray, np.uint8]:
        """Look at the bytes without a copy."""
        row = np.frombuffer(element, np.uint8)
        return row[:-1], row[-1]


class Window(grain.transforms.Map):
    """A window's inputs with its targets."""

    def __init__(
        self,
        inputs: np.ndarray,
        targets: np.ndarray,
    ):
        self.inputs = inputs
        self.targets = targets

    def map(self, element: int) -> tuple[np.ndarray, np.ndarray]:
        """Look at a row of each."""
        return self.inputs[element], self.targets[element]


def jpegs(
    files: Sequence[Path],
    labels: Sequence[int],
    side: int,
    options: Options,
) -> Any:
    """Return batches of pictures."""
    pairs = list(zip(map(str, files), labels, strict=True))
    data = grain.MapDataset.source(pairs).shuffle(seed=0).repeat()
    return finished(data.map(Decode(side)), 32, options)


def records(
    file: Path,
    options: Options,
) -> Any:
    """Return batches of records in an ArrayRecord file."""
    source = grain.sources.ArrayRecordDataSource(str(file))
    data = grain.MapDataset.source(source).shuffle(seed=0).repeat()
    return finished(data.map(Record()), 128, options)


def windows(
    inputs: np.ndarray,
    targets: np.ndarray,
    options: Options,
) -> Any:
    """Return batches of windows in memory."""
    data = grain.MapDataset.range(len(inputs)).shuffle(seed=0).repeat()
    return finished(data.map(Window(inputs, targets)), 8, options)


def write_rows(
    work: Path,
    pixels: np.ndarray,
    labels: np.ndarray,
) -> None:
    """Write pictures as a folder of Parquet shards and as an ArrayRecord file."""
    import polars as pl
    from array_record.python.array_record_module import ArrayRecordWriter

    rows = pixels.reshape(len(pixels), -1)
    order = np.random.default_rng(0).permutation(len(rows))
    table = pl.DataFrame({"pixels": rows[order], "label": labels[order]})
    (work / "parquet").mkdir()
    table.write_parquet(work / "parquet" / "0.parquet", row_group_size=GROUP_ROWS)

    writer = ArrayRecordWriter(str(work / "mnist.arrayrecord"), "group_size:1")
    for row, label in zip(rows, labels, strict=True):
        writer.write(row.tobytes() + bytes([label]))
    writer.close()


def write_sources(
    folder: Path,
    count: int,
    rows: int,
    columns: int,
) -> None:
    """Write folders of Parquet shards that have some rows in all."""
    import polars as pl

    random = np.random.default_rng(0)
    for number, part in enumerate(np.array_split(np.arange(rows), count)):
        inner = folder / f"source{number}"
        inner.mkdir(parents=True)
        numbers = random.normal(size=(len(part), columns)).astype(np.float32)
        table = pl.DataFrame(numbers, schema=[f"x{i}" for i in range(columns)])
        table = table.with_columns(pl.Series("label", part % 10))
        table.write_parquet(inner / "0.parquet", row_group_size=GROUP_ROWS)

"""The kinds of data set that a person can give, behind one face.

This is the one place that asks of which kind a data set is. `settled` makes what a
person gave one of four kinds; each kind has a class here that says how long an epoch
is, gives a sample to take shapes from, and opens a feed.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np

from lepton_jax.data.arrays import Arrays, ArraysByPosition, Pair, from_any
from lepton_jax.data.feed import Feed, FeedSpec, PositionedFeed, ResidentFeed, reading
from lepton_jax.data.grain_feed import GrainByPosition, IteratedFeed, pair
from lepton_jax.data.limits import Limit
from lepton_jax.data.pipeline import Dataset, open_stream, shards
from lepton_jax.data.sequential import SequentialFeed
from lepton_jax.errors import DataError
from lepton_jax.trees import nbytes

# Samples of arrays that a data set's checksum is taken of. Assumption: enough to notice
# another file or another order, and read in milliseconds.
CHECKSUM_SAMPLES = 4096
SAMPLE_SEED = 0  # of the rows that `host_rows` draws

FIRST_SPLIT = "train"  # of a prepared folder, where no other is asked for


@runtime_checkable
class PreparedFolder(Protocol):
    """A prepared data set: a folder of shards with its manifest.

    Its own class is not imported, since it needs the extra `data`.
    """

    folder: Path
    manifest: Mapping[str, Any]


# ---- public functions ----


def settled(data: Any) -> Arrays | grain.MapDataset | grain.IterDataset | Dataset:
    """Return what a person gave as one of the four kinds of data set.

    Args:
      data: one of them already; a pair (inputs, targets) of arrays, dicts of arrays
        or lists; or a prepared folder, whose split "train" it is.

    Raises:
      DataError: it is neither.
    """
    if isinstance(data, tuple(_KINDS)):
        return data
    if isinstance(data, PreparedFolder):
        return shards(data.folder, FIRST_SPLIT)
    return from_any(data)


def sample(data: Any) -> Pair:
    """Return one sample, batch dim first, to take shapes from; no position moves."""
    return _of_kind(data).sample()


def epoch_samples(data: Any) -> int | None:
    """Return the samples in an epoch.

    None for a data set that has no epochs: a `Dataset`, or one of Grain's that can only
    be iterated.
    """
    return _of_kind(data).epoch_samples


def described(data: Any) -> str:
    """Describe a data set in words, with a checksum of some samples.

    The checksum is of 4,096 samples spread over arrays, and of the first sample of
    other data sets.
    """
    if data is None:
        return "none"

    kind = _of_kind(data)
    leaves = jax.tree.leaves(kind.checksum_samples())
    content = b"".join(np.asarray(leaf).tobytes() for leaf in leaves)
    checksum = zlib.crc32(content)
    samples = f"{kind.epoch_samples} samples"
    return f"{kind.name} of {samples}, checksum {checksum:08x}"


class HostRows(NamedTuple):
    """Some rows of a data set, on the host.

    Attributes:
      inputs: an array (rows, ...), or a dict of them.
      targets: the same.
      total: rows of the whole data set; None: it has no end.
      numbers: of these rows in an `Arrays`, ascending, int (rows,); None: all of them,
        or not known.
    """

    inputs: Any
    targets: Any
    total: int | None
    numbers: np.ndarray | None = None


def host_rows(data: Any, most: int, most_bytes: int) -> HostRows:
    """Return a data set's rows on the host, or some of them where there are more.

    They are a random sample, the same each time; of a Grain data set that can only be
    iterated they are its first rows.

    Args:
      data: what to read.
      most: rows to return at most.
      most_bytes: of these rows; at least one row is returned.
    """
    kind = _of_kind(data)
    row_bytes = sum(map(nbytes, jax.tree.leaves(kind.sample())))
    fitting = max(1, most_bytes // max(1, row_bytes))
    return kind.host_rows(min(most, fitting))


def open_feed(data: Any, **fields: Any) -> Feed:
    """Open a data set as blocks of batches on the devices, read ahead of their use.

    Args:
      data: what to read.
      **fields: those of `FeedSpec`: batch_size, steps, sharding, ...
    """
    return _of_kind(data).open(FeedSpec(**fields))


def one_pass(
    data: Any,
    batch_size: int,
    sharding_of: Callable[[int], Any],
    fill: bool,
    limits: Sequence[Limit] = (),
) -> Iterator[tuple[Any, int]]:
    """Yield batches of a data set, in its own order, that hold each sample once.

    Args:
      data: with a known number of samples.
      batch_size: samples of a batch.
      sharding_of: a number of rows to where a batch with that number goes.
      fill: whether the last batch is filled up with the first samples again; otherwise
        it has only the samples that are left.
      limits: which whole numbers the samples may hold, as in `open_feed`.

    Yields:
      (batch, how many of its rows are real)
    """
    total = epoch_samples(data)
    assert total is not None
    full_batches, left = divmod(total, batch_size)

    parts = []  # (first sample, samples of a batch, batches)
    if fill:
        parts.append(
            (
                0,
                batch_size,
                math.ceil(total / batch_size),
            )
        )
    elif full_batches:
        parts.append((0, batch_size, full_batches))
    if left and not fill:
        parts.append((full_batches * batch_size, left, 1))

    for start, size, batches in parts:
        feed = open_feed(
            data,
            batch_size=size,
            steps=1,
            sharding=sharding_of(size),
            position=start,
            blocks=batches,
            limits=limits,
        )
        try:
            for index, batch in enumerate(feed):
                yield batch, min(size, total - start - index * size)
        finally:
            feed.close()


def blocks_between(
    first: int,
    until: int,
    steps: int,
) -> int:
    """Return the blocks of `steps` steps that hold steps first to until."""
    return math.ceil((until - first) / steps)


# ---- the kinds ----


class Kind(Protocol):
    """A data set of one kind."""

    @property
    def name(self) -> str:
        """Its name in messages."""

    @property
    def epoch_samples(self) -> int | None:
        """Samples in an epoch; None if it has no epochs."""

    def sample(self) -> Pair:
        """Return one sample, batch dim first."""

    def checksum_samples(self) -> Pair:
        """Return the samples that a checksum is taken of."""

    def host_rows(self, most: int) -> HostRows:
        """Return at most so many rows."""

    def open(self, spec: FeedSpec) -> Feed:
        """Open a feed."""


class ArraysKind:
    """Arrays in memory."""

    def __init__(self, data: Arrays):
        self.data = data
        self.name = repr(data)
        self.epoch_samples = len(data)

    def sample(self) -> Pair:
        return self.data.take(np.zeros(1, np.int32))

    def checksum_samples(self) -> Pair:
        last = len(self.data) - 1
        count = min(len(self.data), CHECKSUM_SAMPLES)
        return self.data.take(np.linspace(0, last, count).astype(int))

    def host_rows(self, most: int) -> HostRows:
        total = len(self.data)
        if total <= most:
            return HostRows(self.data.inputs, self.data.targets, total)
        drawn = np.random.default_rng(SAMPLE_SEED).permutation(total)[:most]
        numbers = np.sort(drawn)
        return HostRows(*self.data.take(numbers), total, numbers)

    def open(self, spec: FeedSpec) -> Feed:
        open_samples = partial(
            ArraysByPosition,
            self.data,
            spec.seed,
            spec.shuffle,
        )
        if spec.resident:
            return ResidentFeed(open_samples, spec)
        return PositionedFeed(open_samples, spec)


class GrainMapKind:
    """A data set of Grain's that can be read at any position."""

    def __init__(self, data: grain.MapDataset):
        if not len(data):
            raise _empty(repr(data))
        self.data = data
        self.name = type(data).__name__
        self.epoch_samples = len(data)

    def sample(self) -> Pair:
        return GrainByPosition(self.data, seed=0, shuffle=False).rows(0, 1)

    def checksum_samples(self) -> Pair:
        return self.sample()

    def host_rows(self, most: int) -> HostRows:
        total = len(self.data)
        order = GrainByPosition(self.data, SAMPLE_SEED, shuffle=total > most)
        return HostRows(*order.rows(0, min(most, total)), total)

    def open(self, spec: FeedSpec) -> Feed:
        assert not spec.resident, "only arrays can lie on the devices"
        open_samples = partial(
            GrainByPosition,
            self.data,
            spec.seed,
            spec.shuffle,
        )
        return PositionedFeed(open_samples, spec)


class GrainIterKind:
    """A data set of Grain's that can only be iterated."""

    epoch_samples = None

    def __init__(self, data: grain.IterDataset):
        self.data = data
        self.name = type(data).__name__

    def sample(self) -> Pair:
        with reading():
            for element in self.data:
                return pair(jax.tree.map(lambda x: np.asarray(x)[None], element))
        raise _empty("Recipe.train")

    def checksum_samples(self) -> Pair:
        return self.sample()

    def host_rows(self, most: int) -> HostRows:
        with reading():
            elements = [pair(element) for element in itertools.islice(self.data, most)]
            inputs, targets = jax.tree.map(lambda *rows: np.stack(rows), *elements)
        return HostRows(inputs, targets, None)

    def open(self, spec: FeedSpec) -> Feed:
        return IteratedFeed(self.data, spec)


class SequentialKind:
    """A `Dataset`: sources that are filtered, mapped, mixed or packed."""

    def __init__(self, data: Dataset):
        self.data = data
        self.name = type(data).__name__
        self.epoch_samples = data.epoch_samples

    def sample(self) -> Pair:
        rows, _ = open_stream(self.data).take(1)
        return rows

    def checksum_samples(self) -> Pair:
        return self.sample()

    def host_rows(self, most: int) -> HostRows:
        count = most if self.epoch_samples is None else min(most, self.epoch_samples)
        is_part = self.epoch_samples is None or count < self.epoch_samples
        rows, _ = open_stream(self.data, SAMPLE_SEED, shuffle=is_part).take(count)
        return HostRows(*rows, self.epoch_samples)

    def open(self, spec: FeedSpec) -> Feed:
        return SequentialFeed(self.data, spec)


_KINDS: dict[Any, Callable[[Any], Kind]] = {
    Arrays: ArraysKind,
    grain.MapDataset: GrainMapKind,
    grain.IterDataset: GrainIterKind,
    Dataset: SequentialKind,
}


def _of_kind(data: Any) -> Kind:
    data = settled(data)
    for kind, adapter in _KINDS.items():
        if isinstance(data, kind):
            return adapter(data)
    raise AssertionError(f"{type(data).__name__} is no kind of data set")


def _empty(where: str) -> DataError:
    return DataError(
        "the Grain data set is empty",
        where=where,
        remedy="give at least one sample",
    )

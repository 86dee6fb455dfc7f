"""From samples to blocks of batches on the devices, in an order that only the seed and
the position decide.

A stream is endless: one epoch's order follows another's, and batches run on over the
border. Position p of it is the p-th sample that training consumes, whatever the batch
size, the block size or the number of devices; so the position alone says where to go
on. Where several hosts train together, each reads the rows of a batch that its devices
hold.
"""

from __future__ import annotations

import collections.abc
import math
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from lepton_jax.compat import placed
from lepton_jax.data.arrays import Arrays, Buffers, from_any
from lepton_jax.data.limits import Limit, check_limits
from lepton_jax.data.pipeline import Dataset, open_stream
from lepton_jax.errors import DataError, pointing_at_user

PREFETCHED_BYTES = 64 * 2**20
PREFETCHED_BLOCKS = (2, 16)  # at least, at most
# of which the positions are known: more than are on their way to the devices
BATCHES_REMEMBERED = 4096
READ = "the data as they are read"  # where a value out of range was found
# of indices alone: handing anything over from thread to thread takes a tenth of a
# millisecond
STEPS_PER_READ = 64


class ArrayStream:
    """A stream over arrays in memory, a new seeded permutation each epoch (8 bytes of
    memory a sample).
    """

    def __init__(
        self,
        data: Arrays,
        seed: int,
        shuffle: bool,
    ):
        self.data = data
        self.samples = len(data)
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}
        self._buffers = Buffers()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            kept = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders = kept | {epoch: generator.permutation(self.samples)}
        return self._orders[epoch]

    def rows(
        self,
        start: int,
        stop: int,
        wanted: Any = slice(None),
    ) -> tuple[Any, Any]:
        return self.data.take(self.indices(start, stop)[wanted], self._buffers.empty)

    def indices(
        self,
        start: int,
        stop: int,
    ) -> np.ndarray:
        """Which samples are at positions start to stop: int32."""
        if not self.shuffle:
            return (np.arange(start, stop) % self.samples).astype(np.int32)
        indices = np.empty(stop - start, np.int32)
        for epoch in range(start // self.samples, (stop - 1) // self.samples + 1):
            low = max(start, epoch * self.samples)
            high = min(stop, (epoch + 1) * self.samples)
            indices[low - start : high - start] = self._order(epoch)[
                low % self.samples :
            ][: high - low]
        return indices


class GrainStream:
    """A stream over a `grain.MapDataset` whose elements are pairs (inputs, targets)."""

    def __init__(
        self,
        data: grain.MapDataset,
        seed: int,
        shuffle: bool,
    ):
        self.samples = len(data)
        data = data.seed(seed)
        self.data = (data.shuffle() if shuffle else data).repeat()

    def rows(
        self,
        start: int,
        stop: int,
        wanted: Any = slice(None),
    ) -> tuple[Any, Any]:
        with _reading():
            rows = [
                self.data[int(position)] for position in np.arange(start, stop)[wanted]
            ]
            return _pair(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


class Share:
    """The rows of a batch that this host's devices hold, and global arrays made of
    them.

    Args:
      sharding: where a block's leaves go.
      batch_size, steps: of a block.

    Attributes:
      rows: their positions within a batch, int (k,).
      wanted: their positions within a block, int (steps * k,), or a slice where they
        are all.
    """

    def __init__(
        self,
        sharding: Any,
        batch_size: int,
        steps: int,
    ):
        self.sharding = sharding
        self._shape = (batch_size,) if steps == 1 else (steps, batch_size)
        ranges = [
            index[-1].indices(batch_size)[:2]
            for index in sharding.addressable_devices_indices_map(self._shape).values()
        ]
        self.rows = np.unique(np.concatenate([np.arange(*limits) for limits in ranges]))
        whole = len(self.rows) == batch_size
        self.wanted = (
            slice(None)
            if whole
            else (np.arange(steps)[:, None] * batch_size + self.rows).reshape(-1)
        )

    def put(self, rows: Any) -> jax.Array:
        """Rows `wanted` of one leaf, (n, ...), as this host's part of the block's
        global array.
        """
        rows = rows.reshape(
            *self._shape[:-1],
            len(self.rows),
            *rows.shape[1:],
        )
        if self.sharding.is_fully_addressable:
            return jax.device_put(rows, self.sharding)
        batch_dim = len(self._shape) - 1
        shape = (*self._shape, *rows.shape[len(self._shape) :])

        def part(index: Any) -> np.ndarray:
            low, high, _ = index[batch_dim].indices(self._shape[-1])
            first = int(np.searchsorted(self.rows, low))
            return rows[(*index[:batch_dim], slice(first, first + high - low))]

        return jax.make_array_from_callback(shape, self.sharding, part)


class Block(NamedTuple):
    """What the reading thread hands over of a data set that is read in order: the rows
    on the devices, and by the number of samples consumed the positions after each of
    its batches and the identifiers of the samples before them.
    """

    rows: Any
    states: dict[int, dict[str, Any]]
    names: dict[int, list[str]]


class Sequence:
    """A `Dataset`'s blocks, read one after the other by whoever asks for number 0, 1,
    2, ... of them.

    Args:
      data, seed, shuffle, start: the `Dataset`, its order, and the samples consumed
        before the first block.
      saved: the state after these; None: of the beginning.
      share: this host's rows.
      batch_size, steps, blocks: of a block, and how many there are.
    """

    def __init__(
        self,
        data: Dataset,
        seed: int,
        shuffle: bool,
        start: int,
        saved: Any,
        share: Share,
        batch_size: int,
        steps: int,
        blocks: int | None,
        limits: collections.abc.Sequence[Limit] = (),
    ):
        self.limits = limits
        self.stream = open_stream(data, seed, shuffle)
        self.share = share
        self.batch_size = batch_size
        self.steps = steps
        self.stream.restore(saved)
        self.blocks = blocks
        self.consumed = start
        self._next = 0

    def __len__(self) -> int:
        return self.blocks if self.blocks is not None else 2**40

    def __getitem__(self, index: Any) -> Block:
        assert index == self._next, (
            f"block {index} is asked for after block {self._next - 1}"
        )
        self._next += 1
        parts = []
        states = {}
        names = {}
        for _ in range(self.steps):
            rows, ids = self.stream.take(self.batch_size, self.share.rows)
            own = [ids[row] for row in self.share.rows]
            check_limits(self.limits, rows, READ, own.__getitem__)
            self.consumed += self.batch_size
            parts.append(rows)
            states[self.consumed] = self.stream.state()
            names[self.consumed] = ids
        whole = (
            parts[0]
            if self.steps == 1
            else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        )
        return Block(
            jax.tree.map(self.share.put, whole),
            states,
            names,
        )

    def __repr__(self) -> str:
        return f"blocks of {self.steps} batches of {self.batch_size} samples"


def stream(
    data: Any, seed: int = 0, shuffle: bool = False
) -> ArrayStream | GrainStream:
    """A stream over a pair of arrays, an `Arrays` or a `grain.MapDataset`.

    Raises:
      DataError: the data is of another kind, or empty.
    """
    if isinstance(data, grain.MapDataset):
        if not len(data):
            raise DataError(
                "the Grain data set is empty",
                where=repr(data),
                remedy="give at least one sample",
            )
        return GrainStream(data, seed, shuffle)
    return ArrayStream(from_any(data), seed, shuffle)


def sample(data: Any) -> tuple[Any, Any]:
    """One sample, batch dim first, to take shapes from; no position moves."""
    if isinstance(data, Dataset):
        return open_stream(data, 0, False).take(1, np.arange(1))[0]
    if isinstance(data, grain.IterDataset):
        with _reading():
            for element in data:
                return _pair(jax.tree.map(lambda x: np.asarray(x)[None], element))
        raise DataError(
            "the Grain data set is empty",
            where="Recipe.train",
            remedy="give at least one sample",
        )
    return stream(data).rows(0, 1)


def epoch_samples(data: Any) -> int | None:
    """Samples in an epoch, or None for a data set that has none: a `Dataset`, or one of
    Grain's that can only be iterated.
    """
    return (
        None if isinstance(data, grain.IterDataset | Dataset) else stream(data).samples
    )


def described(data: Any) -> str:
    """What a data set is, in words, with a checksum of samples: of arrays 4,096 spread
    over them, of others the first.
    """
    if data is None:
        return "none"
    several = isinstance(data, Arrays)
    some = (
        data.take(np.linspace(0, len(data) - 1, min(len(data), 4096)).astype(int))
        if several
        else sample(data)
    )
    checksum = zlib.crc32(
        b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(some))
    )
    return (
        f"{repr(data) if several else type(data).__name__} of {epoch_samples(data)}"
        f" samples, checksum {checksum:08x}"
    )


class Loader:
    """Blocks of `steps` batches, read and put on the devices by a thread of Grain's,
    ahead of their use.

    Args:
      data: what to read.
      batch_size: samples a step.
      steps: steps a block: leaves are (batch_size, ...) for 1, else (steps, batch_size,
        ...).
      sharding: where a block's leaves go.
      seed, shuffle: the order, as in the recipe.
      position: samples consumed before the first block, or what `state` returned.
      blocks: how many blocks there are; None: no end.
      resident: the samples are on the devices already, so a block holds their indices,
        int32, instead.
      limits: which whole numbers the samples may hold. They are checked as they are
        read, but those of arrays in memory, which are checked at once before
        (`check_limits`).
    """

    def __init__(
        self,
        data: Any,
        *,
        batch_size: int,
        steps: int,
        sharding: Any,
        seed: int = 0,
        shuffle: bool = False,
        position: Any = 0,
        blocks: int | None = None,
        resident: bool = False,
        limits: collections.abc.Sequence[Limit] = (),
    ):
        self._rows = batch_size * steps
        self._iterable = isinstance(data, grain.IterDataset)
        self._resident = resident
        self._data = data
        self._seed = seed
        self._shuffle = shuffle
        self._batch_size = batch_size
        self._states: dict[int, dict[str, Any]] | None = None
        self._names: dict[int, list[str]] = {}
        self._read = np.empty(0, np.int32)
        self._put: Callable[[Any], Any]
        share = Share(sharding, batch_size, steps)

        def put(rows: Any) -> Any:
            return jax.tree.map(share.put, rows)

        start, saved = (
            (position, None)
            if isinstance(position, int)
            else (position["samples"], position.get("grain"))
        )
        self._samples = start
        if self._iterable:
            assert steps == 1, (
                "the position of an iterable data set is known between its batches only"
            )
            dataset = data.batch(batch_size, drop_remainder=True).map(_pair)
            self._iterator = iter(dataset)
            if saved is not None:
                self._iterator.set_state(saved)

            def put_wanted(rows: Any) -> Any:
                wanted = jax.tree.map(lambda x: np.asarray(x)[share.wanted], rows)
                places = self._samples + share.rows
                check_limits(
                    limits,
                    wanted,
                    READ,
                    lambda row: str(places[row]),
                )
                return put(wanted)

            self._put = put_wanted
        elif isinstance(data, Dataset):
            then = None if isinstance(position, int) else position.get("stream")
            assert start == 0 or then is not None, (
                "the position of a data set that is read in order is its state"
            )
            blocks_read = grain.MapDataset.source(
                Sequence(
                    data,
                    seed,
                    shuffle,
                    start,
                    then,
                    share,
                    batch_size,
                    steps,
                    blocks,
                    limits,
                )
            )
            self._iterator = iter(
                blocks_read.to_iter_dataset(
                    grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
                )
            )
            self._states = {start: then or {}}
            self._put = self._kept
        else:
            samples = stream(data, seed, shuffle)
            assert isinstance(samples, ArrayStream) or not resident
            read: Any = (
                samples.indices  # type: ignore[union-attr]
                if resident
                else partial(samples.rows, wanted=share.wanted)
            )
            if limits and isinstance(samples, GrainStream):
                read = partial(_checked_rows, samples, share.wanted, limits)
            at_once = max(1, STEPS_PER_READ // steps) if resident else 1
            source = _Blocks(
                read,
                start,
                self._rows * at_once,
                blocks and math.ceil(blocks / at_once),
            )
            one = samples.indices(0, 1) if resident else samples.rows(0, 1)  # type: ignore[union-attr]
            block = sum(np.asarray(x).nbytes for x in jax.tree.leaves(one)) * self._rows
            depth = int(np.clip(PREFETCHED_BYTES // max(1, block), *PREFETCHED_BLOCKS))
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=depth)
            blocks_read = grain.MapDataset.source(source)
            self._iterator = iter(
                (blocks_read if resident else blocks_read.map(put)).to_iter_dataset(
                    options
                )
            )
            # indices alone are cheap: every host makes them all
            whole = lambda x: placed(
                x if steps == 1 else x.reshape(steps, batch_size), sharding
            )
            self._put = whole if resident else lambda rows: rows

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        try:
            with _reading():
                if not self._resident:
                    block = self._put(next(self._iterator))
                else:
                    self._read = self._read if len(self._read) else next(self._iterator)
                    rows = self._read[: self._rows]
                    self._read = self._read[self._rows :]
                    block = self._put(rows)
        except StopIteration:
            if self._iterable:
                raise DataError(
                    f"the data ended after {self._samples} samples",
                    where="Recipe.train",
                    remedy=(
                        "call .repeat() on the Grain data set, or train for fewer steps"
                    ),
                ) from None
            raise
        self._samples += self._rows
        return block

    def state(self, unused: int) -> dict[str, Any]:
        """The position, in plain data, of which the last block's final `unused` samples
        are not consumed yet.
        """
        return self.at(self._samples - unused)

    def at(self, samples: int) -> dict[str, Any]:
        """The position after so many samples, between two of the batches read lately;
        after the last one only where the data can only be iterated.
        """
        position = {
            "samples": samples,
            "grain": self._iterator.get_state() if self._iterable else None,
        }
        return (
            position
            if self._states is None
            else position | {"stream": self._states[samples]}
        )

    def names(self, samples: int) -> list[str]:
        """What the batch was made of that ends after so many samples:
        "SOURCE:EPOCH:INDEX" where the data have sources, "EPOCH:INDEX" of arrays, else
        the position in the stream.
        """
        if self._states is not None:
            return self._names[samples]
        places = np.arange(samples - self._batch_size, samples)
        if self._arrays is None:
            return [str(place) for place in places]
        indices = self._arrays.indices(int(places[0]), int(places[-1]) + 1)
        return [
            f"{place // self._arrays.samples}:{index}"
            for place, index in zip(places, indices, strict=True)
        ]

    @cached_property
    def _arrays(self) -> ArrayStream | None:
        """The order of arrays once more, as the reading thread uses its own."""
        found = (
            None if self._iterable else stream(self._data, self._seed, self._shuffle)
        )
        return found if isinstance(found, ArrayStream) else None

    def _kept(self, block: Block) -> Any:
        """A block's rows; what belongs to its batches, and to a few of those before,
        can be asked for from now on.
        """
        assert self._states is not None
        for held, fresh in ((self._states, block.states), (self._names, block.names)):
            held |= fresh  # type: ignore[arg-type, operator]
            for old in list(held)[: -BATCHES_REMEMBERED - len(fresh)]:
                del held[old]
        return block.rows

    def close(self) -> None:
        """Stop the reading thread."""
        self._iterator.close()


def one_pass(
    data: Any,
    batch_size: int,
    sharding_of: Callable[[int], Any],
    fill: bool,
    limits: collections.abc.Sequence[Limit] = (),
) -> Iterator[tuple[Any, int]]:
    """Batches of a data set, in its own order, that hold each sample once.

    Args:
      data: with a known number of samples.
      batch_size: samples of a batch.
      sharding_of: a number of rows to where a batch of so many goes.
      fill: whether the last batch is filled up with the first samples again; otherwise
        it has only the samples that are left.
      limits: as of `Loader`.

    Yields:
      (batch, how many of its rows are real)
    """
    total = epoch_samples(data)
    assert total is not None
    full, left = divmod(total, batch_size)
    passes = []
    if full or fill:
        passes.append(
            (
                0,
                batch_size,
                math.ceil(total / batch_size) if fill else full,
            )
        )
    if left and not fill:
        passes.append((full * batch_size, left, 1))

    for start, size, blocks in passes:
        loader = Loader(
            data,
            batch_size=size,
            steps=1,
            sharding=sharding_of(size),
            position=start,
            blocks=blocks,
            limits=limits,
        )
        try:
            for index, batch in enumerate(loader):
                yield batch, min(size, total - start - index * size)
        finally:
            loader.close()


def _checked_rows(
    stream: GrainStream,
    wanted: Any,
    limits: collections.abc.Sequence[Limit],
    start: int,
    stop: int,
) -> tuple[Any, Any]:
    rows = stream.rows(start, stop, wanted)
    places = np.arange(start, stop)[wanted]
    check_limits(
        limits,
        rows,
        READ,
        lambda row: str(places[row]),
    )
    return rows


class _Blocks:
    """Grain's random-access source of whole blocks: one vectorized read each."""

    def __init__(
        self,
        read: Callable[[int, int], Any],
        start: int,
        rows: int,
        blocks: int | None,
    ):
        self.read = read
        self.start = start
        self.rows = rows
        self.blocks = blocks

    def __len__(self) -> int:
        return self.blocks if self.blocks is not None else 2**40

    def __getitem__(self, index: Any) -> Any:
        low = self.start + int(index) * self.rows
        return self.read(low, low + self.rows)

    def __repr__(self) -> str:
        return f"blocks of {self.rows} samples"


def blocks_between(
    first: int,
    until: int,
    steps: int,
) -> int:
    """Blocks of `steps` steps that hold steps first to until."""
    return math.ceil((until - first) / steps)


def _reading() -> pointing_at_user:
    return pointing_at_user(
        "reading the data set",
        "mend the data set; its elements are pairs (inputs, targets) of one shape",
        where="Recipe.train",
        kind=DataError,
    )


def _pair(element: Any) -> tuple[Any, Any]:
    if not (isinstance(element, tuple | list) and len(element) == 2):
        raise DataError(
            f"an element of the Grain data set is a {type(element).__name__}",
            where="Recipe.train",
            remedy="map it to a pair (inputs, targets)",
        )
    return element[0], element[1]

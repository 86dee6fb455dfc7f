"""From samples to blocks of batches on the devices, in an order that only the seed and the position decide.

A stream is endless: one epoch's order follows another's, and batches run on over the border. Position p of it is the
p-th sample that training consumes, whatever the batch size, the block size or the number of devices; so the position
alone says where to go on. Where several hosts train together, each reads the rows of a batch that its devices hold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import grain
import jax
import numpy as np

from lepton_jax.compat import placed
from lepton_jax.data.arrays import Arrays, Buffers, from_any
from lepton_jax.errors import DataError, pointing_at_user

PREFETCHED_BYTES = 64 * 2**20
PREFETCHED_BLOCKS = (2, 16)  # at least, at most
STEPS_PER_READ = 64  # of indices alone: handing anything over from thread to thread takes a tenth of a millisecond


class ArrayStream:
    """A stream over arrays in memory, a new seeded permutation each epoch (8 bytes of memory a sample)."""

    def __init__(self, data: Arrays, seed: int, shuffle: bool):
        self.data, self.samples, self.seed, self.shuffle = data, len(data), seed, shuffle
        self._orders: dict[int, np.ndarray] = {}
        self._buffers = Buffers()

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            kept = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders = kept | {epoch: generator.permutation(self.samples)}
        return self._orders[epoch]

    def rows(self, start: int, stop: int, wanted: Any = slice(None)) -> tuple[Any, Any]:
        return self.data.take(self.indices(start, stop)[wanted], self._buffers.empty)

    def indices(self, start: int, stop: int) -> np.ndarray:
        """Which samples are at positions start to stop: int32."""
        if not self.shuffle:
            return (np.arange(start, stop) % self.samples).astype(np.int32)
        indices = np.empty(stop - start, np.int32)
        for epoch in range(start // self.samples, (stop - 1) // self.samples + 1):
            low, high = max(start, epoch * self.samples), min(stop, (epoch + 1) * self.samples)
            indices[low - start:high - start] = self._order(epoch)[low % self.samples:][:high - low]
        return indices


class GrainStream:
    """A stream over a `grain.MapDataset` whose elements are pairs (inputs, targets)."""

    def __init__(self, data: grain.MapDataset, seed: int, shuffle: bool):
        self.samples = len(data)
        data = data.seed(seed)
        self.data = (data.shuffle() if shuffle else data).repeat()

    def rows(self, start: int, stop: int, wanted: Any = slice(None)) -> tuple[Any, Any]:
        with _reading():
            rows = [self.data[int(position)] for position in np.arange(start, stop)[wanted]]
            return _pair(jax.tree.map(lambda *leaves: np.stack(leaves), *rows))


def stream(data: Any, seed: int = 0, shuffle: bool = False) -> ArrayStream | GrainStream:
    """A stream over a pair of arrays, an `Arrays` or a `grain.MapDataset`.

    Raises:
      DataError: the data is of another kind, or empty.
    """
    if isinstance(data, grain.MapDataset):
        if not len(data):
            raise DataError("the Grain data set is empty", where=repr(data), remedy="give at least one sample")
        return GrainStream(data, seed, shuffle)
    return ArrayStream(from_any(data), seed, shuffle)


def sample(data: Any) -> tuple[Any, Any]:
    """One sample, batch dim first, to take shapes from; no position moves."""
    if isinstance(data, grain.IterDataset):
        with _reading():
            for element in data:
                return _pair(jax.tree.map(lambda x: np.asarray(x)[None], element))
        raise DataError("the Grain data set is empty", where="Recipe.train", remedy="give at least one sample")
    return stream(data).rows(0, 1)


def epoch_samples(data: Any) -> int | None:
    """Samples in an epoch, or None for a Grain data set that can only be iterated."""
    return None if isinstance(data, grain.IterDataset) else stream(data).samples


class Share:
    """The rows of a batch that this host's devices hold, and global arrays made of them.

    Args:
      sharding: where a block's leaves go.
      batch_size, steps: of a block.

    Attributes:
      wanted: positions within a block of this host's rows, int (n,), or a slice where they are all.
    """

    def __init__(self, sharding: Any, batch_size: int, steps: int):
        self.sharding, self._shape = sharding, (batch_size,) if steps == 1 else (steps, batch_size)
        ranges = [index[-1].indices(batch_size)[:2] for index in sharding.addressable_devices_indices_map(self._shape).values()]
        self._rows = np.unique(np.concatenate([np.arange(*limits) for limits in ranges]))
        whole = len(self._rows) == batch_size
        self.wanted = slice(None) if whole else (np.arange(steps)[:, None] * batch_size + self._rows).reshape(-1)

    def put(self, rows: Any) -> jax.Array:
        """Rows `wanted` of one leaf, (n, ...), as this host's part of the block's global array."""
        rows = rows.reshape(*self._shape[:-1], len(self._rows), *rows.shape[1:])
        if self.sharding.is_fully_addressable:
            return jax.device_put(rows, self.sharding)
        batch_dim = len(self._shape) - 1
        shape = (*self._shape, *rows.shape[len(self._shape):])

        def part(index: Any) -> np.ndarray:
            low, high, _ = index[batch_dim].indices(self._shape[-1])
            first = int(np.searchsorted(self._rows, low))
            return rows[(*index[:batch_dim], slice(first, first + high - low))]

        return jax.make_array_from_callback(shape, self.sharding, part)


class Loader:
    """Blocks of `steps` batches, read and put on the devices by a thread of Grain's, ahead of their use.

    Args:
      data: what to read.
      batch_size: samples a step.
      steps: steps a block: leaves are (batch_size, ...) for 1, else (steps, batch_size, ...).
      sharding: where a block's leaves go.
      seed, shuffle: the order, as in the recipe.
      position: samples consumed before the first block, or what `state` returned.
      blocks: how many blocks there are; None: no end.
      resident: the samples are on the devices already, so a block holds their indices, int32, instead.
    """

    def __init__(self, data: Any, *, batch_size: int, steps: int, sharding: Any, seed: int = 0, shuffle: bool = False,
                 position: Any = 0, blocks: int | None = None, resident: bool = False):
        self._rows = batch_size * steps
        self._iterable, self._resident = isinstance(data, grain.IterDataset), resident
        self._read = np.empty(0, np.int32)
        share = Share(sharding, batch_size, steps)

        def put(rows: Any) -> Any:
            return jax.tree.map(share.put, rows)

        start, saved = (position, None) if isinstance(position, int) else (position["samples"], position.get("grain"))
        self._samples = start
        if self._iterable:
            assert steps == 1, "the position of an iterable data set is known between its batches only"
            dataset = data.batch(batch_size, drop_remainder=True).map(_pair)
            self._iterator = iter(dataset)
            if saved is not None:
                self._iterator.set_state(saved)
            self._put = lambda rows: put(jax.tree.map(lambda x: x[share.wanted], rows))
        else:
            samples = stream(data, seed, shuffle)
            assert isinstance(samples, ArrayStream) or not resident
            read: Any = samples.indices if resident else partial(samples.rows, wanted=share.wanted)  # type: ignore[union-attr]
            at_once = max(1, STEPS_PER_READ // steps) if resident else 1
            source = _Blocks(read, start, self._rows * at_once, blocks and math.ceil(blocks / at_once))
            one = samples.indices(0, 1) if resident else samples.rows(0, 1)  # type: ignore[union-attr]
            block = sum(np.asarray(x).nbytes for x in jax.tree.leaves(one)) * self._rows
            depth = int(np.clip(PREFETCHED_BYTES // max(1, block), *PREFETCHED_BLOCKS))
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=depth)
            blocks_read = grain.MapDataset.source(source)
            self._iterator = iter((blocks_read if resident else blocks_read.map(put)).to_iter_dataset(options))
            # indices alone are cheap: every host makes them all
            whole = lambda x: placed(x if steps == 1 else x.reshape(steps, batch_size), sharding)  # noqa: E731
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
                    rows, self._read = self._read[:self._rows], self._read[self._rows:]
                    block = self._put(rows)
        except StopIteration:
            if self._iterable:
                raise DataError(f"the data ended after {self._samples} samples", where="Recipe.train",
                                remedy="call .repeat() on the Grain data set, or train for fewer steps") from None
            raise
        self._samples += self._rows
        return block

    def state(self, unused: int) -> dict[str, Any]:
        """The position, in plain data, of which the last block's final `unused` samples are not consumed yet."""
        return {"samples": self._samples - unused, "grain": self._iterator.get_state() if self._iterable else None}

    def close(self) -> None:
        """Stop the reading thread."""
        self._iterator.close()


class _Blocks:
    """Grain's random-access source of whole blocks: one vectorized read each."""

    def __init__(self, read: Callable[[int, int], Any], start: int, rows: int, blocks: int | None):
        self.read, self.start, self.rows, self.blocks = read, start, rows, blocks

    def __len__(self) -> int:
        return self.blocks if self.blocks is not None else 2**40

    def __getitem__(self, index: Any) -> Any:
        low = self.start + int(index) * self.rows
        return self.read(low, low + self.rows)

    def __repr__(self) -> str:
        return f"blocks of {self.rows} samples"


def blocks_between(first: int, until: int, steps: int) -> int:
    """Blocks of `steps` steps that hold steps first to until."""
    return math.ceil((until - first) / steps)


def _reading() -> pointing_at_user:
    return pointing_at_user("reading the data set", "mend the data set; its elements are pairs (inputs, targets) of one "
                            "shape", where="Recipe.train", kind=DataError)


def _pair(element: Any) -> tuple[Any, Any]:
    if not (isinstance(element, tuple | list) and len(element) == 2):
        raise DataError(f"an element of the Grain data set is a {type(element).__name__}", where="Recipe.train",
                        remedy="map it to a pair (inputs, targets)")
    return element[0], element[1]

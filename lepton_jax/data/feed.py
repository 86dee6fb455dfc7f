"""Blocks of batches on the devices, in an order that the seed and the position decide.

A feed is endless: one epoch's order follows another's, and batches run on over the
border. Position p is the p-th sample that training consumes, whatever the batch size,
the block size or the number of devices; so the position alone says where to go on.
Where several hosts train together, each reads the rows of a batch that its devices
hold.

A block is what one call of the compiled program takes: the batches of one or several
steps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np

from lepton_jax.compat import placed
from lepton_jax.data.arrays import ArraysByPosition, Pair
from lepton_jax.data.budget import Budget
from lepton_jax.data.limits import Limit, check_limits
from lepton_jax.data.readahead import Readahead
from lepton_jax.errors import DataError, pointing_at_user

Position = dict[str, Any]  # of a feed: plain data that survives JSON

# Steps whose indices are handed from thread to thread at once: each handing over takes
# a tenth of a millisecond, which is more than a small step takes.
STEPS_PER_READ = 64

WHAT_IS_CHECKED = "the data as they are read"  # where a value out of range was found


class Feed(ABC):
    """Blocks of batches on the devices, one after the other, and where they came from.

    `next(feed)` gives a block: a pair of arrays (inputs, targets) or of dicts of them,
    with leaves (batch_size, ...) if a block has one step, else (steps, batch_size,
    ...).
    """

    def __init__(self, start: int, block_samples: int):
        self._samples = start  # consumed once the last block is used up
        self._block_samples = block_samples

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        with reading():
            block = self._next_block()
        self._samples += self._block_samples
        return block

    def state(self, unused: int) -> Position:
        """Return the position where the last block's final samples are not consumed.

        Args:
          unused: how many samples at the end of the last block are not consumed yet.

        Returns:
          plain data, which `open_feed` takes as `position`.
        """
        return self.at(self._samples - unused)

    @abstractmethod
    def at(self, samples: int) -> Position:
        """Return the position after `samples` samples, between two batches read lately.

        A feed over data that can only be iterated knows the position after its last
        batch only.
        """

    @abstractmethod
    def names(self, samples: int) -> list[str]:
        """Return the identifiers of the samples in the batch that ends at a position.

        Args:
          samples: how many samples are consumed once the batch is.

        Returns:
          "SOURCE:EPOCH:INDEX" where the data have sources, "EPOCH:INDEX" of arrays,
          else the position.
        """

    def measured(self) -> dict[str, float]:
        """Return what reading takes and gives.

        Returns:
          {} or: "workers", threads that read; "blocks_ahead"; "bytes" that are held at
          most; "padding", the share of the tokens, if rows are fitted.
        """
        return {}

    @abstractmethod
    def close(self) -> None:
        """Stop reading."""

    @abstractmethod
    def _next_block(self) -> Any: ...


@dataclass(frozen=True)
class FeedSpec:
    """The way in which a data set is to be fed.

    Attributes:
      batch_size: samples a step.
      steps: steps a block: leaves are (batch_size, ...) for 1, else (steps, batch_size,
        ...).
      sharding: where a block's leaves go.
      seed: of the order, as in the recipe.
      shuffle: whether the order is random, as in the recipe.
      position: samples consumed before the first block, or what `Feed.state` returned.
      blocks: how many blocks there are; None: no end.
      resident: whether the samples are on the devices already, so that a block holds
        their indices, int32, instead.
      limits: which whole numbers the samples may hold. They are checked as they are
        read, except those of arrays in memory, which are checked at once before
        (`check_limits`).
    """

    batch_size: int
    steps: int
    sharding: Any
    seed: int = 0
    shuffle: bool = False
    position: int | Position = 0
    blocks: int | None = None
    resident: bool = False
    limits: Sequence[Limit] = ()

    @property
    def start(self) -> int:
        """Samples consumed before the first block."""
        if isinstance(self.position, int):
            return self.position
        return self.position["samples"]

    @property
    def block_samples(self) -> int:
        """Samples in a block."""
        return self.batch_size * self.steps

    def saved(self, key: str) -> Any:
        """Return what a saved position has under `key`; None if it is only a number."""
        if isinstance(self.position, int):
            return None
        return self.position.get(key)

    def share(self) -> Share:
        """Return this host's rows of a block."""
        return Share(self.sharding, self.batch_size, self.steps)


class Share:
    """The rows of a batch that this host's devices hold, as parts of global arrays.

    Args:
      sharding: where a block's leaves go.
      batch_size: samples of a batch.
      steps: batches of a block.

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

        parts = sharding.addressable_devices_indices_map(self._shape).values()
        ranges = [range(*index[-1].indices(batch_size)) for index in parts]
        self.rows = np.unique(np.concatenate(ranges))

        self.wanted: Any = slice(None)
        if len(self.rows) < batch_size:
            first_rows = np.arange(steps)[:, None] * batch_size
            self.wanted = (first_rows + self.rows).reshape(-1)

    def put(self, rows: Any) -> jax.Array:
        """Put this host's rows of one leaf on its devices.

        Args:
          rows: the rows `wanted` of a block, (n, ...).

        Returns:
          the block's global array, of which this host holds its part.
        """
        own_shape = (
            *self._shape[:-1],
            len(self.rows),
            *rows.shape[1:],
        )
        rows = rows.reshape(own_shape)
        if self.sharding.is_fully_addressable:
            return jax.device_put(rows, self.sharding)

        batch_dim = len(self._shape) - 1
        batch_size = self._shape[-1]
        shape = (*self._shape, *rows.shape[len(self._shape) :])

        def part(index: Any) -> np.ndarray:
            low, high, _ = index[batch_dim].indices(batch_size)
            first = int(np.searchsorted(self.rows, low))
            return rows[(*index[:batch_dim], slice(first, first + high - low))]

        return jax.make_array_from_callback(shape, self.sharding, part)

    def put_all(self, rows: Any) -> Any:
        """Put this host's rows of all leaves on its devices."""
        return jax.tree.map(self.put, rows)


class ByPosition(Protocol):
    """Samples that can be read at any position.

    Attributes:
      checked_when_read: whether values out of range are looked for in reading.
      many_may_read: whether several threads may read at a time.
    """

    checked_when_read: bool
    many_may_read: bool

    def rows(
        self,
        start: int,
        stop: int,
        wanted: Any = ...,
    ) -> Pair:
        """Return the samples at positions start to stop, those `wanted` of them."""

    def ids(
        self,
        start: int,
        stop: int,
    ) -> list[str]:
        """Return identifiers of the samples at positions start to stop."""


class PositionedFeed(Feed):
    """Samples that can be read at any position.

    Threads read them and put them on the devices, ahead of their use.

    Args:
      open_samples: gives the samples anew: the reading threads have their own, as they
        keep what they computed last.
      spec: what is wanted of them.
    """

    def __init__(
        self,
        open_samples: Callable[[], ByPosition],
        spec: FeedSpec,
    ):
        super().__init__(spec.start, spec.block_samples)
        self._batch_size = spec.batch_size
        self._named = open_samples()
        samples = open_samples()
        share = spec.share()

        def read(start: int, stop: int) -> Pair:
            rows = samples.rows(start, stop, share.wanted)
            if spec.limits and samples.checked_when_read:
                places = np.arange(start, stop)[share.wanted]
                check_rows(spec.limits, rows, places)
            return rows

        def block(start: int, stop: int) -> Pair:
            return share.put_all(read(start, stop))

        blocks = PositionedBlocks(
            block,
            spec.start,
            spec.block_samples,
            spec.blocks,
        )
        sample = jax.tree.leaves(samples.rows(0, 1))
        sample_bytes = sum(leaf.nbytes for leaf in sample)
        own_samples = len(share.rows) * spec.steps
        budget = Budget.of_this_machine()
        if not samples.many_may_read:
            budget = replace(budget, workers=1)
        self._blocks: Readahead[Pair] = Readahead(
            blocks.decide,
            budget,
            sample_bytes * own_samples,
        )

    def at(self, samples: int) -> Position:
        return {"samples": samples, "grain": None}

    def names(self, samples: int) -> list[str]:
        return self._named.ids(samples - self._batch_size, samples)

    def close(self) -> None:
        self._blocks.close()

    def measured(self) -> dict[str, float]:
        return self._blocks.tuning.measured()

    def _next_block(self) -> Any:
        return next(self._blocks)


class ResidentFeed(Feed):
    """Indices of samples that are on the devices already: int32 arrays as blocks.

    Every host makes all indices, as they are cheap; a thread makes those of many steps
    at once.
    """

    def __init__(
        self,
        open_samples: Callable[[], ArraysByPosition],
        spec: FeedSpec,
    ):
        super().__init__(spec.start, spec.block_samples)
        self._named = open_samples()
        self._batch_size = spec.batch_size
        self._steps = spec.steps
        self._sharding = spec.sharding
        self._ahead = np.empty(0, np.int32)  # read, and not yet given out

        blocks_per_read = max(1, STEPS_PER_READ // spec.steps)
        blocks = PositionedBlocks(
            open_samples().indices,
            spec.start,
            spec.block_samples * blocks_per_read,
            spec.blocks and math.ceil(spec.blocks / blocks_per_read),
        )
        self._blocks: Readahead[np.ndarray] = Readahead(
            blocks.decide,
            replace(Budget.of_this_machine(), workers=1),
            self._ahead.itemsize * spec.block_samples * blocks_per_read,
        )

    def at(self, samples: int) -> Position:
        return {"samples": samples, "grain": None}

    def names(self, samples: int) -> list[str]:
        return self._named.ids(samples - self._batch_size, samples)

    def close(self) -> None:
        self._blocks.close()

    def _next_block(self) -> Any:
        if not len(self._ahead):
            self._ahead = next(self._blocks)
        indices = self._ahead[: self._block_samples]
        self._ahead = self._ahead[self._block_samples :]

        if self._steps > 1:
            indices = indices.reshape(self._steps, self._batch_size)
        return placed(indices, self._sharding)


class PositionedBlocks:
    """Whole blocks by position, one vectorized read each."""

    def __init__(
        self,
        read: Callable[[int, int], Any],
        start: int,
        block_samples: int,
        blocks: int | None,
    ):
        self.read = read
        self.start = start
        self.block_samples = block_samples
        self.blocks_left = blocks

    def decide(self) -> partial[Any]:
        """Return what reads the next block; raise StopIteration after the last one."""
        if self.blocks_left is not None:
            if not self.blocks_left:
                raise StopIteration
            self.blocks_left -= 1
        start = self.start
        self.start += self.block_samples
        return partial(self.read, start, self.start)


def check_rows(
    limits: Sequence[Limit],
    rows: Pair,
    ids: Any,
) -> None:
    """Check rows that have just been read against the program's limits.

    Args:
      limits: of the program.
      rows: (inputs, targets).
      ids: what identifies each row, by its number.

    Raises:
      DataError: a row holds a whole number out of range.
    """
    check_limits(
        limits,
        rows,
        WHAT_IS_CHECKED,
        lambda row: str(ids[row]),
    )


def reading() -> pointing_at_user:
    """Return a context in which an error of a person's data set is a `DataError`."""
    return pointing_at_user(
        "reading the data set",
        "fix the data set; its elements are pairs (inputs, targets) of one shape",
        where="Recipe.train",
        kind=DataError,
    )

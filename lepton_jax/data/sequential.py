"""A `Dataset` as a feed: one thread reads it in order; its position is a state."""

from __future__ import annotations

from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from lepton_jax.data.arrays import Pair
from lepton_jax.data.feed import ENDLESS, Feed, FeedSpec, Position, Share, check_rows
from lepton_jax.data.pipeline import Dataset, open_stream

# Batches whose positions and identifiers are kept: more than are on their way to the
# devices. Assumption.
BATCHES_REMEMBERED = 4096

BLOCKS_AHEAD = 2  # that the thread reads; assumption: two hide the time of one read


class StepBatches(NamedTuple):
    """The batches of one block, as the reading thread hands them over.

    Attributes:
      rows: (inputs, targets) on the devices.
      states: the position after each batch, by the samples consumed until then.
      ids: the identifiers of each batch's samples, by the same number.
    """

    rows: Any
    states: dict[int, Position]
    ids: dict[int, list[str]]


class SequentialFeed(Feed):
    """A `Dataset`, read by a thread of Grain's ahead of its use."""

    def __init__(self, data: Dataset, spec: FeedSpec):
        super().__init__(spec.start, spec.block_samples)
        saved = spec.saved("stream")
        assert spec.start == 0 or saved is not None, (
            "the position of a data set that is read in order is its state"
        )
        source = SequentialBlocks(data, spec, saved)
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=BLOCKS_AHEAD)
        blocks = grain.MapDataset.source(source).to_iter_dataset(options)
        self._iterator = iter(blocks)
        self._states: dict[int, Position] = {spec.start: saved or {}}
        self._ids: dict[int, list[str]] = {}

    def at(self, samples: int) -> Position:
        stream = self._states[samples]
        return {"samples": samples, "grain": None, "stream": stream}

    def names(self, samples: int) -> list[str]:
        return self._ids[samples]

    def close(self) -> None:
        self._iterator.close()

    def _next_block(self) -> Any:
        batches = next(self._iterator)
        _remember(self._states, batches.states)
        _remember(self._ids, batches.ids)
        return batches.rows


class SequentialBlocks:
    """Grain's source of a `Dataset`'s blocks, which asks for number 0, 1, 2, ...

    Args:
      data: what to read.
      spec: batch size, steps, order and number of blocks.
      saved: the state after the samples before the first block; None: the beginning.
    """

    def __init__(
        self,
        data: Dataset,
        spec: FeedSpec,
        saved: Any,
    ):
        self.stream = open_stream(data, spec.seed, spec.shuffle)
        self.stream.restore(saved)
        self.share: Share = spec.share()
        self.limits = spec.limits
        self.batch_size = spec.batch_size
        self.steps = spec.steps
        self.blocks = spec.blocks
        self.consumed = spec.start
        self._next = 0

    def __len__(self) -> int:
        return ENDLESS if self.blocks is None else self.blocks

    def __getitem__(self, index: Any) -> StepBatches:
        assert index == self._next, (
            f"block {index} is asked for after block {self._next - 1}"
        )
        self._next += 1

        batches = []
        states = {}
        ids = {}
        for _ in range(self.steps):
            rows, batch_ids = self.stream.take(self.batch_size, self.share.rows)
            own_ids = [batch_ids[row] for row in self.share.rows]
            check_rows(self.limits, rows, own_ids)
            self.consumed += self.batch_size
            batches.append(rows)
            states[self.consumed] = self.stream.state()
            ids[self.consumed] = batch_ids

        block = batches[0] if self.steps == 1 else _concatenated(batches)
        return StepBatches(
            jax.tree.map(self.share.put, block),
            states,
            ids,
        )

    def __repr__(self) -> str:
        return f"blocks of {self.steps} batches of {self.batch_size} samples"


def _concatenated(batches: list[Pair]) -> Pair:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def _remember(known: dict[int, Any], fresh: dict[int, Any]) -> None:
    """Add what belongs to fresh batches, and forget what belongs to old ones."""
    known |= fresh
    for samples in list(known)[: -BATCHES_REMEMBERED - len(fresh)]:
        del known[samples]

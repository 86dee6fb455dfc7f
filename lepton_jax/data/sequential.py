"""A `Dataset` as a feed: threads read it ahead of its use; its position is a state.

One thread at a time draws the samples of the next block, in order, which reads nothing;
then it reads them while another one draws the next (`readahead.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax.data.arrays import Pair
from lepton_jax.data.feed import Feed, FeedSpec, Position, Share, check_rows
from lepton_jax.data.pipeline import Dataset, open_stream
from lepton_jax.data.readahead import Readahead
from lepton_jax.data.streams import Draw, Hint, Padding

# Blocks whose positions and identifiers are kept: more than are on their way to the
# devices, which `train/loop.py` limits to 8 calls. Assumption.
BLOCKS_REMEMBERED = 64


class Drawn(NamedTuple):
    """A batch that is drawn, and perhaps not read.

    Attributes:
      draw: its samples.
      before: samples consumed before it.
      state: the position after it.
    """

    draw: Draw
    before: int
    state: Position

    @property
    def after(self) -> int:
        """Samples consumed once it is."""
        return self.before + len(self.draw)


class StepBatches(NamedTuple):
    """The batches of one block, as a thread hands them over.

    Attributes:
      rows: (inputs, targets) on the devices.
      batches: what they were made of.
    """

    rows: Any
    batches: Sequence[Drawn]


class SequentialFeed(Feed):
    """A `Dataset`, read by threads ahead of its use."""

    def __init__(self, data: Dataset, spec: FeedSpec):
        super().__init__(spec.start, spec.block_samples)
        saved = spec.saved("stream")
        assert spec.start == 0 or saved is not None or data.epoch_samples, (
            "the position of a data set that is read in order is its state"
        )
        blocks = SequentialBlocks(data, spec, saved)
        half = data.budget.memory // 2  # the other half holds samples: `Samples.held`
        self._blocks: Readahead[StepBatches] = Readahead(
            blocks.decide,
            replace(data.budget, memory=half),
            blocks.block_bytes,
        )
        self._states: dict[int, Position] = {spec.start: saved or {}}
        self._draws: dict[int, Draw] = {}
        self._remembered = BLOCKS_REMEMBERED * spec.steps
        self._padding = Padding(0, 0)
        self._held = blocks.stream.held

    def at(self, samples: int) -> Position:
        stream = self._states[samples]
        return {"samples": samples, "grain": None, "stream": stream}

    def names(self, samples: int) -> list[str]:
        return self._draws[samples].identifiers()

    def measured(self) -> dict[str, float]:
        measured = self._blocks.tuning.measured()
        measured["bytes"] += self._held.bytes
        padded, total = self._padding
        if total:
            measured["padding"] = padded / total
        return measured

    def close(self) -> None:
        self._blocks.close()

    def _next_block(self) -> Any:
        block = next(self._blocks)
        for batch in block.batches:
            self._states[batch.after] = batch.state
            self._draws[batch.after] = batch.draw
            self._padding = _sum(self._padding, batch.draw.padding())
        _forget(self._states, self._remembered)
        _forget(self._draws, self._remembered)
        return block.rows


class SequentialBlocks:
    """The blocks of a `Dataset`, one after the other.

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
        if not saved and spec.start:
            self.stream.skip(spec.start)
        self.share: Share = spec.share()
        self.limits = spec.limits
        self.batch_size = spec.batch_size
        self.steps = spec.steps
        self.blocks_left = spec.blocks
        self.consumed = spec.start

        own_samples = len(self.share.rows) * spec.steps
        self.block_bytes = self.stream.sample_bytes * own_samples

    def decide(self) -> partial[StepBatches]:
        """Draw the next block; return what reads it."""
        if self.blocks_left is not None:
            if not self.blocks_left:
                raise StopIteration
            self.blocks_left -= 1

        batches = []
        for _ in range(self.steps):
            draw = self.stream.draw(self.batch_size)
            batches.append(Drawn(draw, self.consumed, self.stream.state()))
            self.consumed += self.batch_size
        return partial(self._read, batches, self.stream.hints())

    def _read(
        self,
        batches: Sequence[Drawn],
        hints: Sequence[Hint],
    ) -> StepBatches:
        parts = [self._read_batch(batch) for batch in batches]
        block = parts[0] if self.steps == 1 else _concatenated(parts)
        on_devices = jax.tree.map(self.share.put, block)
        for hint in hints:
            hint.reader.hold(self._own(hint))
        return StepBatches(on_devices, batches)

    def _read_batch(self, batch: Drawn) -> Pair:
        rows = self.stream.read(batch.draw, self.share.rows, batch.before)
        if self.limits:
            names = batch.draw.take(self.share.rows).identifiers()
            check_rows(self.limits, rows, names)
        return rows

    def _own(self, hint: Hint) -> np.ndarray:
        """Return the row groups that this host's rows will mostly be of.

        A batch is arranged by row group, so its rows' share of the batch is their
        share of the groups.
        """
        first = self.share.rows[0] / self.batch_size
        stop = (self.share.rows[-1] + 1) / self.batch_size
        is_own = (hint.ranks < stop) & (hint.ranks + hint.width > first)
        return hint.groups[is_own]


def _sum(
    left: Padding,
    right: Padding,
) -> Padding:
    return Padding(left.padded + right.padded, left.total + right.total)


def _concatenated(batches: list[Pair]) -> Pair:
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


def _forget(
    known: dict[int, Any],
    most: int,
) -> None:
    """Forget what belongs to batches from long ago."""
    for samples in list(known)[:-most]:
        del known[samples]

"""The training batches of a run, and where in the data it is.

The feed reads blocks of `steps_per_call` batches. A call of the devices may take less
than a block, because it ends where something may be due; the next call then takes the
rest of it:

    block     |  1   2   3   4  |  5   6   7   8  |     steps_per_call=4
    calls     |  1   2   3 | 4  |  5   6 |  7   8 |     save_every=3
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import grain

from lepton_jax.data import Dataset, Feed, blocks_between, open_feed
from lepton_jax.hosts import agreement, phase
from lepton_jax.train.program import Program
from lepton_jax.train.run_record import Position, order_of


class Piece(NamedTuple):
    """Batches `start` to `stop` of a block on the devices.

    Where the samples lie on the devices already a block holds their indices, and `data`
    the samples.
    """

    block: Any
    start: int
    stop: int
    data: Any


class Supply:
    """Blocks of training batches, read ahead from a position on once it is open.

    Args:
      program: for which the blocks are laid out.
      train: the data set.
      position: where to begin.
      until: the last step.

    Attributes:
      position: of the first sample that the next step consumes.
      jumps: step to the position at which the data goes on after it, where a run that
        is replayed went back.
    """

    def __init__(
        self,
        program: Program,
        train: Any,
        position: Position,
        until: int,
    ):
        self.program = program
        self.train = train
        self.position = position
        self.until = until
        jumps = program.controller.limits.get("jumps", {})
        self.jumps: dict[int, Position] = {
            after: Position.from_json(place) for after, place in jumps.items()
        }
        self._per_block = program.plan.steps_per_call
        self._batch_size = program.recipe.batch_size
        self._order = order_of(program.recipe, train)
        self._waited = 0.0
        self._feed: Feed | None = None

    def open(self, step: int) -> None:
        """Begin to read for the step after this one."""
        recipe = self.program.recipe
        is_resident = self.program.plan.data == "resident"
        self._feed = open_feed(
            self.train,
            batch_size=self._batch_size,
            steps=self._per_block,
            sharding=self.program.block_sharding,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            position=self.position.to_json(),
            blocks=blocks_between(step, self.until, self._per_block),
            resident=is_resident,
            limits=self.program.limits,
        )
        self._resident = None
        if is_resident:
            self._resident = self.program.resident(self.train)
        self._block: Any = None
        self._offset = self._per_block

    def jump(self, step: int) -> None:
        """Go on elsewhere, if the run that is replayed did so after this step."""
        if step in self.jumps:
            self.go_on(step, self.jumps.pop(step))

    def go_on(
        self,
        step: int,
        position: Position,
    ) -> None:
        """Go on with the step after this one, from another position."""
        self.position = position
        self.close()
        self.open(step)

    def take(
        self,
        most: int,
        are_busy: Callable[[], bool] = lambda: False,
    ) -> Piece:
        """Return the next batches: the rest of a block, or `most` of them.

        Args:
          most: batches.
          are_busy: whether the devices still compute. A wait at whose end they do has
            cost nothing, and is not counted.
        """
        if self._offset == self._per_block:
            began = time.perf_counter()
            with phase.phase("data"):
                self._block = next(self._reader)
                self._offset = 0
            if not are_busy():
                self._waited += time.perf_counter() - began
        start = self._offset
        self._offset += min(self._per_block - start, most)
        return Piece(self._block, start, self._offset, self._resident)

    def advance(self) -> None:
        """Move the position past the batches taken, which the devices have now."""
        steps_left = self._per_block - self._offset
        feed = self._reader.state(steps_left * self._batch_size)
        self.position = Position(feed, self._order)

    def go_back(
        self,
        position: Position,
        steps: int,
    ) -> None:
        """Move to an earlier position, less a number of steps."""
        if steps:
            samples = position.samples - steps * self._batch_size
            position = Position(self._reader.at(samples), self._order)
        self.position = position

    def names(self, steps_back: int = 0) -> list[str]:
        """Return the names of the samples in the last batch, or in one before it."""
        consumed = self.position.samples - steps_back * self._batch_size
        return self._reader.names(consumed)

    def take_waited(self) -> float:
        """Return the seconds that the devices waited for data since the last call."""
        waited = self._waited
        self._waited = 0.0
        return waited

    def measured(self) -> dict[str, float]:
        """Return what reading takes and gives; see `Feed.measured`."""
        return self._reader.measured()

    def read_again(self) -> tuple[Any, Any] | None:
        """Return the batch before the position once more; None: it can't be read."""
        if agreement.hosts() > 1 or isinstance(self.train, grain.IterDataset):
            return None  # each host has its own rows; or the data can't be read twice
        start: Any = self.position.samples - self._batch_size
        if start < 0:
            return None
        if isinstance(self.train, Dataset):
            start = self._reader.at(start)
        recipe = self.program.recipe
        feed = open_feed(
            self.train,
            batch_size=self._batch_size,
            steps=1,
            sharding=self.program.batch_sharding,
            seed=recipe.seed,
            shuffle=recipe.shuffle,
            position=start,
            blocks=1,
        )
        try:
            return next(feed)
        finally:
            feed.close()

    def close(self) -> None:
        """Stop reading ahead."""
        if self._feed is not None:
            self._feed.close()

    @property
    def _reader(self) -> Feed:
        assert self._feed is not None, "the supply is not open"
        return self._feed

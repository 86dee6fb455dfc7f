"""Data sets of Grain's, as samples by position or as their own iterator gives them."""

from __future__ import annotations

from typing import Any

import grain
import jax
import numpy as np

from lepton_jax.data.arrays import Pair
from lepton_jax.data.feed import Feed, FeedSpec, Position, check_rows, reading
from lepton_jax.errors import DataError


class GrainByPosition:
    """A `grain.MapDataset` of pairs (inputs, targets) as an endless sequence."""

    checked_when_read = True
    many_may_read = True  # as Grain's own threads do

    def __init__(
        self,
        data: grain.MapDataset,
        seed: int,
        shuffle: bool,
    ):
        seeded = data.seed(seed)
        self.data = (seeded.shuffle() if shuffle else seeded).repeat()

    def rows(
        self,
        start: int,
        stop: int,
        wanted: Any = slice(None),
    ) -> Pair:
        """Return the samples at positions start to stop, those `wanted` of them."""
        positions = np.arange(start, stop)[wanted]
        with reading():
            elements = [self.data[int(position)] for position in positions]
            return pair(jax.tree.map(lambda *leaves: np.stack(leaves), *elements))

    def ids(
        self,
        start: int,
        stop: int,
    ) -> list[str]:
        """Return the positions as words: Grain does not say which sample is at one."""
        return [str(position) for position in range(start, stop)]


class IteratedFeed(Feed):
    """A `grain.IterDataset`, whose own iterator holds the position."""

    def __init__(
        self,
        data: grain.IterDataset,
        spec: FeedSpec,
    ):
        assert spec.steps == 1, (
            "the position of an iterable data set is known between its batches only"
        )
        super().__init__(spec.start, spec.block_samples)
        self._batch_size = spec.batch_size
        self._share = spec.share()
        self._limits = spec.limits
        batches = data.batch(spec.batch_size, drop_remainder=True).map(pair)
        self._iterator = iter(batches)
        saved = spec.saved("grain")
        if saved is not None:
            self._iterator.set_state(saved)

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            raise DataError(
                f"the data ended after {self._samples} samples",
                where="Recipe.train",
                remedy=(
                    "call .repeat() on the Grain data set, or train for fewer steps"
                ),
            ) from None

    def at(self, samples: int) -> Position:
        return {"samples": samples, "grain": self._iterator.get_state()}

    def names(self, samples: int) -> list[str]:
        return [str(place) for place in range(samples - self._batch_size, samples)]

    def close(self) -> None:
        self._iterator.close()

    def _next_block(self) -> Any:
        batch = next(self._iterator)
        wanted = self._share.wanted
        rows = jax.tree.map(lambda x: np.asarray(x)[wanted], batch)
        check_rows(
            self._limits,
            rows,
            self._samples + self._share.rows,
        )
        return self._share.put_all(rows)


def pair(element: Any) -> Pair:
    """Return an element of a Grain data set as (inputs, targets).

    Raises:
      DataError: it is no pair.
    """
    if not (isinstance(element, tuple | list) and len(element) == 2):
        raise DataError(
            f"an element of the Grain data set is a {type(element).__name__}",
            where="Recipe.train",
            remedy="map it to a pair (inputs, targets)",
        )
    return element[0], element[1]

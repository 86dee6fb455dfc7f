"""A random order of samples that lie in row groups, which are read whole.

A permutation of all samples would read a whole group for each sample. Here, each epoch
the groups are put in a random order and divided into windows of some groups, and the
samples of a window are permuted. Only the groups of a window, and by and by those of
the next, are held:

    groups 0 to 5 of 2 samples each, windows of 2 groups
    order of the groups      4 1 | 5 0 | 2 3
    samples of the windows   8 9 2 3 | 10 11 0 1 | 4 5 6 7
    permuted                 9 2 8 3 | 0 11 10 1 | 6 5 4 7

Where the groups themselves are in a random order in the files, as preparation writes
them, a window is a random sample of all. Where they are sorted by class, a batch holds
the classes of its window's groups alone; `docs/data.md` says how much that is worth.
Every sample comes once an epoch. A position says all; nothing is drawn in turn.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lepton_jax.data.shuffling import COMPUTED, ROUNDS, key_of, scattered, words


class Window(NamedTuple):
    """Some groups whose samples are permuted together.

    Attributes:
      groups: their numbers, in the epoch's order, (k,).
      ends: where each ends, counted in samples from the window's beginning, (k,).
      start: the window's first position in the epoch.
    """

    groups: np.ndarray
    ends: np.ndarray
    start: int


class Epoch(NamedTuple):
    """The order of the groups in one epoch.

    Attributes:
      number: of the epoch.
      order: the groups, (groups,).
      ends: where each ends, counted in samples, in this order, (groups,).
    """

    number: int
    order: np.ndarray
    ends: np.ndarray


class WindowOrder:
    """An endless sequence of indices, each epoch every sample once.

    Args:
      sizes: samples of each group, in the order of their indices, (groups,).
      width: groups of a window.
      seed: of the order.
      name: of the source.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        width: int,
        seed: int,
        name: str,
    ):
        self.sizes = np.asarray(sizes, np.int64)
        self.samples = int(self.sizes.sum())
        self.width = min(width, len(self.sizes))
        self._firsts = np.cumsum(self.sizes) - self.sizes
        self._key = key_of(seed, name)
        self._epochs: dict[int, Epoch] = {}
        # epochs and indices that have been computed, from position `_start` on
        self._start = 0
        self._ahead = (np.empty(0, np.int64), np.empty(0, np.int64))

    def at(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, indices) from position `start` on, int64 (count,) each."""
        first = start - self._start
        if first < 0 or first + count > len(self._ahead[0]):
            self._ahead = self._computed(start, max(count, COMPUTED))
            self._start = start
            first = 0
        epochs, indices = self._ahead
        return epochs[first : first + count], indices[first : first + count]

    def _computed(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        epochs = [np.empty(0, np.int64)]
        indices = [np.empty(0, np.int64)]
        stop = start + count
        while start < stop:
            number, offset = divmod(start, self.samples)
            epoch = self._epoch(number)
            window = self._window(epoch, self._window_at(epoch, offset))
            until = min(stop - start, window.start + int(window.ends[-1]) - offset)
            offsets = np.arange(offset, offset + until) - window.start
            indices.append(self._indices(epoch, window, offsets))
            epochs.append(np.full(until, number, np.int64))
            start += until
        return np.concatenate(epochs), np.concatenate(indices)

    def groups_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the group of each sample."""
        return np.searchsorted(self._firsts, indices, "right") - 1

    def upcoming(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return groups of the next window that had better be read now, and ranks.

        They are read by and by while the present window is used, as many of them at
        each position as are due there.

        Args:
          start: the position that is used now.
          count: samples that are used.

        Returns:
          (groups, ranks): the ranks of the groups' numbers in the next window, from 0
          to below 1.
        """
        groups = [np.empty(0, np.int64)]
        ranks = [np.empty(0)]
        stop = start + count
        while start < stop:
            number, offset = divmod(start, self.samples)
            epoch = self._epoch(number)
            here = self._window_at(epoch, offset)
            window = self._window(epoch, here)
            following = self._following(epoch, here)

            size = int(window.ends[-1])
            done = offset - window.start
            until = min(done + stop - start, size)
            first, last = -(-np.array([done, until]) * len(following) // size)
            groups.append(following[first:last])
            place = np.searchsorted(np.sort(following), following[first:last])
            ranks.append(place / len(following))
            start += until - done
        return np.concatenate(groups), np.concatenate(ranks)

    def _following(
        self,
        epoch: Epoch,
        here: int,
    ) -> np.ndarray:
        """Return the groups of the window after window `here`."""
        if (here + 1) * self.width < len(epoch.order):
            return self._window(epoch, here + 1).groups
        return self._window(self._epoch(epoch.number + 1), 0).groups

    def _epoch(self, number: int) -> Epoch:
        if number not in self._epochs:
            keys = words(
                self._key ^ number,
                np.arange(len(self.sizes)),
            )
            order = np.argsort(keys, kind="stable")
            ends = np.cumsum(self.sizes[order])
            # the present epoch and the next are in use at an epoch's end
            kept = [self._epochs[n] for n in self._epochs if abs(n - number) == 1]
            self._epochs = {epoch.number: epoch for epoch in kept}
            self._epochs[number] = Epoch(number, order, ends)
        return self._epochs[number]

    def _window_at(
        self,
        epoch: Epoch,
        offset: int,
    ) -> int:
        """Return the number of the window that a place in the epoch lies in."""
        slot = int(np.searchsorted(epoch.ends, offset, "right"))
        return slot // self.width

    def _window(
        self,
        epoch: Epoch,
        number: int,
    ) -> Window:
        slots = slice(number * self.width, (number + 1) * self.width)
        groups = epoch.order[slots]
        ends = np.cumsum(self.sizes[groups])
        start = int(epoch.ends[slots][0] - self.sizes[groups[0]])
        return Window(groups, ends, start)

    def _indices(
        self,
        epoch: Epoch,
        window: Window,
        offsets: np.ndarray,
    ) -> np.ndarray:
        """Return the samples at some offsets in a window."""
        size = int(window.ends[-1])
        key = words(
            self._key ^ epoch.number, np.array([len(self.sizes) + window.start])
        )
        places = scattered(offsets, size, words(int(key[0]), np.arange(ROUNDS)))

        slots = np.searchsorted(window.ends, places, "right")
        groups = window.groups[slots]
        before = window.ends[slots] - self.sizes[groups]
        return self._firsts[groups] + places - before


def mixedness(
    groups: np.ndarray,
    batch_size: int,
) -> float:
    """Measure a shuffle: how evenly a batch holds the groups of the whole epoch.

    It is the variance of a group's count in a batch that drawing without order would
    give, over the one that there is: about 1 for a perfect shuffle, 0 where each batch
    comes from few groups.

    Args:
      groups: the group of each sample of an epoch, in its order, int (samples,).
      batch_size: samples of a batch.
    """
    batches = len(groups) // batch_size
    kinds = int(groups.max()) + 1
    rows = groups[: batches * batch_size].reshape(batches, batch_size)
    counts = np.stack([np.bincount(row, minlength=kinds) for row in rows])

    shares = np.bincount(groups, minlength=kinds) / len(groups)
    correction = (len(groups) - batch_size) / (len(groups) - 1)
    expected = batch_size * shares * (1 - shares) * correction
    measured = ((counts - batch_size * shares) ** 2).mean(axis=0)
    return float(expected.sum() / measured.sum())

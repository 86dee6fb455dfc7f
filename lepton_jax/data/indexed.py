"""Samples on a disk that are read by their index."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from lepton_jax.data.memory import HeldGroups
from lepton_jax.data.rows import Rows
from lepton_jax.data.shuffling import Order
from lepton_jax.data.windows import WindowOrder

# Bytes of the row groups that are shuffled together, over all sources of a data set.
# Part of the order, so it must not depend on the machine. Assumption: large enough that
# a window holds thousands of samples, and that twice of it fit into a laptop's memory.
WINDOW_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Groups:
    """The row groups of a source, in the order of their samples.

    Attributes:
      sizes: samples of each, int64 (groups,).
      bytes: of all of them in memory.
    """

    sizes: np.ndarray
    bytes: int

    def width(self, sources: int) -> int:
        """Return the groups of a window, if so many sources share the memory."""
        mean = max(1, self.bytes // len(self.sizes))
        return max(1, WINDOW_BYTES // sources // mean)


class Indexed(ABC):
    """Samples on a disk.

    Attributes:
      digest: hash of the content, or of what says that it is the same.
      groups: the row groups that are read whole; None: each sample is read alone.
      sizes: bytes of each sample, if they are known without reading, (samples,).
    """

    digest: str
    groups: Groups | None = None
    sizes: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(
        self,
        indices: np.ndarray,
        held: HeldGroups,
    ) -> Rows:
        """Read samples.

        Several threads may call it at once.

        Args:
          indices: at least one.
          held: what is in memory already, shared by all sources of a feed.
        """

    def hold(
        self,
        group: int,
        held: HeldGroups,
    ) -> None:
        """Read a row group that will be wanted soon, if it is not held yet."""
        raise AssertionError("each sample is read alone")

    def order(
        self,
        seed: int,
        name: str,
        shuffle: bool,
        sources: int,
    ) -> Order | WindowOrder:
        """Return the order of the samples.

        Args:
          seed: of the order.
          name: of the source.
          shuffle: whether it is random.
          sources: how many sources there are in the data set.
        """
        if not shuffle or self.groups is None:
            return Order(len(self), seed, name, shuffle)
        return WindowOrder(
            self.groups.sizes,
            self.groups.width(sources),
            seed,
            name,
        )


class IndexedReader:
    """Reader of a source whose samples lie on a disk.

    Args:
      data: what to read.
      held: row groups in memory, of all sources.
    """

    lengths = None

    def __init__(
        self,
        data: Indexed,
        held: HeldGroups,
    ):
        self.data = data
        self.held = held

    def __len__(self) -> int:
        return len(self.data)

    def read(
        self,
        indices: np.ndarray,
        epochs: np.ndarray | None = None,
    ) -> Rows:
        return self.data.read(indices, self.held)

    def hold(self, groups: np.ndarray) -> None:
        """Read row groups that will be wanted soon."""
        for group in groups.tolist():
            self.data.hold(group, self.held)


def spread_evenly(sizes: np.ndarray) -> np.ndarray:
    """Return ranks by which any equal division of a batch is balanced in bytes.

    The samples are ordered by size and dealt out by the reversed bits of their ranks'
    Gray code: like the snake in which teams are chosen, at each halving anew. So each
    half, quarter and eighth of the batch, which a host may read, has its share of large
    and small ones:

    >>> sizes = np.array([1, 2, 3, 4, 5, 6, 7, 8])
    >>> order = np.argsort(spread_evenly(sizes))
    >>> sizes[order].tolist()
    [1, 8, 4, 5, 2, 7, 3, 6]

    Args:
      sizes: bytes of each sample, (n,).

    Returns:
      numbers from 0 to below 1, (n,).
    """
    count = len(sizes)
    ranks = np.empty(count, np.int64)
    ranks[np.argsort(sizes, kind="stable")] = np.arange(count)
    codes = ranks ^ (ranks >> 1)
    bits = max(1, (count - 1).bit_length())

    dealt = np.zeros(count, np.int64)
    for bit in range(bits):
        dealt |= ((codes >> bit) & 1) << (bits - 1 - bit)
    return dealt / 2**bits


def positions_in(batch: Any) -> np.ndarray:
    """Return the ranks of numbers, from 0 to below 1; equal ones keep their order."""
    order = np.argsort(batch, kind="stable")
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks / max(1, len(order))

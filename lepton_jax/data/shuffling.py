"""Random orders of a source's samples, any stretch of which is computed alone.

They rest on integer arithmetic only, so they are the same under every version of NumPy;
those of its `Generator` are not promised to be (NEP 19), and a run may be resumed years
later.

A large source is not sorted: its permutation is a cipher. A Feistel network over 2^bits
words splits a word into a high and a low half and, round by round, XORs one half with a
hash of the other; each round can be undone, so no two words become one. With 5 samples
there are 3 bits, so 8 words. Say that the network sends 0 to 6: 6 is no sample, so it
is sent through again, and perhaps becomes 2. The walk ends, since the network is a
permutation of the 8 words and 0 itself lies on the same cycle; and as every walk can be
walked back, no two samples end at the same one.
"""

from __future__ import annotations

import hashlib

import numpy as np

# Samples up to which an order is kept in memory, sorted by random keys. Assumption: it
# takes half a megabyte for an epoch, which is little, and sorting takes milliseconds.
SORTED = 2**16

# Positions that are computed at once: NumPy's calls cost more than their work on a few.
# Assumption.
COMPUTED = 2**12

# Rounds of the Feistel network. Assumption: twice the four with which Luby and Rackoff
# 1988 prove one to be a strong pseudo-random permutation.
ROUNDS = 8

# The constants of splitmix64 (Steele, Lea and Flood 2014, figure 16).
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


class Order:
    """An endless sequence of indices, each epoch a permutation by (seed, name, epoch).

    Up to `SORTED` samples, it is the permutation that sorts random keys. Above, it is a
    Feistel network of 8 rounds over the next power of two, walked until it lands inside
    (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"): it takes no
    memory and no time at an epoch's start, whatever the size.
    """

    def __init__(
        self,
        samples: int,
        seed: int,
        name: str,
        shuffle: bool,
    ):
        self.samples = samples
        self.shuffle = shuffle
        self._key = key_of(seed, name)

        # whole epochs that have been sorted, from epoch `_first` on
        self._first = 0
        self._sorted = np.empty((0, samples), np.int64)

        # epochs and indices that have been computed, from position `_start` on
        self._start = 0
        self._epochs = np.empty(0, np.int64)
        self._indices = np.empty(0, np.int64)

    def at(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (epochs, indices) from position `start` on, int64 (count,) each."""
        first = start - self._start
        if first < 0 or first + count > len(self._epochs):
            ahead = max(count, COMPUTED)
            self._epochs, self._indices = self._computed(start, ahead)
            self._start = start
            first = 0

        wanted = slice(first, first + count)
        return self._epochs[wanted], self._indices[wanted]

    def _computed(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        positions = np.arange(
            start,
            start + count,
            dtype=np.int64,
        )
        epochs, offsets = np.divmod(positions, self.samples)
        if not self.shuffle:
            return epochs, offsets
        if self.samples <= SORTED:
            return epochs, self._sorted_indices(start, count)

        indices = np.empty_like(offsets)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._walked(offsets[here], epoch)
        return epochs, indices

    def _sorted_indices(
        self,
        start: int,
        count: int,
    ) -> np.ndarray:
        first = start // self.samples
        last = (start + count - 1) // self.samples
        if first < self._first or last >= self._first + len(self._sorted):
            last = max(last, first + COMPUTED // self.samples)
            words = self._words(np.arange(first, last + 1))[:, None]
            steps = np.arange(self.samples, dtype=np.uint64) * np.uint64(_GOLDEN)
            keys = _mixed(words + steps)
            self._first = first
            self._sorted = keys.argsort(axis=1, kind="stable")

        skipped = start - self._first * self.samples
        return self._sorted.reshape(-1)[skipped : skipped + count]

    def _walked(
        self,
        offsets: np.ndarray,
        epoch: int,
    ) -> np.ndarray:
        """Send the offsets of an epoch through the network until all are samples."""
        keys = self._words(epoch * ROUNDS + np.arange(ROUNDS))
        return scattered(offsets, self.samples, keys)

    def _words(self, numbers: np.ndarray) -> np.ndarray:
        """Return a random word for each number, by this order's key."""
        return words(self._key, numbers)


def key_of(seed: int, name: str) -> int:
    """Return the key of a source's orders, 64 bits."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def words(key: int, numbers: np.ndarray) -> np.ndarray:
    """Return a random word for each number: uint64, of the numbers' shape."""
    steps = numbers.astype(np.uint64) * np.uint64(_GOLDEN)
    return _mixed(steps + np.uint64(key))


def mixed_keys(
    keys: np.ndarray,
    numbers: np.ndarray,
) -> np.ndarray:
    """Return other keys, by keys and a number each: uint64, of their shape."""
    return _mixed(keys + numbers.astype(np.uint64) * np.uint64(_GOLDEN))


def uniform(
    keys: np.ndarray,
    count: int,
) -> np.ndarray:
    """Return random numbers from 0 to below 1 by the keys of samples.

    It is for functions that augment a batch at once; each sample's numbers depend on
    its own key alone.

    >>> uniform(np.array([1, 2], np.uint64), 3).shape
    (2, 3)

    Args:
      keys: of the samples, uint64 (n,).
      count: numbers for each sample.

    Returns:
      float32 (n, count).
    """
    numbers = np.arange(1, count + 1, dtype=np.uint64)[None]
    random = mixed_keys(keys[:, None], numbers)
    # the 24 bits that a float32's fraction holds
    return (random >> np.uint64(40)).astype(np.float32) / np.float32(2**24)


def scattered(
    offsets: np.ndarray,
    size: int,
    keys: np.ndarray,
) -> np.ndarray:
    """Send numbers through a permutation of 0 to `size` - 1.

    Args:
      offsets: from 0 to size - 1, int64 (n,).
      size: of the permutation, at least 1.
      keys: of the Feistel network's rounds, uint64 (ROUNDS,).

    Returns:
      where each goes, int64 (n,).
    """
    bits = (size - 1).bit_length()
    low_bits = bits // 2
    high_mask = np.uint64(2 ** (bits - low_bits) - 1)
    low_mask = np.uint64(2**low_bits - 1)
    shift = np.uint64(low_bits)

    numbers = offsets.astype(np.uint64)
    outside = np.arange(len(offsets))  # places of those that are not below `size` yet
    while len(outside):
        high = numbers[outside] >> shift
        low = numbers[outside] & low_mask
        for i in range(0, ROUNDS, 2):
            high ^= _mixed(low ^ keys[i]) & high_mask
            low ^= _mixed(high ^ keys[i + 1]) & low_mask
        numbers[outside] = high << shift | low
        outside = outside[numbers[outside] >= size]
    return numbers.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """Map 64-bit words to others, one to one, so that each bit depends on all.

    This is splitmix64 (Steele, Lea and Flood 2014, figure 16).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))

"""Random orders of a source's samples, any stretch of which is computed alone.

They rest on integer arithmetic only, so they are the same under every version of NumPy;
those of its `Generator` are not promised to be (NEP 19), and a run may be resumed years
later.
"""

from __future__ import annotations

import hashlib

import numpy as np

SORTED = 2**16  # samples up to which an order is kept in memory, sorted by random keys
# positions that are computed at once: NumPy's calls cost more than their work on a few
COMPUTED = 2**12
ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


class Order:
    """An endless sequence of `samples` indices an epoch; each epoch is a permutation by
    (seed, name, epoch).

    Up to `SORTED` samples, the permutation that sorts random keys. Above, a Feistel
    network of 8 rounds over the next power of two, walked until it lands inside (Black
    and Rogaway 2002, "Ciphers with arbitrary finite domains"): it takes no memory and
    no time at an epoch's start, whatever the size.
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
        self._key = int.from_bytes(
            hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big"
        )
        self._first = 0
        self._sorted = np.empty((0, samples), np.int64)
        self._start = 0
        self._ahead = (np.empty(0, np.int64),) * 2

    def at(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, indices) at the positions from `start` on, int64 (count,) each."""
        skipped = start - self._start
        if skipped < 0 or skipped + count > len(self._ahead[0]):
            skipped, self._start, self._ahead = (
                0,
                start,
                self._computed(start, max(count, COMPUTED)),
            )
        return (
            self._ahead[0][skipped : skipped + count],
            self._ahead[1][skipped : skipped + count],
        )

    def _computed(
        self,
        start: int,
        count: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        epochs, offsets = np.divmod(
            np.arange(start, start + count, dtype=np.int64), self.samples
        )
        if not self.shuffle:
            return epochs, offsets
        if self.samples <= SORTED:
            return epochs, self._kept(start, count)
        indices = np.empty_like(offsets)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = self._walked(offsets[here], epoch)
        return epochs, indices

    def _kept(
        self,
        start: int,
        count: int,
    ) -> np.ndarray:
        first = start // self.samples
        last = (start + count - 1) // self.samples
        if first < self._first or last >= self._first + len(self._sorted):
            last = max(last, first + COMPUTED // self.samples)
            words = self._words(np.arange(first, last + 1))[:, None]
            keys = _mixed(
                words + np.arange(self.samples, dtype=np.uint64) * np.uint64(_GOLDEN)
            )
            self._first = first
            self._sorted = keys.argsort(axis=1, kind="stable")
        return self._sorted.reshape(-1)[start - self._first * self.samples :][:count]

    def _walked(
        self,
        offsets: np.ndarray,
        epoch: int,
    ) -> np.ndarray:
        bits = (self.samples - 1).bit_length()
        low = bits // 2
        masks = np.uint64(2 ** (bits - low) - 1), np.uint64(2**low - 1)
        keys = self._words(epoch * ROUNDS + np.arange(ROUNDS))
        out = offsets.astype(np.uint64)
        outside = np.arange(len(offsets))
        while len(outside):
            high = out[outside] >> np.uint64(low)
            rest = out[outside] & masks[1]
            for i in range(0, ROUNDS, 2):
                high ^= _mixed(rest ^ keys[i]) & masks[0]
                rest ^= _mixed(high ^ keys[i + 1]) & masks[1]
            out[outside] = high << np.uint64(low) | rest
            outside = outside[out[outside] >= self.samples]
        return out.astype(np.int64)

    def _words(self, numbers: np.ndarray) -> np.ndarray:
        return _mixed(
            numbers.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(self._key)
        )


def _mixed(x: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit words whose bits each depend on all (splitmix64: Steele,
    Lea and Flood 2014, figure 16).
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    return x ^ (x >> np.uint64(31))

"""MinHash: which of many sets are alike, without comparing each with each.

The likeness of two sets is their Jaccard index, the size of what they share divided by
the size of their union. A random function h of their members has its minimum over both
at a shared member with just that probability (Broder: On the resemblance and
containment of documents, 1997):

    "the cat sat"  -> shingles of 5 characters {the c, he ca, e cat, " cat ", ...}
                   -> signature [min h_1, min h_2, ..., min h_128]
                   -> bands     [hash(h_1..h_7), hash(h_8..h_14), ...]

Two sets of likeness s agree in all r values of a band with probability s**r, and in one
band or more of b with probability 1 - (1 - s**r)**b. Such pairs are candidates; their
likeness is then computed from the sets.
"""

from __future__ import annotations

import hashlib
from typing import Literal, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from lepton_jax.data.prepare.steps.content import content_hash

# Shingles whose hashes are computed at once: 128 kB stay in a core's cache.
CACHED = 2**14
# Odd multipliers of 64 bits: the increment and the first factor of SplitMix64 (Steele,
# Lea, Flood: Fast splittable pseudorandom number generators, 2014).
SPREAD = np.uint64(0x9E3779B97F4A7C15)
MIX = np.uint64(0xBF58476D1CE4E5B9)
HALF = np.uint64(32)  # bits


class Sets(NamedTuple):
    """A set of numbers for each row.

    Attributes:
      members: UInt32, of one row after the other, each row's ascending.
      bounds: Int64 [rows + 1], where each row's members begin and end.
    """

    members: np.ndarray
    bounds: np.ndarray

    def of(
        self,
        row: int,
    ) -> np.ndarray:
        """Return the members of one row's set."""
        return self.members[self.bounds[row] : self.bounds[row + 1]]


def choose_bands(
    threshold: float,
    recall: float,
    permutations: int,
) -> tuple[int, int] | None:
    """Return the number of bands and of values a band has.

    As long bands as find a pair of likeness `threshold` with probability `recall`: the
    longer, the fewer pairs are candidates in vain.

    Returns:
      None if no bands do.
    """
    for length in range(permutations, 0, -1):
        bands = permutations // length
        if 1 - (1 - threshold**length) ** bands >= recall:
            return bands, length
    return None


def shingles(
    text: pl.Series,
    size: int,
    of: Literal["characters", "words"],
) -> Sets:
    """Return the hashes of each text's runs of characters or words.

    Case and the amount of white space do not count; between words, nothing else than
    letters and digits does. A text of fewer than `size` has one shingle, all of it; a
    text of none, and a missing one, has none.

    Args:
      text: String.
      size: characters or words of a shingle.
      of: what a shingle is made of.
    """
    units, bounds = _words(text) if of == "words" else _characters(text)
    lengths = np.diff(bounds)
    counts = np.where(
        lengths > 0,
        np.maximum(lengths - size + 1, 1),
        0,
    )
    ends = np.cumsum(counts)
    total = int(counts.sum())
    place = np.arange(total) - np.repeat(
        ends - counts,
        counts,
    )
    first = np.repeat(bounds[:-1], counts) + place
    stop = np.repeat(bounds[1:], counts)

    padding = np.zeros(size, np.uint64)
    units = np.concatenate([units, padding])
    hashes = np.zeros(total, np.uint64)
    for offset in range(size):
        position = first + offset
        unit = units[position] + np.uint64(1)
        unit[position >= stop] = 0
        hashes = (hashes + unit) * SPREAD
    members = _scrambled(hashes) >> HALF
    return _sets_of(members, counts)


def band_keys(
    sets: Sets,
    bands: int,
    length: int,
) -> np.ndarray:
    """Return the keys of each set's bands, UInt64 [rows, bands].

    Args:
      sets: of which none is empty.
      bands: of a signature.
      length: values of a band.
    """
    rows = len(sets.bounds) - 1
    keys = np.zeros(
        (rows, bands),
        np.uint64,
    )
    factors = _factors(bands * length)
    start = 0
    while start < rows:
        limit = sets.bounds[start] + CACHED
        stop = (
            int(
                np.searchsorted(
                    sets.bounds,
                    limit,
                    side="right",
                )
            )
            - 1
        )
        stop = max(stop, start + 1)
        bounds = sets.bounds[start : stop + 1]
        members = sets.members[bounds[0] : bounds[-1]].astype(np.uint64)
        for number, (factor, shift) in enumerate(factors):
            hashes = members * factor
            hashes += shift
            least = np.minimum.reduceat(
                hashes,
                bounds[:-1] - bounds[0],
            )
            band = keys[start:stop, number // length]
            band += least
            band *= SPREAD
        start = stop
    keys += np.arange(
        bands,
        dtype=np.uint64,
    )
    return _scrambled(keys)


def likeness(
    one: np.ndarray,
    other: np.ndarray,
) -> float:
    """Return the Jaccard index of two sets, ascending arrays without repetition."""
    if np.array_equal(one, other):
        return 1.0
    shared = len(
        np.intersect1d(
            one,
            other,
            assume_unique=True,
        )
    )
    return shared / (len(one) + len(other) - shared)


def as_lists(sets: Sets) -> pl.Series:
    """Return sets as a column of lists."""
    array = pa.LargeListArray.from_arrays(
        sets.bounds,
        sets.members,
    )
    return pl.Series(pl.from_arrow(array))


def from_lists(lists: pl.Series) -> Sets:
    """Return sets that stand in a column of lists."""
    sizes = lists.list.len().to_numpy().astype(np.int64)
    members = lists.explode().drop_nulls().to_numpy()
    return Sets(
        members,
        _bounds(sizes),
    )


# ---- internals ----


def _sets_of(members: np.ndarray, counts: np.ndarray) -> Sets:
    """Return the set of each row.

    Args:
      members: of the first row, then of the second, and so on; below 2**32.
      counts: how many each row has, with repetitions.
    """
    # The row is the upper half of the key, the hash the lower one.
    rows = np.repeat(
        np.arange(len(counts), dtype=np.uint64),
        counts,
    )
    keys = np.unique((rows << HALF) | members)
    per_row = np.bincount(
        (keys >> HALF).astype(np.int64),
        minlength=len(counts),
    )
    return Sets(
        keys.astype(np.uint32),
        _bounds(per_row),
    )


def _characters(text: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the code points of all texts, and the bounds of each text's."""
    plain = text.fill_null("").str.to_lowercase()
    plain = plain.str.replace_all(
        r"\s+",
        " ",
    ).str.strip_chars()
    sizes = plain.str.len_chars().to_numpy().astype(np.int64)
    encoded = "".join(plain).encode("utf-32-le")
    codes = np.frombuffer(
        encoded,
        "<u4",
    ).astype(np.uint64)
    return codes, _bounds(sizes)


def _words(text: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return hashes of the words of all texts, and the bounds of each text's."""
    lower = text.fill_null("").str.to_lowercase()
    words = lower.str.extract_all(r"\w+")
    sizes = words.list.len().to_numpy().astype(np.int64)
    every = words.explode().drop_nulls().to_frame()
    hashes = content_hash(every)["hash_low"].to_numpy()
    return hashes, _bounds(sizes)


def _bounds(sizes: np.ndarray) -> np.ndarray:
    """Return where each of some runs begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(sizes)])


def _factors(count: int) -> list[tuple[np.uint64, np.uint64]]:
    """Return factor (odd) and shift of each random function, the same everywhere."""
    stream = hashlib.shake_256(b"lepton minhash").digest(16 * count)
    numbers = (
        np.frombuffer(stream, "<u8")
        .astype(np.uint64)
        .reshape(
            count,
            2,
        )
    )
    return [(factor | np.uint64(1), shift) for factor, shift in numbers]


def _scrambled(hashes: np.ndarray) -> np.ndarray:
    """Spread each bit over all (the finalizer of SplitMix64, shortened)."""
    hashes = (hashes ^ (hashes >> np.uint64(30))) * MIX
    hashes = (hashes ^ (hashes >> np.uint64(27))) * SPREAD
    return hashes ^ (hashes >> np.uint64(31))

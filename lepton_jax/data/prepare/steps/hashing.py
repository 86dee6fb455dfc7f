"""Hashes of rows and of values that are the same on every machine and version.

Polars' own `hash` may change with its version, so it decides nothing that is stored.
Numbers go through the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable
pseudorandom number generators, OOPSLA 2014), whose arithmetic is modulo 2**64. The hash
of a short text starts from its length, and takes in its UTF-8 bytes eight at a time:

    h = mix(11)    h = mix(h + "Hello wo")    h = mix(h + "rld" and five zero bytes)

A long one is hashed with BLAKE2b (RFC 7693). The hashes are even, but not secret: a
person who wants two texts to have the same one can find such texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from lepton_jax.data.prepare.steps.columns import text_of
from lepton_jax.data.readers.reader import ROW, SOURCE

# SplitMix64's increment and multipliers.
INCREMENT = 0x9E3779B97F4A7C15
FIRST = 0xBF58476D1CE4E5B9
SECOND = 0x94D049BB133111EB
RANGE = 2**64  # hashes are below

WORD = 8  # bytes that are taken in at a time
LONGEST = 64  # bytes of a text that is hashed in words (assumption: of a key, most are)
NULL = np.uint64(0x6E756C6C)  # hash of no text: "null" in ASCII


def of_row(seed: int) -> pl.Expr:
    """Return the hash of (seed, source, row), UInt64.

    Rows of one source have different hashes: the function is one-to-one.
    """
    return pl.struct(SOURCE, ROW).map_batches(
        _RowHash(of_number(seed)),
        return_dtype=pl.UInt64,
        is_elementwise=True,
    )


def of_values(
    columns: Sequence[str],
    schema: pl.Schema,
    seed: int = 0,
) -> pl.Expr:
    """Return the hash of the values of columns of keys, UInt64; null is a value."""
    texts = [
        text_of(
            name,
            schema[name],
        ).alias(name)
        for name in columns
    ]
    return pl.struct(texts).map_batches(
        _TextHash(of_number(seed)),
        return_dtype=pl.UInt64,
        is_elementwise=True,
    )


def is_below(value: pl.Expr, share: float | pl.Expr) -> pl.Expr:
    """Whether hashes are in the first share of all: true of a share of 1, never of 0.

    Args:
      value: hashes, UInt64.
      share: from 0 to 1.
    """
    # The upper 53 bits are a float64 exactly.
    dropped = pl.lit(2**11, dtype=pl.UInt64)
    upper = (value // dropped).cast(pl.Float64)
    return upper < share * 2.0**53


def of_number(value: int) -> int:
    """Return the hash of an integer, taken modulo 2**64."""
    z = (value + INCREMENT) % RANGE
    z ^= z >> 30
    z = (z * FIRST) % RANGE
    z ^= z >> 27
    z = (z * SECOND) % RANGE
    return z ^ (z >> 31)


def mixed(value: np.ndarray) -> np.ndarray:
    """Return `of_number` of each value, uint64; NumPy wraps around at 2**64."""
    z = value + np.uint64(INCREMENT)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


def of_texts(text: pl.Series) -> np.ndarray:
    """Return the hash of each text, uint64; null has one, too."""
    lengths = text.str.len_bytes().fill_null(0)
    size = lengths.cast(pl.Int64).to_numpy()
    is_short = size <= LONGEST
    hashes = _short_hashes(
        text,
        np.where(is_short, size, 0),
    )
    for row in np.flatnonzero(~is_short):
        hashes[row] = _digest(text[int(row)])
    hashes[text.is_null().to_numpy()] = NULL
    return hashes


# ---- internals ----


@dataclass(frozen=True)
class _RowHash:
    start: int

    def __call__(self, rows: pl.Series) -> pl.Series:
        table = rows.struct.unnest()
        source = _column(table[SOURCE])
        hashes = mixed(source + np.uint64(self.start))
        row = _column(table[ROW])
        return pl.Series(mixed(hashes + row))


@dataclass(frozen=True)
class _TextHash:
    start: int

    def __call__(self, rows: pl.Series) -> pl.Series:
        hashes = np.full(
            len(rows),
            self.start,
            np.uint64,
        )
        for text in rows.struct.unnest().iter_columns():
            own = of_texts(text.cast(pl.String))
            hashes = mixed(hashes + own)
        return pl.Series(hashes)


def _column(series: pl.Series) -> np.ndarray:
    return series.cast(pl.UInt64).to_numpy()


def _short_hashes(text: pl.Series, size: np.ndarray) -> np.ndarray:
    """Hash the first `size` bytes of each text."""
    words, starts = _words(text)
    hashes = mixed(size.astype(np.uint64))
    for position in range(0, int(size.max(initial=0)), WORD):
        rows = np.flatnonzero(size > position)
        word = words[starts[rows] + position]
        # Bytes behind the end are those of the next text.
        surplus = np.maximum(
            position + WORD - size[rows],
            0,
        ).astype(np.uint64)
        bits = np.uint64(8) * surplus
        word = (word << bits) >> bits
        hashes[rows] = mixed(hashes[rows] + word)
    return hashes


def _words(text: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return the eight bytes from each place of all texts, and where each text starts.

    The bytes are a little-endian number, on any machine.
    """
    array = text.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offsets, data = array.buffers()
    starts = np.frombuffer(
        offsets,
        np.int64,
    )[array.offset :][: len(array)]
    content = np.frombuffer(data or b"", np.uint8)
    padded = np.append(
        content,
        np.zeros(WORD, np.uint8),
    )
    words = np.ndarray(
        (len(content) + 1,),
        "<u8",
        padded,
        strides=(1,),
    )
    return words, starts


def _digest(value: str) -> int:
    digest = hashlib.blake2b(
        value.encode(),
        digest_size=WORD,
    )
    return int.from_bytes(digest.digest(), "little")

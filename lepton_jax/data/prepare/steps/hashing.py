"""Hashes of rows and of values that are the same on every machine and version.

Polars' own `hash` may change with its version, so it decides nothing that is stored.
Numbers go through the finalizer of SplitMix64 (Steele, Lea, Flood: Fast splittable
pseudorandom number generators, OOPSLA 2014), whose arithmetic is modulo 2**64, text
through BLAKE2b (RFC 7693) of its UTF-8 bytes.
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
    upper = (
        value
        // pl.lit(
            2**11,
            dtype=pl.UInt64,
        )
    ).cast(pl.Float64)
    return upper < share * 2.0**53


def of_number(value: int) -> int:
    """Return the hash of an integer, taken modulo 2**64."""
    z = (value + INCREMENT) % RANGE
    z = ((z ^ (z >> 30)) * FIRST) % RANGE
    z = ((z ^ (z >> 27)) * SECOND) % RANGE
    return z ^ (z >> 31)


# ---- internals ----


@dataclass(frozen=True)
class _RowHash:
    start: int

    def __call__(self, rows: pl.Series) -> pl.Series:
        table = rows.struct.unnest()
        source = _column(table[SOURCE])
        hashes = _mixed(source + np.uint64(self.start))
        return pl.Series(_mixed(hashes + _column(table[ROW])))


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
            hashes = _mixed(hashes + _hashed(text.cast(pl.String)))
        return pl.Series(hashes)


def _column(series: pl.Series) -> np.ndarray:
    return series.cast(pl.UInt64).to_numpy()


def _mixed(value: np.ndarray) -> np.ndarray:
    """Return `of_number` of each value; numpy's arrays wrap around at 2**64."""
    z = value + np.uint64(INCREMENT)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


def _hashed(text: pl.Series) -> np.ndarray:
    """Hash each distinct text once."""
    distinct = text.unique()
    hashes = [_digest(value) for value in distinct]
    table = pl.DataFrame(
        {
            "text": distinct,
            "hash": pl.Series(
                hashes,
                dtype=pl.UInt64,
            ),
        },
    )
    joined = text.to_frame("text").join(
        table,
        on="text",
        how="left",
        nulls_equal=True,
        maintain_order="left",
    )
    return joined["hash"].to_numpy()


def _digest(value: str | None) -> int:
    # The person separates "no text" from every text.
    person = b"null" if value is None else b"text"
    digest = hashlib.blake2b(
        (value or "").encode(),
        digest_size=8,
        person=person,
    )
    return int.from_bytes(digest.digest(), "little")

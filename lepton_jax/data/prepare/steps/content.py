"""Hashes of rows' content, the same on every machine and with every version.

Polars' own `hash` is fast, but may change with its version. `content_hash` is NumPy's
arithmetic on whole columns, of text as of numbers:

    text      -> bytes   -> 16-bit words w_0, w_1, ...   \
    number    -> 8 bytes -> 16-bit words                  >  sum of w_i * k_i  mod p
    missing   -> a byte that says so                     /   with four sets of keys k

with p = 2**31 - 1 and fixed pseudorandom keys k_i < p. For keys drawn at random two
different sequences of words of one length have the same sum with probability 1 / p
(Carter and Wegman: Universal classes of hash functions, 1979); the length is one more
word, and the four sums make 124 bits. Among 10 million rows, 2**45.5 pairs, a false
duplicate thus has probability 2**-78, so matches are not compared again. Whoever knows
the keys can construct two texts of the same hash: it is no defence against an attacker.

A product is below 2**47 and 64 of them add up to less than 2**53, so that a matrix
product in float64 gives the sums exactly, in any order. Texts of more than MOST_SHORT
bytes go through BLAKE2b (RFC 7693) instead, which is as fast for those.

10 million texts of 102 bytes on average take 3.1 to 4.4 s of one core (measured on a
shared 2-core machine with `python tests/data/prepare/figures_of_steps.py hash`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import polars as pl

PRIME = 2**31 - 1
LANES = 4  # sums of 31 bits each
WORDS = 64  # of 16 bits; the products of more would not add up exactly in float64
CHUNK = 2 * WORDS  # bytes
CHUNKS = 8
MOST_SHORT = CHUNKS * CHUNK  # bytes; beyond, BLAKE2b costs less than its call
# Rows that are hashed at once. Their words stay in a core's cache, and OpenBLAS, which
# divides larger products among threads that wait for each other, leaves them on one
# thread (measured: 3.3 s, and 6 to 18 s with 2**12 to 2**15 rows on two busy cores).
BLOCK = 2**11

HASH = pl.Schema(
    {
        "hash_high": pl.UInt64(),
        "hash_low": pl.UInt64(),
    }
)


def content_hash(table: pl.DataFrame) -> pl.DataFrame:
    """Return the hash of each row, with the columns HASH.

    The same value has the same hash in any width of integer or float; -0.0 is 0.0, and
    all NaNs are one. A missing cell differs from each value.

    Args:
      table: the columns that count, in the order that counts; at least one.
    """
    parts = [_bytes_of(column) for column in table]
    size = sum(part.shape[1] for part in parts)
    if size % 2:
        # Words are of two bytes; a word's missing half is 0.
        padding = np.zeros((len(table), 1), np.uint8)
        parts.append(padding)
    record = np.concatenate(parts, axis=1)
    hashes = _hash_of_records(record, size)
    return pl.DataFrame(
        {
            "hash_high": hashes[:, 0],
            "hash_low": hashes[:, 1],
        }
    )


def hash_expression(columns: Sequence[str | pl.Expr]) -> pl.Expr:
    """Return `content_hash` of columns as an expression: a struct of HASH."""
    return (
        pl.struct(columns)
        .map_batches(
            _hash_of_struct,
            return_dtype=pl.Struct(HASH),
            is_elementwise=True,
        )
        .alias("hash")
    )


# ---- internals ----


def _keys() -> np.ndarray:
    """Return keys, float64 [CHUNKS * WORDS + 1, LANES]; the last is of the length."""
    rows = CHUNKS * WORDS + 1
    source = hashlib.shake_256(b"lepton content hash")
    stream = source.digest(4 * rows * LANES)
    numbers = np.frombuffer(
        stream,
        "<u4",
    ) % np.uint32(PRIME)
    return _floats(numbers).reshape(rows, LANES)


def _floats(numbers: np.ndarray) -> np.ndarray:
    """Return numbers below 2**53 as float64, exactly."""
    return numbers.astype(np.float64)


KEYS = _keys()
# Row n keeps the first n bytes of a chunk.
KEPT_BYTES = np.arange(CHUNK + 1)[:, None]
MASKS = np.where(
    np.arange(CHUNK) < KEPT_BYTES,
    255,
    0,
)
MASKS = MASKS.astype(np.uint8)


def _hash_of_struct(rows: pl.Series) -> pl.Series:
    hashes = content_hash(rows.struct.unnest())
    return hashes.to_struct(rows.name)


def _bytes_of(column: pl.Series) -> np.ndarray:
    """Return a column as bytes, [rows, 17], or [rows, 9] of numbers.

    The last byte is 1 where the value is missing; then the others are 0.
    """
    missing = column.is_null().to_numpy().astype(np.uint8)
    missing = missing[:, None]
    if column.dtype == pl.Null:
        return missing

    column = _simple(column)
    if column.dtype == pl.Binary:
        values = _hash_of_binary(column)
    else:
        values = _number_bits(column)[:, None]
    little_endian = values.dtype.newbyteorder("<")
    raw = values.astype(little_endian).view(np.uint8)
    present = np.where(missing, 0, raw)
    return np.concatenate([present, missing], axis=1)


def _simple(column: pl.Series) -> pl.Series:
    """Return a column as byte strings, or as it is if its values have 8 bytes."""
    dtype = column.dtype
    if _is_array(column):
        column = pl.Series(
            column.name,
            [row.tobytes() for row in column.to_numpy()],
        )
    elif dtype.is_nested():
        encoded = pl.struct(column.name).struct.json_encode()
        column = column.to_frame().select(encoded).to_series()
    elif dtype.is_decimal() or dtype in (pl.Int128, pl.UInt128):
        column = column.cast(pl.String)
    if column.dtype in (pl.Categorical, pl.Enum, pl.String):
        column = column.cast(pl.String).cast(pl.Binary)
    return column


def _is_array(column: pl.Series) -> bool:
    """Whether a column holds arrays of numbers, such as pixels, none missing."""
    if (
        not isinstance(
            column.dtype,
            pl.Array,
        )
        or column.is_empty()
    ):
        return False
    inner: pl.DataType = column.dtype
    while isinstance(inner, pl.Array):
        inner = pl.Series(dtype=inner.inner).dtype
    if not inner.is_numeric():
        return False
    flat = column.reshape((-1,))
    return flat.null_count() == 0 == column.null_count()


def _number_bits(column: pl.Series) -> np.ndarray:
    """Return numbers, booleans, dates and times as UInt64 of the same bits."""
    if column.dtype in (pl.Datetime, pl.Duration):
        column = column.dt.cast_time_unit("us")
    column = column.to_physical()
    if column.dtype.is_float():
        filled = column.cast(pl.Float64).fill_null(0.0)
        values = filled.to_numpy() + 0.0  # -0.0 is 0.0
        return np.where(
            np.isnan(values),
            np.nan,
            values,
        ).view(np.uint64)
    if column.dtype == pl.UInt64:
        return column.fill_null(0).to_numpy()
    filled = column.cast(pl.Int64).fill_null(0)
    return filled.to_numpy().view(np.uint64)


def _hash_of_binary(column: pl.Series) -> np.ndarray:
    """Return the hash of byte strings, UInt64 [rows, 2]; null like the empty one."""
    column = column.fill_null(b"")
    sizes = column.bin.size().to_numpy()
    is_long = sizes > MOST_SHORT
    short = column
    if is_long.any():
        empty = pl.Series(
            [b""],
            dtype=pl.Binary,
        )
        short = column.zip_with(
            pl.Series(~is_long),
            empty,
        )
    hashes = np.empty(
        (len(column), 2),
        np.uint64,
    )
    for start in range(
        0,
        len(column),
        BLOCK,
    ):
        block = short.slice(start, BLOCK)
        hashes[start : start + BLOCK] = _hash_of_block(block)
    if is_long.any():
        long = column.filter(pl.Series(is_long))
        hashes[is_long] = _blake2(long)
    return hashes


def _blake2(column: pl.Series) -> np.ndarray:
    digests = [
        hashlib.blake2b(
            text,
            digest_size=16,
        ).digest()
        for text in column
    ]
    return np.frombuffer(
        b"".join(digests),
        "<u8",
    ).reshape(
        -1,
        2,
    )


def _hash_of_block(block: pl.Series) -> np.ndarray:
    """Return the hash of byte strings of at most MOST_SHORT bytes, UInt64 [rows, 2]."""
    array = block.to_arrow(compat_level=pl.CompatLevel.oldest())
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, np.int64)
    last = array.offset + len(array)
    offsets = offsets[array.offset : last + 1]
    text = np.frombuffer(
        data or b"",
        np.uint8,
    )[: offsets[-1]]
    padded = np.concatenate(
        [
            text,
            np.zeros(
                CHUNK,
                np.uint8,
            ),
        ]
    )
    windows = np.lib.stride_tricks.sliding_window_view(
        padded,
        CHUNK,
    )
    sizes = np.diff(offsets)
    sums = np.zeros(
        (len(array), LANES),
        np.uint64,
    )
    for number in range(CHUNKS):
        begin = number * CHUNK
        which = np.flatnonzero(sizes > begin)
        if not which.size:
            break
        left = np.minimum(
            sizes[which] - begin,
            CHUNK,
        )
        words = windows[offsets[which] + begin]
        words &= MASKS[left]
        sums[which] += _sums(words, number)
    return _packed(sums, sizes)


def _hash_of_records(record: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of byte strings of one length, UInt64 [rows, 2].

    Args:
      record: bytes [rows, an even number].
      size: length of the byte strings.
    """
    rows = len(record)
    if size > MOST_SHORT:
        column = pl.Series(
            [row.tobytes() for row in record],
            dtype=pl.Binary,
        )
        return _blake2(column)
    hashes = np.empty(
        (rows, 2),
        np.uint64,
    )
    for start in range(0, rows, BLOCK):
        block = record[start : start + BLOCK]
        sums = np.zeros(
            (len(block), LANES),
            np.uint64,
        )
        for number in range(-(-size // CHUNK)):
            begin = number * CHUNK
            chunk = block[:, begin : begin + CHUNK]
            words = np.ascontiguousarray(chunk)
            sums += _sums(words, number)
        hashes[start : start + BLOCK] = _packed(
            sums,
            np.full(len(block), size),
        )
    return hashes


def _sums(
    words: np.ndarray,
    chunk: int,
) -> np.ndarray:
    """Return the sums of one chunk, below PRIME.

    Args:
      words: bytes [rows, width], width even.
      chunk: number of the chunk, which has keys of its own.
    """
    floats = _floats(words.view("<u2"))
    first = chunk * WORDS
    keys = KEYS[first : first + floats.shape[1]]
    sums = floats @ keys
    return sums.astype(np.uint64) % np.uint64(PRIME)


def _packed(
    sums: np.ndarray,
    sizes: np.ndarray,
) -> np.ndarray:
    """Return four sums of 31 bits as two numbers of 62 bits, the size mixed in."""
    key = KEYS[-1].astype(np.uint64)
    lengths = sizes.astype(np.uint64)[:, None] * key
    lanes = (sums + lengths) % np.uint64(PRIME)
    low = lanes[:, 0::2]
    high = lanes[:, 1::2]
    return low | (high << np.uint64(31))

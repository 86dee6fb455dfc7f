"""Statistics of columns, piece by piece, that add up to those of all rows.

A histogram's bins are as wide as a power of two and begin at multiples of it. So the
edges do not depend on the rows but for the exponent, bins of two pieces are either the
same or one is a part of the other, and adding up is exact, in any order:

    piece 0, width 1   [0, 1) 3   [1, 2) 1   [2, 3) 2
    piece 1, width 2   [0, 2) 5   [2, 4) 4
    both, width 2      [0, 2) 9   [2, 4) 6
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import polars as pl

PIECE_BINS = 256  # at most, of a piece: four times those of a report
BINS = 64  # at most, of all rows (assumption: what a picture of a column shows)
SMALLEST_EXPONENT = -1022  # of a normal double
TOP = 20  # most frequent values that are kept
# A column with more different values than this in a piece has no frequent ones worth a
# list (assumption); the head of the piece tells at once for most.
MOST_VALUES = 10_000
HEAD = 1_000  # rows
LEAST_SHARE = 0.5  # of different values in the head: such a column is free text


def statistics(
    table: pl.DataFrame,
) -> dict[str, dict[str, Any]]:
    """Return what `add` adds up to the statistics of each column, as plain data."""
    return {
        name: _of_column(
            table[name],
        )
        for name in table.columns
    }


def _of_column(values: pl.Series) -> dict[str, Any]:
    found: dict[str, Any] = {
        "count": len(values),
        "missing": values.null_count(),
        "not_finite": 0,
    }
    numbers = _numbers(values)
    if numbers is not None:
        numbers = numbers.drop_nulls()
        if numbers.dtype.is_float():
            finite = numbers.is_finite()
            if not finite.all():
                numbers = numbers.filter(finite)
                found["not_finite"] = int(
                    finite.len() - finite.sum(),
                )
        found |= _moments(numbers)
    found["values"] = _values(values)
    return found


def _numbers(values: pl.Series) -> pl.Series | None:
    """Return what is measured of a column; None: nothing.

    It is the value of a number, the length of a text in bytes or of a list in items,
    days or microseconds of a time.
    """
    kind = values.dtype
    if kind.is_decimal():
        return values.cast(pl.Float64)
    if kind.is_numeric():
        return values
    if kind == pl.Boolean:
        return values.cast(pl.UInt8)
    if kind.is_temporal():
        return values.to_physical()
    if kind == pl.String:
        return values.str.len_bytes()
    if kind == pl.Binary:
        return values.bin.size()
    if kind == pl.List:
        return values.list.len()
    return None


def _moments(numbers: pl.Series) -> dict[str, Any]:
    """Return mean, sum of squared deviations, limits and histogram."""
    if not len(numbers):
        return {"used": 0}
    low: Any = numbers.min()
    high: Any = numbers.max()
    mean: Any = numbers.mean()
    variance: Any = numbers.var(ddof=0)
    squares = variance * len(numbers)
    if not math.isfinite(mean) or not math.isfinite(squares):
        return {"used": 0}  # numbers near the largest of a double
    return {
        "used": len(numbers),
        "mean": mean,
        "squares": squares,
        "min": low,
        "max": high,
        "histogram": _histogram(numbers, float(low), float(high)),
    }


def _histogram(
    numbers: pl.Series,
    low: float,
    high: float,
) -> dict[str, Any]:
    exponent = exponent_for(low, high, PIECE_BINS)
    if numbers.dtype.is_integer():
        exponent = max(exponent, 0)
    scale = 2.0**-exponent
    bins = (
        numbers.cast(
            pl.Float64,
        )
        * scale
    ).floor()
    first = math.floor(low * scale)
    offsets = (bins - first).cast(pl.UInt32)
    counted = offsets.value_counts(name="rows").sort(offsets.name)
    return {
        "exponent": exponent,
        "bins": (
            counted[offsets.name].cast(
                pl.Int64,
            )
            + first
        ).to_list(),
        "rows": counted["rows"].to_list(),
    }


def exponent_for(low: float, high: float, bins: int) -> int:
    """Return the least exponent of two with which some bins hold all of a range.

    It grows with the range, so that no piece has wider bins than all rows. Bins that
    are narrower than a double near `low` or `high` can tell are not worth having.
    """
    resolution = max(abs(low), abs(high)) * 2**-50
    width = max(high / bins - low / bins, resolution)
    if width == 0:
        return SMALLEST_EXPONENT
    exponent = max(math.frexp(width)[1] - 1, SMALLEST_EXPONENT)
    while _bins_apart(low, high, exponent) >= bins:
        exponent += 1
    return exponent


def _bins_apart(low: float, high: float, exponent: int) -> int:
    scale = 2.0**-exponent
    return math.floor(high * scale) - math.floor(low * scale)


def _values(
    values: pl.Series,
) -> dict[str, int] | None:
    """Return how often each value occurs; None: there are too many."""
    kind = values.dtype
    if kind.is_nested() or kind == pl.Binary or kind.is_float():
        return None
    head = values.head(HEAD)
    if (
        len(
            values,
        )
        > HEAD
        and head.n_unique() > LEAST_SHARE * HEAD
    ):
        return None
    counted = values.drop_nulls().value_counts(name="rows")
    if counted.height > MOST_VALUES:
        return None
    names = counted[values.name].cast(pl.String)
    table = pl.DataFrame(
        {"value": names, "rows": counted["rows"]},
    ).sort("value")
    return dict(table.iter_rows())


# ---- adding up ----


def add(
    pieces: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Return the statistics of a column of all rows, in the order of the pieces.

    Returns:
      count: rows; missing; not_finite: NaN and infinite; mean, std (of the population),
      min and max, of lengths where the values are texts or lists; histogram: its first
      `edge`, the `width` of a bin and the `rows` in each; top: the most frequent values
      and how often each occurs, None where nearly every value is another.
    """
    found: dict[str, Any] = {
        name: sum(piece[name] for piece in pieces)
        for name in ("count", "missing", "not_finite")
    }
    measured = [piece for piece in pieces if piece.get("used")]
    if measured:
        mean, std = _added_moments(measured)
        found |= {
            "mean": mean,
            "std": std,
            "min": min(piece["min"] for piece in measured),
            "max": max(piece["max"] for piece in measured),
            "histogram": _added_histogram(measured),
        }
    found["top"] = _top(
        [piece["values"] for piece in pieces],
    )
    return found


def _added_moments(
    pieces: Sequence[dict[str, Any]],
) -> tuple[float, float]:
    """Return the mean and the standard deviation.

    Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances", 1979. `fsum` rounds once, so that the order does not matter.
    """
    count = sum(piece["used"] for piece in pieces)
    mean = math.fsum(piece["used"] * piece["mean"] for piece in pieces) / count
    between = math.fsum(piece["used"] * (piece["mean"] - mean) ** 2 for piece in pieces)
    within = math.fsum(piece["squares"] for piece in pieces)
    return mean, math.sqrt((between + within) / count)


def _added_histogram(
    pieces: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    low = float(min(piece["min"] for piece in pieces))
    high = float(max(piece["max"] for piece in pieces))
    own = [piece["histogram"]["exponent"] for piece in pieces]
    narrowest = exponent_for(low, high, BINS)
    if low == high:
        # One bin in any case: one that is easy to read, a part of the value.
        narrowest = max(narrowest, math.frexp(low)[1] - BINS.bit_length())
    exponent = max(narrowest, *own)
    first = math.floor(low * 2.0**-exponent)
    rows = [0] * (
        math.floor(
            high * 2.0**-exponent,
        )
        - first
        + 1
    )
    for piece in pieces:
        histogram = piece["histogram"]
        shift = exponent - histogram["exponent"]
        for number, count in zip(
            histogram["bins"],
            histogram["rows"],
            strict=True,
        ):
            rows[(number >> shift) - first] += count
    width = 2.0**exponent
    return {"edge": first * width, "width": width, "rows": rows}


def _top(
    pieces: Sequence[dict[str, int] | None],
) -> list[list[Any]] | None:
    total: dict[str, int] = {}
    for values in pieces:
        if values is None:
            return None
        for value, rows in values.items():
            total[value] = total.get(value, 0) + rows
    ordered = sorted(
        total.items(),
        key=lambda item: (-item[1], item[0]),
    )
    return [[value, rows] for value, rows in ordered[:TOP]]

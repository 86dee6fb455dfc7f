"""Figures in words: durations, money, rates, meshes and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

MINUTE = 60.0
HOUR = 3600.0
DAY = 86400.0
# (seconds below which a unit is used, its seconds, its name)
DURATIONS = (
    (1e-3, 1e-6, "µs"),
    (1.0, 1e-3, "ms"),
    (100.0, 1.0, "s"),
    (100 * MINUTE, MINUTE, "min"),
    (2 * DAY, HOUR, "h"),
)
# prefix by its value, the largest first
PREFIXES = {
    1e15: "P",
    1e12: "T",
    1e9: "G",
    1e6: "M",
    1e3: "k",
}
# three digits round a value up to the next unit from this share of it on
ROUNDS_UP = 0.9995


def duration(seconds: float) -> str:
    """Return a time: 412 µs, 3.40 ms, 1.23 s, 4.5 min, 6.2 h, 12 d."""
    if seconds == 0:
        return "0 s"
    if seconds < 0 or not math.isfinite(seconds):
        return str(seconds)
    for bound, unit, name in DURATIONS:
        if seconds < bound * ROUNDS_UP:
            return f"{_three_digits(seconds / unit)} {name}"
    return f"{_three_digits(seconds / DAY)} d"


def money(dollars: float) -> str:
    """Return a price: $0.00123, $1.23, $1,234."""
    if dollars >= 1000:
        return f"${dollars:,.0f}"
    if dollars >= 1:
        return f"${dollars:.2f}"
    return f"${dollars:.3g}"


def si(value: float) -> str:
    """Return a number that a unit follows: "3.40M", "1.20 G" (with a space), "12 "."""
    for bound, prefix in PREFIXES.items():
        if abs(value) >= bound * ROUNDS_UP:
            space = " " if prefix in "GTP" else ""
            return f"{_three_digits(value / bound)}{space}{prefix}"
    return _three_digits(value) + " "


def amount(value: float) -> str:
    """Return a count of tokens or samples: 1e9, 2.5e12, 640."""
    if value < 1e6:
        return f"{value:,.0f}"
    short = f"{value:.3g}"
    return short.replace("e+0", "e").replace("e+", "e")


def plural(
    count: int,
    word: str,
    ending: str = "s",
) -> str:
    """Return a count with its word: 1 step, 2 steps, 1,000 steps."""
    return f"{count:,} {word}{'' if count == 1 else ending}"


def joined_mesh(mesh: dict[str, int], between: str = " x ") -> str:
    """Return the axes of a mesh: fsdp=4 x tensor=2."""
    axes = [f"{name}={count}" for name, count in mesh.items()]
    return between.join(axes)


def shaped(shape: Sequence[int]) -> str:
    """Return a shape: 64x128, or scalar."""
    return "x".join(map(str, shape)) or "scalar"


def trimmed(words: str) -> str:
    """Return a figure without zeros at the end of its fraction: 1.50 h is 1.5 h."""
    number, space, unit = words.partition(" ")
    if "." in number:
        number = number.rstrip("0").rstrip(".")
    return number + space + unit


def _three_digits(value: float) -> str:
    value = float(f"{value:.3g}")
    digits = 0
    if value:
        digits = 2 - math.floor(math.log10(abs(value)))
    places = min(max(digits, 0), 9)
    return f"{value:,.{places}f}"

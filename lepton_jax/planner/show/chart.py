"""Time against price as text: a letter for each topology."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lepton_jax.planner.show.axis import PRICES, TIMES, Log
from lepton_jax.planner.show.points import Point
from lepton_jax.planner.show.words import duration, money, trimmed

# columns and lines of the chart, chosen by eye
COLUMNS = 72
LINES = 13
# columns at the right end that a mark of two letters may need
RIGHT = 3
# columns at the right end that labels of times may need
LABELS = 12


class Mark(NamedTuple):
    """A topology's letter with its time and price."""

    letter: str
    seconds: float
    price: float


def chart(
    points: Sequence[Point],
    letters: Sequence[str],
) -> list[str]:
    """Return letters where time (across) and price (up) meet.

    There are no lines for fewer than two topologies with a time and a price.
    """
    marks = _marks(points, letters)
    if len(marks) < 2:
        return []

    across = Log.over([mark.seconds for mark in marks])
    up = Log.over([mark.price for mark in marks])
    labels = {}
    for price in up.ticks(PRICES):
        labels[_line(up, price)] = trimmed(money(price))
    lengths = [len(label) for label in labels.values()]
    wide = max(lengths, default=0)
    lines = ["price"]
    for y, row in enumerate(_field(marks, across, up)):
        edge = "┤" if y in labels else "│"
        lines.append(f"{labels.get(y, ''):>{wide}} {edge}{row}".rstrip())
    axis, times = _time_axis(across)
    lines.append(" " * wide + " └" + axis)
    lines.append(" " * wide + f"  {times:<{COLUMNS - 4}} time")
    return lines


def _marks(points: Sequence[Point], letters: Sequence[str]) -> list[Mark]:
    """Return the topologies with a time and a price."""
    marks = []
    for letter, point in zip(letters, points, strict=True):
        if point.problem or point.seconds is None or point.price is None:
            continue
        marks.append(Mark(letter, point.seconds, point.price))
    return marks


def _line(up: Log, price: float) -> int:
    from_top = 1 - up.at(price)
    return round(from_top * (LINES - 1))


def _column(across: Log, seconds: float) -> int:
    return round(across.at(seconds) * (COLUMNS - RIGHT))


def _field(
    marks: Sequence[Mark],
    across: Log,
    up: Log,
) -> list[str]:
    """Return the lines with the letters; where two meet, one moves to the right."""
    field = [[" "] * COLUMNS for _ in range(LINES)]
    for mark in sorted(marks):
        row = field[_line(up, mark.price)]
        width = len(mark.letter)
        x = _column(across, mark.seconds)
        last = COLUMNS - 2 * width
        while x < last and not _is_free(row[x : x + width]):
            x += 1
        row[x : x + width] = mark.letter
    return ["".join(row) for row in field]


def _time_axis(across: Log) -> tuple[str, str]:
    """Return the axis with its ticks, and the labels below it as far as they fit."""
    axis = ["─"] * COLUMNS
    words = [" "] * (COLUMNS + LABELS)
    for seconds in across.ticks(TIMES):
        x = _column(across, seconds)
        label = trimmed(duration(seconds))
        end = x + len(label)
        before = max(0, x - 1)
        if _is_free(words[before : end + 1]):
            axis[x] = "┴"
            words[x:end] = label
    labels = "".join(words)
    return "".join(axis), labels.rstrip()


def _is_free(cells: Sequence[str]) -> bool:
    return all(cell == " " for cell in cells)

"""Time against price as a drawing: points, their labels, and the frontier."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from html import escape
from typing import NamedTuple

from lepton_jax.planner.show.axis import PRICES, TIMES, Log
from lepton_jax.planner.show.points import Point, margin_of, price_of, time_of
from lepton_jax.planner.show.words import duration, money, trimmed

# The sizes below were chosen by eye.

# pixels of the plane, and what is around it
LEFT = 66
TOP = 26
WIDE = 660
HIGH = 330
BELOW = 28
RIGHT = 24
# pixels of the strip below the plane, for points without a price, and from its bottom
# to the points
STRIP = 34
STRIP_BELOW = 14
# pixels of a letter, about, and of half a label's height
LETTER = 7.2
HALF_LABEL = 7
# pixels from a label's bottom to its base line
BASE = 3
# pixels around a point, and around a piece of the frontier, that labels keep free of
AROUND_POINT = 7
AROUND_LINE = 3
# pixels of a piece of the frontier
PIECE = 6
# pixels from a point to its label, from near to far
REACHES = (10, 22, 36, 52)
# where a label may stand around its point, the likelier first
DIRECTIONS = (
    (1, 0),
    (-1, 0),
    (0, -1),
    (0, 1),
    (1, -1),
    (-1, -1),
    (1, 1),
    (-1, 1),
)
# weight of a label that leaves the drawing, in square pixels that it covers
OUTSIDE = 1e4


class Spot(NamedTuple):
    """A place in the drawing, in pixels from its top left corner."""

    x: float
    y: float


class Box(NamedTuple):
    """A rectangle in the drawing, in pixels."""

    left: float
    top: float
    right: float
    bottom: float


class Label(NamedTuple):
    """Words at a spot; those of the frontier are bold."""

    words: str
    spot: Spot
    bold: bool


def scatter(points: Sequence[Point]) -> str:
    """Return time against price, both logarithmic; empty if no time is known."""
    timed = [p for p in points if not p.problem and p.seconds is not None]
    priced = [p for p in timed if p.price is not None]
    if not timed:
        return ""

    seconds = [p.seconds or 0.0 for p in timed]
    prices = [p.price or 0.0 for p in priced]
    across = Log.over(seconds)
    up = Log.over(prices) if prices else None
    strip = STRIP if len(priced) < len(timed) else 0
    bottom = TOP + HIGH + strip
    spots = [_spot(point, across, up, bottom) for point in timed]
    pairs = list(zip(timed, spots, strict=True))
    line = sorted(spot for point, spot in pairs if point.best)
    path = " ".join(f"{spot.x:.1f},{spot.y:.1f}" for spot in line)
    dots = "".join(_dot(point, spot) for point, spot in pairs)
    labels = [Label(_words(point), spot, point.best) for point, spot in pairs]
    width = LEFT + WIDE + RIGHT
    height = bottom + BELOW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="front" viewBox="0 0 {width}'
        f' {height}" width="{width}" role="img" aria-label="time and price of each'
        f' topology">{_frame(across, up, strip)}<polyline points="{path}"'
        ' fill="none" stroke="var(--main)" stroke-width="2" stroke-dasharray="5'
        f' 4"/>{dots}{_labels(labels, line, bottom)}</svg>'
    )


# ---- points ----


def _spot(
    point: Point,
    across: Log,
    up: Log | None,
    bottom: float,
) -> Spot:
    x = LEFT + across.at(point.seconds or 0.0) * WIDE
    # below the plane: those without a price
    if point.price is None or up is None:
        return Spot(x, bottom - STRIP_BELOW)
    return Spot(x, _height(up, point.price))


def _height(up: Log, price: float) -> float:
    from_top = 1 - up.at(price)
    return TOP + from_top * HIGH


def _dot(point: Point, spot: Spot) -> str:
    if point.best:
        fill = "var(--main)"
    elif point.price is None:
        fill = "var(--card)"
    else:
        fill = "var(--copy)"
    stroke = "var(--main)" if point.best else "var(--soft)"
    title = (
        f"{point.topology}, {point.name}: {time_of(point)}, {price_of(point)},"
        f" {margin_of(point)} of a device's memory free"
    )
    return (
        f'<circle cx="{spot.x:.1f}" cy="{spot.y:.1f}" r="5" fill="{fill}"'
        f' stroke="{stroke}" stroke-width="1.5"><title>{escape(title)}</title></circle>'
    )


def _words(point: Point) -> str:
    if point.fastest or point.cheapest:
        return f"{point.topology} ({point.marks})"
    return point.topology


# ---- the frame ----


def _frame(
    across: Log,
    up: Log | None,
    strip: int,
) -> str:
    """Return the axes with their ticks and titles.

    Args:
      across: axis of times.
      up: axis of prices; None: no price is known.
      strip: pixels below the plane for points without a price.
    """
    right = LEFT + WIDE
    bottom = TOP + HIGH + strip
    times = across.ticks(TIMES)
    parts = [_time_tick(across, seconds, bottom) for seconds in times]
    if up is not None:
        prices = up.ticks(PRICES)
        parts += [_price_tick(up, price) for price in prices]
    if strip:
        plane = TOP + HIGH
        parts.append(
            f'<line x1="{LEFT}" x2="{right}" y1="{plane}" y2="{plane}"'
            f' stroke="var(--line)"/><text x="{LEFT - 8}" y="{bottom - 10}"'
            ' text-anchor="end">no price</text>'
        )
    parts.append(
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none"'
        f' stroke="var(--line)"/><text x="{right + RIGHT}" y="{bottom + 17}"'
        f' text-anchor="end">time →</text><text x="{LEFT - 8}" y="{TOP - 10}"'
        ' text-anchor="end">price ↑</text>'
    )
    return "".join(parts)


def _time_tick(
    across: Log,
    seconds: float,
    bottom: int,
) -> str:
    x = LEFT + across.at(seconds) * WIDE
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"'
        f' stroke="var(--faint)"/><text x="{x:.1f}" y="{bottom + 17}"'
        f' text-anchor="middle">{trimmed(duration(seconds))}</text>'
    )


def _price_tick(up: Log, price: float) -> str:
    y = _height(up, price)
    return (
        f'<line x1="{LEFT}" x2="{LEFT + WIDE}" y1="{y:.1f}" y2="{y:.1f}"'
        f' stroke="var(--faint)"/><text x="{LEFT - 8}" y="{y + 4:.1f}"'
        f' text-anchor="end">{trimmed(money(price))}</text>'
    )


# ---- labels ----


def _labels(
    labels: Sequence[Label],
    line: Sequence[Spot],
    bottom: float,
) -> str:
    """Return each label next to its point, where it covers the least.

    What it may cover are points, the frontier and the labels before it; labels of the
    frontier come first.

    Args:
      labels: what to write.
      line: corners of the frontier.
      bottom: of the plane and the strip.
    """
    taken = [_around(label.spot, AROUND_POINT) for label in labels]
    for start, end in itertools.pairwise(line):
        for spot in _pieces(start, end):
            taken.append(_around(spot, AROUND_LINE))

    drawn = ""
    for label in sorted(labels, key=lambda label: not label.bold):
        places = _places(label)
        place = min(places, key=lambda place: _badness(place, taken, bottom))
        taken.append(place.box)
        drawn += _drawn(label, place)
    return drawn


class Place(NamedTuple):
    """A possible place of a label: pixels from its point, and the space it takes."""

    reach: int
    box: Box


def _places(label: Label) -> Iterator[Place]:
    """Yield where a label could stand, the likelier first."""
    width = len(label.words) * LETTER
    x, y = label.spot
    for reach, (dx, dy) in itertools.product(REACHES, DIRECTIONS):
        left = x + dx * reach
        if dx < 0:
            left -= width
        elif dx == 0:
            left -= width / 2
        middle = y + dy * reach
        top = middle - HALF_LABEL
        bottom = middle + HALF_LABEL
        yield Place(
            reach,
            Box(
                left,
                top,
                left + width,
                bottom,
            ),
        )


def _badness(
    place: Place,
    taken: Sequence[Box],
    bottom: float,
) -> float:
    """Return how far a label is from its point, and what it covers."""
    box = place.box
    covered = sum(_overlap(box, other) for other in taken)
    outside = OUTSIDE * _is_outside(box, bottom)
    return place.reach + covered + outside


def _drawn(label: Label, place: Place) -> str:
    """Return the words, with a line to the point where they are far from it."""
    x, y = label.spot
    box = place.box
    drawn = ""
    if place.reach > REACHES[0]:
        near_x = min(max(x, box.left), box.right)
        near_y = min(max(y, box.top), box.bottom)
        drawn = (
            f'<path class="to" d="M{x:.1f} {y:.1f}L{near_x:.1f} {near_y:.1f}"'
            ' stroke="var(--soft)"/>'
        )
    is_left = box.right <= x
    anchor = "end" if is_left else "start"
    start = box.right if is_left else box.left
    style = "fill:var(--ink)" + (";font-weight:600" if label.bold else "")
    return drawn + (
        f'<text x="{start:.1f}" y="{box.bottom - BASE:.1f}" text-anchor="{anchor}"'
        f' style="{style}">{escape(label.words)}</text>'
    )


def _pieces(
    start: Spot,
    end: Spot,
) -> Iterator[Spot]:
    """Yield spots along a line, `PIECE` pixels apart, without its end."""
    wide = end.x - start.x
    high = end.y - start.y
    longer = max(abs(wide), abs(high))
    steps = max(2, int(longer / PIECE))
    for i in range(steps):
        x = start.x + wide * i / steps
        y = start.y + high * i / steps
        yield Spot(x, y)


def _around(spot: Spot, pixels: float) -> Box:
    x, y = spot
    return Box(
        x - pixels,
        y - pixels,
        x + pixels,
        y + pixels,
    )


def _is_outside(box: Box, bottom: float) -> bool:
    across = box.left < LEFT or box.right > LEFT + WIDE + RIGHT
    return across or box.top < 0 or box.bottom > bottom


def _overlap(box: Box, other: Box) -> float:
    """Return the square pixels that two boxes share."""
    left = max(box.left, other.left)
    right = min(box.right, other.right)
    top = max(box.top, other.top)
    bottom = min(box.bottom, other.bottom)
    if right <= left or bottom <= top:
        return 0.0
    return (right - left) * (bottom - top)

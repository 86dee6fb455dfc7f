"""Several topologies side by side: how long each takes for so many samples or tokens,
and what that costs.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology
from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.plans import Plan
from lepton_jax.planner.show.html import LIGHT, table, wrapped
from lepton_jax.planner.show.text import WIDTH, duration, grid, meshed, money

# of the chart in text
COLUMNS = 72
LINES = 13
# pixels of the drawing
LEFT = 66
TOP = 26
WIDE = 660
HIGH = 330
BELOW = 28
LETTER = 7.2  # pixels of a letter, about
REACHES = (10, 22, 36, 52)  # pixels from a point to its label

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """What one topology gives.

    Attributes:
      topology: its name.
      name, mesh: of the plan; empty if there is none.
      seconds: in which it consumes all tokens; None: nothing fits, or the time is not
        known.
      price: of that, US dollars; None: not known.
      step_seconds: of one step.
      peak, memory: bytes a device, predicted and there.
      problem: why nothing fits, and the nearest change that does; empty if the plan
        fits.
      best: on the frontier: no other topology is both faster and cheaper.
      fastest, cheapest: of all that fit.
    """

    topology: str
    name: str
    mesh: str
    seconds: float | None
    price: float | None
    step_seconds: float | None
    peak: int
    memory: int
    problem: str = ""
    best: bool = False
    fastest: bool = False
    cheapest: bool = False

    @property
    def margin(self) -> int:
        """Bytes that stay free on a device."""
        return self.memory - self.peak

    @property
    def marks(self) -> str:
        words = [
            w
            for w, said in (("fastest", self.fastest), ("cheapest", self.cheapest))
            if said
        ]
        return ", ".join(words or ["on the frontier"] * self.best)


@dataclass(frozen=True)
class Frontier:
    """Topologies compared for `tokens` of what `unit` says: see `frontier`."""

    points: tuple[Point, ...]
    tokens: float
    unit: str

    def __str__(self) -> str:
        marks = _letters(self.points)
        cells = [
            (
                m,
                p.topology,
                p.name,
                _some(p.seconds, duration),
                _some(p.price, money),
                _some(p.step_seconds, duration),
                _margin(p),
                p.marks,
            )
            for m, p in zip(marks, self.points, strict=True)
            if not p.problem
        ]
        lines = [f"{amount(self.tokens)} {self.unit}"]
        if cells:
            lines += grid(
                (
                    "",
                    "topology",
                    "strategy",
                    "time",
                    "price",
                    "a step",
                    "memory free",
                    "",
                ),
                cells,
                "<<<>>>><",
                flexible=(2,),
            )
        for p in self.points:
            if p.problem:
                lines += textwrap.wrap(
                    f"{p.topology}: {p.problem}", WIDTH, subsequent_indent="  "
                )
        chart = _chart(self.points, marks)
        return "\n".join(lines + ["", *chart] * bool(chart))

    def svg(self) -> str:
        """Time against price, both logarithmic, with the frontier as a line: for a
        light page; empty if nothing fits.
        """
        colours = dict(pair.split(":") for pair in LIGHT.split(";"))
        drawing = re.sub(
            r"var\((--\w+)\)",
            lambda match: colours[match[1]],
            _drawing(self),
        )
        return drawing.replace(
            ">",
            "><style>.front text{font:12.5px"
            f" sans-serif;fill:{colours['--soft']}}}</style>",
            1,
        )

    def _repr_html_(self) -> str:
        cells = [
            (
                escape(p.topology),
                escape(p.name),
                escape(p.mesh),
                _some(p.seconds, duration),
                _some(p.price, money),
                _some(p.step_seconds, duration),
                _margin(p),
                p.marks,
            )
            for p in self.points
            if not p.problem
        ]
        heads = (
            "topology",
            "strategy",
            "mesh",
            "time",
            "price",
            "a step",
            "memory free",
            "",
        )
        refused = "".join(
            f"<dt>{escape(p.topology)}</dt><dd>{escape(p.problem)}</dd>"
            for p in self.points
            if p.problem
        )
        refused = (
            f'<h4>Where nothing fits</h4><dl class="said">{refused}</dl>'
            if refused
            else ""
        )
        title = f"<h3>{amount(self.tokens)} {escape(self.unit)}: time and price</h3>"
        drawing = f"<figure style='margin-top:14px'>{_drawing(self)}</figure>"
        return wrapped(
            title
            + drawing * bool(cells)
            + table("Topologies", heads, cells, "<<<>>>><")
            + refused
        )


def frontier(
    plans: Sequence[tuple[Plan | PlanError, Topology]],
    tokens: float,
    tokens_per_step: float,
    unit: str = "tokens",
) -> Frontier:
    """Compare plans of one recipe on several topologies.

    Args:
      plans: each with its topology; an error stands for a topology on which there is no
        plan.
      tokens: how many are to be consumed; may be samples, as `unit` then says.
      tokens_per_step: of one optimizer step.

    Returns:
      The points in the order given. A topology without a list price has no price and is
      never on the frontier.
    """
    points = [
        _point(plan, topology, tokens / tokens_per_step) for plan, topology in plans
    ]
    timed = [p for p in points if p.seconds is not None and not p.problem]
    priced = [p for p in timed if p.price is not None]
    fastest = min(
        (p.seconds or 0.0 for p in timed),
        default=None,
    )
    cheapest = min(
        (p.price or 0.0 for p in priced),
        default=None,
    )
    return Frontier(
        tuple(
            replace(
                p,
                best=any(p is q for q in priced)
                and not any(_beats(q, p) for q in priced),
                fastest=not p.problem
                and p.seconds is not None
                and p.seconds == fastest,
                cheapest=not p.problem and p.price is not None and p.price == cheapest,
            )
            for p in points
        ),
        tokens,
        unit,
    )


def _point(
    plan: Plan | PlanError,
    topology: Topology,
    steps: float,
) -> Point:
    if isinstance(plan, PlanError):
        return Point(
            topology.name,
            "",
            "",
            None,
            None,
            None,
            0,
            0,
            f"{plan.what}; {plan.remedy}",
        )
    problem = ""
    if plan.peak > plan.memory:
        more = f"; {plan.notes[0]}" if plan.notes else ""
        problem = f"needs {size(plan.peak)} of {size(plan.memory)} a device{more}"
    seconds = steps * plan.step_seconds if plan.seconds else None
    hourly = (
        topology.price_per_hour if plan.price_per_hour is None else plan.price_per_hour
    )
    price = None if hourly is None or seconds is None else hourly * seconds / 3600
    return Point(
        topology.name,
        plan.name,
        meshed(plan),
        seconds,
        price,
        plan.step_seconds if plan.seconds else None,
        plan.peak,
        plan.memory,
        problem,
    )


def _beats(one: Point, other: Point) -> bool:
    """At least as good in both, and better in one."""
    a, b = ((p.seconds or 0.0, p.price or 0.0) for p in (one, other))
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def amount(value: float) -> str:
    """1e9, 2.5e12, 640."""
    return (
        f"{value:,.0f}"
        if value < 1e6
        else f"{value:.3g}".replace("e+0", "e").replace("e+", "e")
    )


def _some(value: float | None, words: Callable[[float], str]) -> str:
    return "not known" if value is None else words(value)


def _margin(p: Point) -> str:
    return f"{size(p.margin)} ({p.margin / p.memory:.0%})" if p.memory else "not known"


def _letters(points: Sequence[Point]) -> list[str]:
    letters = (
        "".join(x)
        for n in (1, 2)
        for x in itertools.product("abcdefghijklmnopqrstuvwxyz", repeat=n)
    )
    return [next(letters) if not p.problem else "" for p in points]


# ---- the chart in text ----


def _chart(points: Sequence[Point], marks: Sequence[str]) -> list[str]:
    """Letters where time (across) and price (up) meet; nothing for fewer than two."""
    placed = [
        (m, p.seconds, p.price)
        for m, p in zip(marks, points, strict=True)
        if not p.problem and p.seconds is not None and p.price is not None
    ]
    if len(placed) < 2:
        return []
    across = Log.over([seconds for _, seconds, _ in placed])
    up = Log.over([price for _, _, price in placed])
    field = [[" "] * COLUMNS for _ in range(LINES)]
    for mark, seconds, price in sorted(placed):
        x = round(across.at(seconds) * (COLUMNS - 3))
        y = round((1 - up.at(price)) * (LINES - 1))
        while any(
            c != " " for c in field[y][x : x + len(mark)]
        ) and x < COLUMNS - 2 * len(mark):
            x += 1
        field[y][x : x + len(mark)] = mark
    prices = {
        round((1 - up.at(v)) * (LINES - 1)): _trimmed(money(v))
        for v in up.ticks(PRICES)
    }
    wide = max(map(len, prices.values()), default=0)
    lines = ["price"] + [
        f"{prices.get(y, ''):>{wide}} {'┤' if y in prices else '│'}{''.join(row)}".rstrip()
        for y, row in enumerate(field)
    ]
    axis = ["─"] * COLUMNS
    words = [" "] * (COLUMNS + 12)
    for value in across.ticks(TIMES):
        x = round(across.at(value) * (COLUMNS - 3))
        label = _trimmed(duration(value))
        if all(c == " " for c in words[max(0, x - 1) : x + len(label) + 1]):
            axis[x] = "┴"
            words[x : x + len(label)] = label
    return [
        *lines,
        " " * wide + " └" + "".join(axis),
        " " * wide + "  " + f"{''.join(words).rstrip():<{COLUMNS - 4}} time",
    ]


def _trimmed(words: str) -> str:
    """Without zeros at the end of its fraction: 1.50 h is 1.5 h."""
    number, space, unit = words.partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


PRICES = [
    sorted(m * 10.0**k for k in range(-9, 12) for m in factors)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7))
]
_UNITS = [
    (1e-6, 1000),
    (1e-3, 1000),
    (1.0, 60),
    (60.0, 60),
    (3600.0, 24),
    (86400.0, 1e5),
]
TIMES = [
    sorted(
        m * 10.0**k * unit
        for unit, most in _UNITS
        for k in range(5)
        for m in factors
        if m * 10.0**k < most
    )
    for factors in ((1,), (1, 3), (1, 1.5, 2, 3, 4, 5, 6, 8))
]


@dataclass(frozen=True)
class Log:
    """A logarithmic axis from `low` to `high`."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Log:
        """Over all values and some more; at least a factor of 4."""
        low, high = (max(v, 1e-12) for v in (min(values), max(values)))
        pad = max(
            1.25,
            (high / low) ** 0.07,
            (4 / (high / low)) ** 0.5,
        )
        return cls(low / pad, high * pad)

    def at(self, value: float) -> float:
        return math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)

    def ticks(self, ladders: Sequence[Sequence[float]]) -> list[float]:
        """Of the first ladder that gives at least three, else of the last."""
        within = [
            [v for v in ladder if self.low <= v <= self.high] for ladder in ladders
        ]
        return next((ticks for ticks in within if len(ticks) >= 3), within[-1])


# ---- the drawing ----


def _drawing(front: Frontier) -> str:
    timed = [p for p in front.points if not p.problem and p.seconds is not None]
    priced = [p for p in timed if p.price is not None]
    if not timed:
        return ""
    across = Log.over([p.seconds or 0.0 for p in timed])
    up = Log.over([p.price or 0.0 for p in priced]) if priced else Log(1, 10)
    # below the axis: those without a price
    strip = 34 if len(priced) < len(timed) else 0
    x = lambda p: LEFT + across.at(p.seconds or 0.0) * WIDE
    y = lambda p: (
        TOP + (HIGH + strip - 14 if p.price is None else (1 - up.at(p.price)) * HIGH)
    )
    at = [(x(p), y(p)) for p in timed]
    line = sorted(a for a, p in zip(at, timed, strict=True) if p.best)
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in line)
    dots = "".join(
        f'<circle cx="{a:.1f}" cy="{b:.1f}" r="5" fill="{_fill(p)}"'
        f' stroke="{"var(--main)" if p.best else "var(--soft)"}"'
        f' stroke-width="1.5"><title>{escape(_told(p))}</title></circle>'
        for (a, b), p in zip(at, timed, strict=True)
    )
    words = [
        p.topology + (f" ({p.marks})" if p.fastest or p.cheapest else "") for p in timed
    ]
    labels = _labels(
        words,
        at,
        line,
        TOP + HIGH + strip,
        [p.best for p in timed],
    )
    wide = LEFT + WIDE + 24
    tall = TOP + HIGH + strip + BELOW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="front" viewBox="0 0 {wide}'
        f' {tall}" width="{wide}" role="img" aria-label="time and price of each'
        f' topology">{_frame(across, up, strip, bool(priced))}<polyline points="{path}"'
        ' fill="none" stroke="var(--main)" stroke-width="2" stroke-dasharray="5'
        f' 4"/>{dots}{labels}</svg>'
    )


def _fill(p: Point) -> str:
    return (
        "var(--main)" if p.best else "var(--card)" if p.price is None else "var(--copy)"
    )


def _told(p: Point) -> str:
    return (
        f"{p.topology}, {p.name}: {_some(p.seconds, duration)},"
        f" {_some(p.price, money)}, {_margin(p)} of a device's memory free"
    )


def _frame(
    across: Log,
    up: Log,
    strip: int,
    priced: bool,
) -> str:
    bottom = TOP + HIGH + strip
    parts = []
    for value in across.ticks(TIMES):
        a = LEFT + across.at(value) * WIDE
        parts.append(
            f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{TOP}" y2="{bottom}"'
            f' stroke="var(--faint)"/><text x="{a:.1f}" y="{bottom + 17}"'
            f' text-anchor="middle">{_trimmed(duration(value))}</text>'
        )
    for value in up.ticks(PRICES) if priced else ():
        b = TOP + (1 - up.at(value)) * HIGH
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDE}" y1="{b:.1f}" y2="{b:.1f}"'
            f' stroke="var(--faint)"/><text x="{LEFT - 8}" y="{b + 4:.1f}"'
            f' text-anchor="end">{_trimmed(money(value))}</text>'
        )
    if strip:
        parts.append(
            f'<line x1="{LEFT}" x2="{LEFT + WIDE}" y1="{TOP + HIGH}" y2="{TOP + HIGH}"'
            f' stroke="var(--line)"/><text x="{LEFT - 8}" y="{bottom - 10}"'
            ' text-anchor="end">no price</text>'
        )
    parts.append(
        f'<path d="M{LEFT} {TOP}V{bottom}H{LEFT + WIDE}" fill="none"'
        f' stroke="var(--line)"/><text x="{LEFT + WIDE + 24}" y="{bottom + 17}"'
        f' text-anchor="end">time →</text><text x="{LEFT - 8}" y="{TOP - 10}"'
        ' text-anchor="end">price ↑</text>'
    )
    return "".join(parts)


def _labels(
    words: Sequence[str],
    at: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]],
    bottom: float,
    bold: Sequence[bool],
) -> str:
    """Each beside its point, where it covers the least of the points, the frontier and
    the labels before it.
    """
    taken = [(a - 7, b - 7, a + 7, b + 7) for a, b in at]
    for (a, b), (c, d) in itertools.pairwise(line):
        steps = max(2, int(max(abs(c - a), abs(d - b)) / 6))
        taken += [
            (
                a + (c - a) * i / steps - 3,
                b + (d - b) * i / steps - 3,
                a + (c - a) * i / steps + 3,
                b + (d - b) * i / steps + 3,
            )
            for i in range(steps)
        ]
    drawn = ""
    for text, (a, b), heavy in sorted(
        zip(words, at, bold, strict=True),
        key=lambda label: not label[2],
    ):
        reach, box = min(
            _places(a, b, len(text) * LETTER),
            key=lambda place: (
                place[0]
                + sum(_overlap(place[1], other) for other in taken)
                + 1e4 * _outside(place[1], bottom)
            ),
        )
        taken.append(box)
        if reach > REACHES[0]:
            near = min(max(a, box[0]), box[2]), min(max(b, box[1]), box[3])
            drawn += (
                f'<path class="to" d="M{a:.1f} {b:.1f}L{near[0]:.1f} {near[1]:.1f}"'
                ' stroke="var(--soft)"/>'
            )
        style = "fill:var(--ink)" + (";font-weight:600" if heavy else "")
        x, anchor = (box[2], "end") if box[2] <= a else (box[0], "start")
        drawn += (
            f'<text x="{x:.1f}" y="{box[3] - 3:.1f}" text-anchor="{anchor}"'
            f' style="{style}">{escape(text)}</text>'
        )
    return drawn


def _places(
    a: float,
    b: float,
    wide: float,
) -> list[tuple[int, Box]]:
    """(distance, box) of where a label of a point could stand, the likelier first."""
    found = []
    for reach, (dx, dy) in itertools.product(
        REACHES,
        (
            (1, 0),
            (-1, 0),
            (0, -1),
            (0, 1),
            (1, -1),
            (-1, -1),
            (1, 1),
            (-1, 1),
        ),
    ):
        left = a + dx * reach - (wide if dx < 0 else wide / 2 if dx == 0 else 0)
        found.append(
            (
                reach,
                (
                    left,
                    b + dy * reach - 7,
                    left + wide,
                    b + dy * reach + 7,
                ),
            )
        )
    return found


def _outside(box: Box, bottom: float) -> bool:
    return box[0] < LEFT or box[2] > LEFT + WIDE + 24 or box[1] < 0 or box[3] > bottom


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0

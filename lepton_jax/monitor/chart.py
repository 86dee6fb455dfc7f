"""Line charts for the report, as HTML and SVG that need nothing else.

The curves are an SVG stretched over the plot, with strokes that do not scale; the words
are HTML placed in percent. So one drawing is crisp, and its letters keep their size, on
a phone, a wide screen and paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

from lepton_jax.monitor.progress import number

POINTS = 1500  # of a curve, at most
_UNITS = 1000  # of the SVG's own coordinates, in both directions


@dataclass
class Curve:
    """One curve: `x` steps, ascending, and `y` values, both of shape (n,); a gap where
    `y` is not finite.

    `style` is a CSS class: "raw" (thin), "train", "evaluation" (with points), "undone"
    (by a rollback) or "other".
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str


@dataclass
class Mark:
    """Something that happened at a step: `kind` is the CSS class, `name` what the
    legend says, `text` the read-out.
    """

    x: float
    kind: str
    name: str
    text: str


@dataclass
class Scale:
    """From values to 0..1: the ends of an axis, its kind, and its ticks as (value,
    label).
    """

    low: float
    high: float
    log: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def at(self, value: np.ndarray | float) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            low, high, v = (
                np.log10(v) if self.log else np.asarray(v, np.float64)
                for v in (self.low, self.high, value)
            )
        return (v - low) / (high - low)


def downsample(
    x: np.ndarray,
    y: np.ndarray,
    limit: int = POINTS,
) -> tuple[np.ndarray, np.ndarray]:
    """At most about `limit` points of a curve: the least and the greatest value of each
    bucket, in order of `x`.

    A bucket that holds a value which is not finite keeps one of those as well, so that
    gaps survive.
    """
    if len(x) <= limit:
        return x, y
    keep: set[int] = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), max(1, limit // 2 - 1)):
        finite = part[np.isfinite(y[part])]
        if len(finite):
            keep |= {
                int(finite[np.argmin(y[finite])]),
                int(finite[np.argmax(y[finite])]),
            }
        if len(finite) < len(part):
            keep.add(int(part[~np.isfinite(y[part])][0]))
    chosen = np.array(sorted(keep))
    return x[chosen], y[chosen]


def smooth(
    x: np.ndarray,
    y: np.ndarray,
    limit: int = POINTS // 2,
) -> tuple[np.ndarray, np.ndarray]:
    """A centred running mean over a fifteenth of the curve, weighted towards its middle
    (Hann), at no more than `limit` points; gaps stay gaps.
    """
    # means of buckets first, which is exact where a running sum would cancel
    if len(x) > limit:
        bucket = np.arange(len(x)) * limit // len(x)
        fine = np.isfinite(y)
        n = np.bincount(bucket[fine], minlength=limit)
        total = np.bincount(
            bucket[fine],
            np.asarray(y[fine], np.float64),
            limit,
        )
        x = np.bincount(bucket, x, limit) / np.bincount(
            bucket,
            minlength=limit,
        )
        y = np.where(
            n > 0,
            total / np.maximum(n, 1),
            np.nan,
        )
    if len(x) < 30:
        return x, y
    weights = np.hanning(2 * (len(x) // 30) + 3)
    fine = np.isfinite(y)
    share = np.convolve(fine, weights, "same")
    weighted = np.convolve(
        np.where(fine, y, 0.0),
        weights,
        "same",
    )
    return x, np.where(
        fine,
        weighted / np.where(fine, share, 1.0),
        np.nan,
    )


def linear(
    low: float,
    high: float,
    count: int = 5,
    unit: str = "",
) -> Scale:
    """An axis whose ticks are round numbers: 1, 2, 2.5 or 5 times a power of ten
    apart.
    """
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low = low - pad
        high = high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(
        m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9)
    )
    values = [
        i * step
        for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]
    decimals = max(
        0,
        -math.floor(math.log10(step) + 1e-9)
        + (1 if abs(step / power - 2.5) < 1e-9 else 0),
    )
    return Scale(
        low,
        high,
        ticks=[(v, _label(v, decimals, step) + unit) for v in values],
    )


def logarithmic(
    low: float,
    high: float,
    unit: str = "",
) -> Scale:
    """A logarithmic axis, with ticks at powers of ten, and at 2 and 5 times those where
    few powers fit.
    """
    decades = math.log10(high) - math.log10(low)
    factors, every = ((1, 2, 5), 1) if decades < 2.4 else ((1,), math.ceil(decades / 6))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [f * 10.0**p for p in powers if p % every == 0 for f in factors]
    return Scale(
        low,
        high,
        True,
        [(v, number(v, 1) + unit) for v in values if low <= v <= high],
    )


def draw(
    title: str,
    curves: Sequence[Curve],
    marks: Sequence[Mark] = (),
    *,
    steps: tuple[float, float],
    zero: bool = False,
    log: bool = False,
    unit: str = "",
    note: str = "",
    wide: bool = False,
) -> str:
    """A figure of one or more curves over the steps, with vertical marks, a read-out,
    and a legend of the curves.

    Args:
      steps: ends of the horizontal axis.
      zero: the vertical axis starts at 0.
      log: a logarithmic vertical axis, if the values are positive and span more than 50
        times.
      note: said beside the title.
    """
    values = np.concatenate([np.zeros(0), *(c.y[np.isfinite(c.y)] for c in curves)])
    head = f'<figcaption><b>{escape(title)}</b><span class="note">{escape(note)}</span>'
    kind = "chart wide" if wide else "chart"
    if not len(values):
        return (
            f'<figure class="{kind}">{head}</figcaption><p class="empty">No finite'
            " value was recorded.</p></figure>"
        )
    across = linear(*steps)
    up = _vertical(
        values,
        zero,
        log,
        unit,
    )
    lines = []
    points = []
    data = []
    for curve in curves:
        x, y = downsample(curve.x, curve.y)
        lines.append(
            f'<path class="{curve.style}" d="{_path(across.at(x), up.at(y))}"/>'
        )
        if curve.style == "evaluation" and len(x) <= 120:
            points.append(
                '<path class="evaluation dot"'
                f' d="{_path(across.at(x), up.at(y), dots=True)}"/>'
            )
        if curve.style not in ("raw", "undone"):
            data.append(
                {
                    "n": curve.name,
                    "s": curve.style,
                    "x": [_short(v, 9) for v in x],
                    "y": [_short(v, 5) for v in y],
                }
            )
    gaps = _gaps(curves)
    marks = [mark for mark in [*marks, *gaps] if across.low <= mark.x <= across.high]
    grid = "".join(
        f'<path class="grid" d="M0 {_y(t)}H{_UNITS}"/>'
        for t in up.at(np.array([t for t, _ in up.ticks]))
    )
    words = "".join(
        f'<i class="y" style="bottom:{100 * up.at(v):.2f}%">{escape(t)}</i>'
        for v, t in up.ticks
    )
    for value, text in across.ticks:
        at = 100 * float(across.at(value))
        words += (
            f'<i class="x{" end" if at > 96 else ""}" style="left:{at:.2f}%">{text}</i>'
        )
    told = [{"x": m.x, "t": m.text} for m in marks if m.text]
    keys = legend(
        curves,
        gaps,
        "logarithmic scale" if up.log else "",
    )
    spec = json.dumps(
        {
            "lo": across.low,
            "hi": across.high,
            "c": data,
            "m": told[:400],
            "u": unit,
        },
        separators=(",", ":"),
        allow_nan=False,
    )
    return (
        f'<figure class="{kind}"'
        f' data-chart="{escape(spec)}">{head}<output></output></figcaption><div'
        f' class="plot"><svg viewBox="0 0 {_UNITS} {_UNITS}" preserveAspectRatio="none"'
        f' role="img" aria-label="{escape(title)} over'
        f' steps">{grid}{_vertical_marks(marks, across)}{"".join(lines)}{"".join(points)}</svg>{words}<u'
        f' class="cursor"></u></div>{keys}</figure>'
    )


def _vertical(
    values: np.ndarray,
    zero: bool,
    log: bool,
    unit: str,
) -> Scale:
    low = float(values.min())
    high = float(values.max())
    if log and low > 0 and high / low > 50:
        pad = (high / low) ** 0.04
        return logarithmic(
            max(low / pad, 1e-300),
            min(high * pad, 1e300),
            unit,
        )
    if max(abs(low), abs(high)) > 1e300:  # the width of the axis itself would overflow
        low = max(low, -1e300)
        high = min(high, 1e300)
    pad = (high - low) * 0.05
    bottom = 0.0 if zero or 0 <= low < pad else low - pad
    top = 1.0 if low >= 0 and high <= 1 < high + pad else high + pad
    return linear(
        bottom,
        top if top > bottom else bottom + 1,
        unit=unit,
    )


def _path(
    x: np.ndarray,
    y: np.ndarray,
    dots: bool = False,
) -> str:
    """The `d` of a curve in 0..1: a stroke per run of finite points; a point alone, or
    each of `dots`, is a dot.
    """
    parts = []
    fresh = True
    fine = np.isfinite(y)
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        if not fine[i]:
            fresh = True
            continue
        # A stroke of no length with a round cap is a dot that the stretched SVG can't
        # turn into an ellipse.
        alone = dots or (fresh and (i + 1 == len(x) or not fine[i + 1]))
        parts.append(
            f"{'M' if fresh or dots else 'L'}{a * _UNITS:.1f}"
            f" {_y(b)}{'h0' if alone else ''}"
        )
        fresh = False
    return "".join(parts)


def _y(value: float) -> str:
    return f"{(1 - value) * _UNITS:.1f}"


def _gaps(curves: Sequence[Curve]) -> list[Mark]:
    """A mark where a curve stops being finite."""
    marks = {}
    for curve in curves:
        bad = ~np.isfinite(curve.y)
        for i in np.flatnonzero(bad & ~np.concatenate([[False], bad[:-1]]))[:50]:
            x = float(curve.x[i])
            marks[x] = Mark(
                x, "nonfinite", "not finite", f"not finite from step {x:,.0f}"
            )
    return list(marks.values())


def _vertical_marks(marks: Sequence[Mark], across: Scale) -> str:
    """One path per kind of mark; saves are ticks at the bottom, decisions and values
    not finite are ticks at the top.
    """
    span = {
        "save": f"{_UNITS * 0.965}V{_UNITS}",
        "nonfinite": f"0V{_UNITS * 0.06}",
        "decision": f"0V{_UNITS * 0.04}",
    }
    paths: dict[str, str] = {}
    for mark in marks:
        line = (
            f"M{float(across.at(mark.x)) * _UNITS:.1f}"
            f" {span.get(mark.kind, f'0V{_UNITS}')}"
        )
        paths[mark.kind] = paths.get(mark.kind, "") + line
    return "".join(f'<path class="mark {kind}" d="{d}"/>' for kind, d in paths.items())


def legend(
    curves: Sequence[Curve],
    marks: Sequence[Mark],
    remark: str = "",
) -> str:
    """A list of what the lines and the vertical marks stand for."""
    keys = list(dict.fromkeys((f"line {c.style}", c.name) for c in curves if len(c.x)))
    keys += list(dict.fromkeys((f"bar {m.kind}", m.name) for m in marks))
    items = "".join(
        f'<li><s class="{kind}"></s>{escape(name)}</li>' for kind, name in keys
    )
    return f'<ul class="legend">{items}{f"<li>{escape(remark)}</li>" if remark else ""}</ul>'


def _label(
    value: float,
    decimals: int,
    step: float,
) -> str:
    if abs(value) < step / 1e6:
        return "0"
    if abs(value) >= 1e15:
        return number(value, 3)
    # one exponent for the whole axis: 2.5e-4, 5e-4, 7.5e-4, 10e-4
    if decimals > 4 and abs(value) < 1000 * step:
        power = math.floor(math.log10(step) + 1e-9)
        return f"{value / 10.0**power:.3g}e{power}"
    if step >= 1e9:
        return f"{value / 1e9:g}G"
    if step >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if step >= 1e4 else f"{value:,.{decimals}f}"


def _short(value: float, digits: int) -> float | None:
    return float(f"{value:.{digits}g}") if math.isfinite(value) else None

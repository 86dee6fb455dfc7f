"""Line charts for the report, as HTML and SVG that need no other file.

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
from typing import Any

import numpy as np

from lepton_jax.monitor.progress import number

# Assumptions: a curve is at most 1,120 pixels wide, and a report some megabytes large.
POINTS = 1500  # of a curve, at most
MOST_DOTS = 120  # of a curve whose points are drawn
MOST_GAPS = 50  # of a curve that are marked
MOST_READ_OUTS = 400  # of the marks of a figure
FEWEST_TO_SMOOTH = 30  # points: half a window is a thirtieth of the curve
LOG_RATIO = 50  # of the values, above which an axis may be logarithmic

_UNITS = 1000  # of the SVG's own coordinates, in both directions
_GREATEST = 1e300  # end of an axis: beyond, its width itself would overflow
_LEAST = 1e-300  # end of a logarithmic axis
_EPSILON = 1e-9  # relative error that rounding leaves in the ends and steps of an axis


@dataclass
class Curve:
    """One curve; it has a gap where `y` is not finite.

    Attributes:
      name: for the legend and the read-out.
      x: steps, ascending, (n,).
      y: values, (n,).
      style: a CSS class: "raw" (thin), "train", "evaluation" (with points), "undone"
        (by a rollback) or "other".
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    style: str


@dataclass
class Mark:
    """An event at a step.

    Attributes:
      x: the step.
      kind: a CSS class.
      name: for the legend.
      text: the read-out; "": none.
    """

    x: float
    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class Axis:
    """The form of a vertical axis.

    Attributes:
      zero: whether it starts at 0.
      log: whether it is logarithmic, if the values are positive and span more than 50
        times.
      unit: written after each value.
    """

    zero: bool = False
    log: bool = False
    unit: str = ""


@dataclass
class Scale:
    """A map from the values of an axis to 0..1.

    Attributes:
      low: the value at 0.
      high: the value at 1.
      log: whether it is logarithmic.
      ticks: (value, label).
    """

    low: float
    high: float
    log: bool = False
    ticks: list[tuple[float, str]] = field(default_factory=list)

    def at(self, value: np.ndarray | float) -> np.ndarray:
        """Return the places of values on the axis."""
        low = self._evenly(self.low)
        high = self._evenly(self.high)
        return (self._evenly(value) - low) / (high - low)

    def _evenly(self, value: np.ndarray | float) -> np.ndarray:
        if not self.log:
            return np.asarray(value, np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.log10(value)


def downsample(
    x: np.ndarray,
    y: np.ndarray,
    limit: int = POINTS,
) -> tuple[np.ndarray, np.ndarray]:
    """Return at most about `limit` points of a curve.

    They are the least and the greatest value of each bucket, in order of `x`. A bucket
    that holds a value which is not finite has one of those as well, so that gaps
    survive.
    """
    if len(x) <= limit:
        return x, y

    chosen = {0, len(x) - 1}
    buckets = np.array_split(np.arange(len(x)), max(1, limit // 2 - 1))
    for bucket in buckets:
        is_finite = np.isfinite(y[bucket])
        finite = bucket[is_finite]
        if len(finite):
            chosen.add(int(finite[np.argmin(y[finite])]))
            chosen.add(int(finite[np.argmax(y[finite])]))
        if len(finite) < len(bucket):
            chosen.add(int(bucket[~is_finite][0]))
    places = np.array(sorted(chosen))
    return x[places], y[places]


def smooth(
    x: np.ndarray,
    y: np.ndarray,
    limit: int = POINTS // 2,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a centred running mean over a fifteenth of the curve.

    It is weighted towards its middle (Hann), and has no more than `limit` points; gaps
    stay gaps.
    """
    # means of buckets first, which is exact where a running sum would cancel
    if len(x) > limit:
        x, y = _means(x, y, limit)
    if len(x) < FEWEST_TO_SMOOTH:
        return x, y

    half_width = len(x) // FEWEST_TO_SMOOTH
    weights = np.hanning(2 * half_width + 3)
    fine = np.isfinite(y)
    share = np.convolve(fine, weights, "same")
    weighted = np.convolve(
        np.where(fine, y, 0.0),
        weights,
        "same",
    )
    mean = weighted / np.where(fine, share, 1.0)
    return x, np.where(fine, mean, np.nan)


def _means(
    x: np.ndarray,
    y: np.ndarray,
    buckets: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean step and the mean finite value of each bucket."""
    bucket = np.arange(len(x)) * buckets // len(x)
    fine = np.isfinite(y)
    count = np.bincount(bucket[fine], minlength=buckets)
    total = np.bincount(
        bucket[fine],
        np.asarray(y[fine], np.float64),
        buckets,
    )
    mean = np.where(
        count > 0,
        total / np.maximum(count, 1),
        np.nan,
    )

    steps = np.bincount(bucket, x, buckets) / np.bincount(
        bucket,
        minlength=buckets,
    )
    return steps, mean


def linear(
    low: float,
    high: float,
    count: int = 5,
    unit: str = "",
) -> Scale:
    """Return an axis with about `count` ticks at round numbers.

    They are 1, 2, 2.5 or 5 times a power of ten apart.

    >>> [label for _, label in linear(0.0, 11.0).ticks]
    ['0', '2.5', '5.0', '7.5', '10.0']
    """
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low = low - pad
        high = high + pad

    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    least = rough * (1 - _EPSILON)
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= least)
    first = math.ceil(low / step - _EPSILON)
    last = math.floor(high / step + _EPSILON)

    decimals = -math.floor(math.log10(step) + _EPSILON)
    is_quarter = abs(step / power - 2.5) < _EPSILON
    if is_quarter:
        decimals += 1
    values = [i * step for i in range(first, last + 1)]
    ticks = [(v, _label(v, max(0, decimals), step) + unit) for v in values]
    return Scale(low, high, ticks=ticks)


def logarithmic(
    low: float,
    high: float,
    unit: str = "",
) -> Scale:
    """Return a logarithmic axis with ticks at powers of ten.

    If few powers fit, there are ticks at 2 and 5 times those, too.
    """
    decades = math.log10(high) - math.log10(low)
    if decades < 2.4:
        factors: tuple[int, ...] = (1, 2, 5)
        every = 1
    else:
        factors = (1,)
        every = math.ceil(decades / 6)

    first = math.floor(math.log10(low))
    last = math.ceil(math.log10(high))
    powers = [power for power in range(first, last + 1) if power % every == 0]
    values = [factor * 10.0**power for power in powers for factor in factors]
    ticks = [(v, number(v, 1) + unit) for v in values if low <= v <= high]
    return Scale(low, high, True, ticks)


def draw(
    title: str,
    curves: Sequence[Curve],
    marks: Sequence[Mark] = (),
    *,
    steps: tuple[float, float],
    axis: Axis = Axis(),
    note: str = "",
    wide: bool = False,
) -> str:
    """Draw a figure of one or more curves over the steps, as HTML.

    It has vertical marks, a read-out, and a legend of the curves.

    Args:
      title: of the figure.
      curves: what to draw.
      marks: events at some steps.
      steps: ends of the horizontal axis.
      axis: the vertical axis.
      note: written next to the title.
      wide: whether the figure takes the whole width of the page.
    """
    finite = [curve.y[np.isfinite(curve.y)] for curve in curves]
    values = np.concatenate([np.zeros(0), *finite])
    head = f'<figcaption><b>{escape(title)}</b><span class="note">{escape(note)}</span>'
    css_class = "chart wide" if wide else "chart"
    if not len(values):
        return (
            f'<figure class="{css_class}">{head}</figcaption><p class="empty">No finite'
            " value was recorded.</p></figure>"
        )

    across = linear(*steps)
    up = _vertical(values, axis)
    gaps = _gaps(curves)
    visible = [mark for mark in [*marks, *gaps] if across.low <= mark.x <= across.high]
    thinned = [_thinned(curve) for curve in curves]
    lines = "".join(_line(curve, across, up) for curve in thinned)
    dots = "".join(_dots(curve, across, up) for curve in thinned)
    keys = legend(curves, gaps, "logarithmic scale" if up.log else "")
    spec = _read_out_spec(thinned, visible, across, axis.unit)
    return (
        f'<figure class="{css_class}" data-chart="{escape(spec)}">'
        f'{head}<output></output></figcaption><div class="plot">'
        f'<svg viewBox="0 0 {_UNITS} {_UNITS}" preserveAspectRatio="none"'
        f' role="img" aria-label="{escape(title)} over steps">'
        f"{_grid(up)}{_vertical_marks(visible, across)}{lines}{dots}</svg>"
        f'{_tick_labels(up, across)}<u class="cursor"></u></div>{keys}</figure>'
    )


# ---- parts of a figure ----


def _thinned(curve: Curve) -> Curve:
    return Curve(
        curve.name,
        *downsample(curve.x, curve.y),
        curve.style,
    )


def _line(
    curve: Curve,
    across: Scale,
    up: Scale,
) -> str:
    path = _path(across.at(curve.x), up.at(curve.y))
    return f'<path class="{curve.style}" d="{path}"/>'


def _dots(
    curve: Curve,
    across: Scale,
    up: Scale,
) -> str:
    if curve.style != "evaluation" or len(curve.x) > MOST_DOTS:
        return ""
    path = _path(
        across.at(curve.x),
        up.at(curve.y),
        dots=True,
    )
    return f'<path class="evaluation dot" d="{path}"/>'


def _grid(up: Scale) -> str:
    heights = up.at(np.array([value for value, _ in up.ticks]))
    return "".join(
        f'<path class="grid" d="M0 {_y(height)}H{_UNITS}"/>' for height in heights
    )


def _tick_labels(up: Scale, across: Scale) -> str:
    labels = [
        f'<i class="y" style="bottom:{100 * up.at(value):.2f}%">{escape(label)}</i>'
        for value, label in up.ticks
    ]
    for value, label in across.ticks:
        left = 100 * float(across.at(value))
        # the last one must not reach beyond the figure
        css_class = "x end" if left > 96 else "x"
        labels.append(f'<i class="{css_class}" style="left:{left:.2f}%">{label}</i>')
    return "".join(labels)


def _read_out_spec(
    curves: Sequence[Curve],
    marks: Sequence[Mark],
    across: Scale,
    unit: str,
) -> str:
    """Return what the page's script needs for the read-out, as JSON."""
    shown = [curve for curve in curves if curve.style not in ("raw", "undone")]
    texts = [{"x": mark.x, "t": mark.text} for mark in marks if mark.text]
    spec = {
        "lo": across.low,
        "hi": across.high,
        "c": [_read_out(curve) for curve in shown],
        "m": texts[:MOST_READ_OUTS],
        "u": unit,
    }
    return json.dumps(
        spec,
        separators=(",", ":"),
        allow_nan=False,
    )


def _read_out(curve: Curve) -> dict[str, Any]:
    return {
        "n": curve.name,
        "s": curve.style,
        "x": [_short(value, 9) for value in curve.x],
        "y": [_short(value, 5) for value in curve.y],
    }


def _vertical(values: np.ndarray, axis: Axis) -> Scale:
    """Return the scale of the vertical axis of some values, with a margin."""
    low = float(values.min())
    high = float(values.max())
    if axis.log and low > 0 and high / low > LOG_RATIO:
        pad = (high / low) ** 0.04
        bottom = max(low / pad, _LEAST)
        return logarithmic(
            bottom,
            min(high * pad, _GREATEST),
            axis.unit,
        )

    low = max(low, -_GREATEST)
    high = min(high, _GREATEST)
    pad = (high - low) * 0.05
    bottom = 0.0 if axis.zero or 0 <= low < pad else low - pad
    top = 1.0 if low >= 0 and high <= 1 < high + pad else high + pad
    return linear(
        bottom,
        top if top > bottom else bottom + 1,
        unit=axis.unit,
    )


def _path(
    x: np.ndarray,
    y: np.ndarray,
    dots: bool = False,
) -> str:
    """Return the `d` of a path through the points of a curve, which are in 0..1.

    There is a stroke for each run of finite points. A point that is alone is a dot, and
    so is every point if `dots` is true.
    """
    parts = []
    fine = np.isfinite(y)
    for i in np.flatnonzero(fine).tolist():
        begins = dots or i == 0 or not fine[i - 1]
        ends = dots or i + 1 == len(x) or not fine[i + 1]
        move = "M" if begins else "L"
        # A stroke of no length with a round cap is a dot that the stretched SVG can't
        # turn into an ellipse.
        dot = "h0" if begins and ends else ""
        parts.append(f"{move}{x[i] * _UNITS:.1f} {_y(y[i])}{dot}")
    return "".join(parts)


def _y(value: float) -> str:
    return f"{(1 - value) * _UNITS:.1f}"


def _gaps(curves: Sequence[Curve]) -> list[Mark]:
    """Return a mark where a curve stops being finite."""
    marks = {}
    for curve in curves:
        bad = ~np.isfinite(curve.y)
        bad_before = np.concatenate([[False], bad[:-1]])
        begins = np.flatnonzero(bad & ~bad_before)
        for x in curve.x[begins[:MOST_GAPS]].tolist():
            text = f"not finite from step {x:,.0f}"
            marks[x] = Mark(x, "nonfinite", "not finite", text)
    return list(marks.values())


def _vertical_marks(marks: Sequence[Mark], across: Scale) -> str:
    """Return one path for each kind of mark.

    Saves are ticks at the bottom, decisions and values not finite are ticks at the top.
    """
    whole_height = f"0V{_UNITS}"
    spans = {
        "save": f"{_UNITS * 0.965}V{_UNITS}",
        "nonfinite": f"0V{_UNITS * 0.06}",
        "decision": f"0V{_UNITS * 0.04}",
    }
    paths: dict[str, str] = {}
    for mark in marks:
        x = float(across.at(mark.x)) * _UNITS
        span = spans.get(mark.kind, whole_height)
        paths[mark.kind] = paths.get(mark.kind, "") + f"M{x:.1f} {span}"
    return "".join(f'<path class="mark {kind}" d="{d}"/>' for kind, d in paths.items())


def legend(
    curves: Sequence[Curve],
    marks: Sequence[Mark],
    remark: str = "",
) -> str:
    """Return a list that explains the lines and the vertical marks, as HTML."""
    keys = [(f"line {curve.style}", curve.name) for curve in curves if len(curve.x)]
    keys += [(f"bar {mark.kind}", mark.name) for mark in marks]
    items = [
        f'<li><s class="{css_class}"></s>{escape(name)}</li>'
        for css_class, name in dict.fromkeys(keys)
    ]
    if remark:
        items.append(f"<li>{escape(remark)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _label(
    value: float,
    decimals: int,
    step: float,
) -> str:
    """Return the label of a tick on an axis whose ticks are `step` apart."""
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

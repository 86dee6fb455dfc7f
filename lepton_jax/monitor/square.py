"""Points in a square with its diagonal, and bars, as HTML and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from lepton_jax.monitor.chart import Scale, linear
from lepton_jax.monitor.progress import number

_UNITS = 1000  # of the SVG's own coordinates, in both directions
LARGEST_DOT = 14  # pixels
SMALLEST_DOT = 3  # pixels
GAP = 0.08  # of a bar's width, left free between two; assumption
PAD = 0.02  # of the ends, so that no point lies on the frame; assumption

STYLE = """
.square{position:relative;aspect-ratio:1.35;margin:30px 0 44px 56px}
.square b,.histogram b{
 position:absolute;font-weight:400;font-size:11.5px;color:var(--soft)
}
.square b.x{top:100%;right:0;margin-top:24px}
.square b.y{left:0;bottom:100%;margin-bottom:3px}
.square i,.histogram i{
 position:absolute;font-style:normal;font-size:11.5px;line-height:1;color:var(--soft);
 white-space:nowrap
}
.square .dot{stroke:var(--train);opacity:.75}
.square .diagonal{stroke:var(--line);stroke-width:1;stroke-dasharray:4 4}
.histogram{position:relative;height:200px;margin:12px 0 26px}
.histogram .bars{fill:var(--train);opacity:.8;stroke:none}
.histogram .zero{stroke:var(--eval);stroke-width:1.25}
"""


@dataclass(frozen=True)
class Square:
    """Points in a square with one scale in both directions.

    Attributes:
      title: of the figure.
      note: next to it.
      x: of the points, (n,).
      y: the same.
      sizes: of the points, 0 to 1, (n,).
      across: name of the horizontal axis.
      up: name of the vertical axis.
      ends: of both axes.
      is_line: whether the points are joined.
    """

    title: str
    note: str
    x: np.ndarray
    y: np.ndarray
    sizes: np.ndarray
    across: str
    up: str
    ends: tuple[float, float]
    is_line: bool = False


def square(spec: Square) -> str:
    """Draw points next to the diagonal, on which both of their numbers are equal."""
    low, high = spec.ends
    pad = PAD * ((high - low) or 1.0)
    scale = linear(low - pad, high + pad)
    places = zip(
        scale.at(spec.x),
        scale.at(spec.y),
        spec.sizes,
        strict=True,
    )
    dots = "".join(
        _dot(
            x,
            y,
            size,
        )
        for x, y, size in places
    )
    line = _line(scale, spec) if spec.is_line else ""
    return (
        f"{_head(spec.title, spec.note)}"
        f'<div class="square"><svg viewBox="0 0 {_UNITS} {_UNITS}"'
        f' preserveAspectRatio="none" role="img" aria-label="{escape(spec.title)}">'
        f'{_grid(scale)}<path class="diagonal" d="M0 {_UNITS}L{_UNITS} 0"/>'
        f"{line}{dots}</svg>{_labels(scale)}"
        f'<b class="x">{escape(spec.across)}</b><b class="y">{escape(spec.up)}</b>'
        "</div></figure>"
    )


def bars(
    title: str,
    note: str,
    counts: Sequence[int],
    edges: Sequence[float],
) -> str:
    """Draw a histogram, with a line at 0."""
    if not counts:
        return ""
    most = max(counts) or 1
    width = _UNITS / len(counts)
    path = ""
    for place, count in enumerate(counts):
        left = (place + GAP / 2) * width
        top = _UNITS * (1 - count / most)
        path += f"M{left:.1f} {_UNITS}V{top:.1f}h{width * (1 - GAP):.1f}V{_UNITS}z"
    low = edges[0]
    high = edges[-1]
    zero = ""
    if low < 0 < high:
        x = _UNITS * -low / (high - low)
        zero = f'<path class="zero" d="M{x:.1f} 0V{_UNITS}"/>'
    return (
        f"{_head(title, note)}"
        f'<div class="histogram"><svg viewBox="0 0 {_UNITS} {_UNITS}"'
        f' preserveAspectRatio="none" role="img" aria-label="{escape(title)}">'
        f'<path class="bars" d="{path}"/>{zero}</svg>'
        f'<i style="top:100%;left:0;margin-top:8px">{number(low)}</i>'
        f'<i style="top:100%;right:0;margin-top:8px">{number(high)}</i></div></figure>'
    )


# ---- parts of a figure ----


def _head(title: str, note: str) -> str:
    return (
        f"<figure><figcaption><b>{escape(title)}</b>"
        f'<span class="note">{escape(note)}</span></figcaption>'
    )


def _dot(x: float, y: float, size: float) -> str:
    width = max(SMALLEST_DOT, LARGEST_DOT * size)
    place = f"M{x * _UNITS:.1f} {(1 - y) * _UNITS:.1f}h0"
    return f'<path class="dot" style="stroke-width:{width:.1f}" d="{place}"/>'


def _line(scale: Scale, spec: Square) -> str:
    points = [
        f"{x * _UNITS:.1f} {(1 - y) * _UNITS:.1f}"
        for x, y in zip(
            scale.at(spec.x),
            scale.at(spec.y),
            strict=True,
        )
    ]
    return f'<path class="train" d="M{"L".join(points)}"/>'


def _grid(scale: Scale) -> str:
    heights = [_UNITS * (1 - float(scale.at(value))) for value, _ in scale.ticks]
    return "".join(f'<path class="grid" d="M0 {y:.1f}H{_UNITS}"/>' for y in heights)


def _labels(scale: Scale) -> str:
    labels = []
    for value, text in scale.ticks:
        place = 100 * float(scale.at(value))
        labels.append(f'<i class="y" style="bottom:{place:.2f}%">{escape(text)}</i>')
        labels.append(f'<i class="x" style="left:{place:.2f}%">{escape(text)}</i>')
    return "".join(labels)

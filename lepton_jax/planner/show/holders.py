"""Drawings of arrays cut into their parts, and of the devices that hold them.

Each square is a device. A colour is a part of an array: a device has the colour of the
part that it holds, and the array's own drawing has it at the part's place. For a kernel
of shape (64, 128) with P(fsdp, tensor) on a mesh fsdp=4 x tensor=2, the array is cut
into 4 x 2 rectangles, and each of the 8 squares has the colour of one of them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from lepton_jax.planner.plans import ArrayPlan, Entries, Plan, axes_of
from lepton_jax.planner.show.colour import oklch
from lepton_jax.planner.show.rows import Row, meshed, rows, spelled
from lepton_jax.planner.show.words import shaped

# The sizes below were chosen by eye.

# pixels of a device's square, and between two
CELL = 15
GAP = 2
# pixels that the stroke around a square takes, which rounds its corners
STROKE = 4
# pixels between two panels
PANEL_GAP = 12
# squares of a drawing along a row and a column, and panels, at most
COLUMNS = 16
ROWS = 8
PANELS = 2
# arrays that are drawn
FIGURES = 4
# pixels of an array's longer side
SIDE = 132
# ratios of an array's sides, and that of a vector
LEAST_RATIO = 0.45
MOST_RATIO = 1.6
VECTOR_RATIO = 0.16
# pixels above a drawing, for a line of words
ABOVE = 16
# pixels of a letter, about
LETTER = 6.2
# pixels by which parts overlap, or rounding leaves gaps
OVERLAP = 0.6
# squares that each say what they hold, at most
MOST_TITLES = 128

# OKLCH: chroma without and with a hue; the hues from blue to red, in degrees; the
# lightnesses. Assumption: sixteen parts can be told apart on a light and a dark page.
PALE = 0.02
VIVID = 0.115
FIRST_HUE = 262
HUES = -232
DARKEST = 0.52
LIGHTS = 0.3

# (name, size) of mesh axes
Axes = tuple[tuple[str, int], ...]


def holders(plan: Plan) -> str:
    """Return drawings of the batch and of the heaviest parameter of each layout."""
    every = rows(plan)
    if not every:
        return ""

    groups = _alike(every)
    params = [group for group in groups if group[0].array.kind == "params"]
    heaviest = [max(group, key=lambda row: row.elements) for group in params]
    heaviest.sort(key=lambda row: -row.elements)
    inputs = [row for row in every if row.array.kind == "inputs"]
    drawn = inputs[:1]
    drawn += heaviest[: FIGURES - len(drawn)]

    places = Places.of(plan)
    text = (
        f"Squares are devices, in the mesh {meshed(plan)}. A colour is a part of the"
        " array: its hue tells the parts that are computed with, its lightness those"
        f" in which it is kept besides; grey is a copy of all of it.{places.remark}"
    )
    figures = ""
    for row in drawn:
        (group,) = (group for group in groups if row in group)
        figures += _figure(row, len(group) - 1, places, plan)
    return (
        f"<h4>Who holds what</h4><p style='margin:0 0 10px'>{escape(text)}</p>{figures}"
    )


def _alike(every: Sequence[Row]) -> list[list[Row]]:
    """Return the rows in groups of those that lie alike; parameters by themselves."""
    groups: dict[tuple, list[Row]] = {}
    for row in every:
        array = row.array
        key = (array.spec, array.use, array.kind == "params")
        groups.setdefault(key, []).append(row)
    return list(groups.values())


# ---- the devices as squares ----


class Square(NamedTuple):
    """A drawn device.

    Attributes:
      column, row, panel: where it is drawn.
      indices: its index on each mesh axis.
    """

    column: int
    row: int
    panel: int
    indices: dict[str, int]


@dataclass(frozen=True)
class Places:
    """The devices as squares.

    Attributes:
      across, down, stack: mesh axes along columns, rows and panels.
      wrap: squares of a row where there is one axis alone; else 0.
    """

    across: Axes
    down: Axes
    stack: Axes
    wrap: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Places:
        """Return places for a plan's mesh, the two largest axes across and down."""
        axes = tuple(axis for axis in plan.mesh.items() if axis[1] > 1)
        if len(axes) < 2:
            wrap = min(COLUMNS, _size(axes))
            return cls(
                axes,
                down=(),
                stack=(),
                wrap=wrap,
            )

        by_size = sorted(axes, key=lambda axis: -axis[1])
        across, down, *_ = by_size
        stack = tuple(axis for axis in axes if axis not in (across, down))
        return cls((across,), (down,), stack)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Squares drawn along a row, along a column, and panels."""
        devices = _size(self.across)
        if self.wrap:
            lines = math.ceil(devices / self.wrap)
            return self.wrap, min(ROWS, lines), 1
        return (
            min(COLUMNS, devices),
            min(ROWS, _size(self.down)),
            min(PANELS, _size(self.stack)),
        )

    def squares(self) -> Iterator[Square]:
        """Yield what is drawn: devices at even distances, on the first panels."""
        if self.wrap:
            yield from self._wrapped()
            return

        columns, lines, panels = self.counts
        wide = _size(self.across)
        high = _size(self.down)
        places = itertools.product(*map(range, (panels, lines, columns)))
        for panel, row, column in places:
            across = _indices(self.across, column * wide // columns)
            down = _indices(self.down, row * high // lines)
            stack = _indices(self.stack, panel)
            yield Square(column, row, panel, across | down | stack)

    def _wrapped(self) -> Iterator[Square]:
        """Yield the devices of one axis alone, row after row."""
        columns, lines, _ = self.counts
        devices = _size(self.across)
        drawn = min(devices, columns * lines)
        for i in range(drawn):
            row, column = divmod(i, columns)
            indices = _indices(self.across, i * devices // drawn)
            yield Square(column, row, 0, indices)

    @property
    def remark(self) -> str:
        """Sentences about what the drawing leaves out."""
        columns, lines, panels = self.counts
        all_panels = _size(self.stack)
        devices = _size(self.across) * _size(self.down)
        a_square = devices / (columns * lines)
        text = ""
        if a_square > 1:
            text = f" Each square stands for {a_square:.3g} devices."
        if panels < all_panels:
            text += f" The first {panels} of {all_panels} panels are drawn."
        return text


def _size(axes: Axes) -> int:
    return math.prod(n for _, n in axes)


def _indices(
    axes: Axes,
    i: int,
) -> dict[str, int]:
    """Return the index on each axis of device i, counted with the last axis fastest."""
    indices = {}
    for name, n in reversed(axes):
        indices[name] = i % n
        i = i // n
    return indices


# ---- the parts of an array ----


class Split(NamedTuple):
    """A dim that is split: its mesh axes, and into how many parts."""

    dim: int
    axes: tuple[str, ...]
    parts: int


class Part(NamedTuple):
    """A part along one dim: its number, from 0, among all of them."""

    number: int
    total: int

    @property
    def share(self) -> float:
        """Place among the parts: 0 for the first, 1 for the last."""
        return self.number / max(self.total - 1, 1)


def _splits(
    entries: Entries,
    plan: Plan,
) -> list[Split]:
    """Return the dims that are split."""
    splits = []
    for dim, entry in enumerate(entries):
        axes = axes_of(entry)
        sizes = [plan.mesh.get(name, 1) for name in axes]
        parts = math.prod(sizes)
        if parts > 1:
            splits.append(Split(dim, axes, parts))
    return splits


@dataclass(frozen=True)
class Tones:
    """Which dims of an array its colours tell apart.

    Attributes:
      hue: dim that a colour's hue stands for; None: none is in parts.
      lightness: dim that its lightness stands for; None: no second one is in parts.
    """

    hue: int | None
    lightness: int | None

    @classmethod
    def of(
        cls,
        array: ArrayPlan,
        plan: Plan,
    ) -> Tones:
        """Return tones whose hue is for parts that are computed with, if any."""
        splits = _splits(array.use, plan) + _splits(array.spec, plan)
        dims = dict.fromkeys(split.dim for split in splits)
        hue, lightness, *_ = [*dims, None, None]
        return cls(hue, lightness)

    def colour(self, parts: Mapping[int, Part]) -> str:
        """Return the colour of a part of the array; grey for a whole array.

        Args:
          parts: dim to the part along it.
        """
        hue = None if self.hue is None else parts.get(self.hue)
        lightness = None if self.lightness is None else parts.get(self.lightness)
        if hue is None and lightness is None:
            return "var(--copy)"

        # without a second dim the middle of three tones
        chroma = PALE if hue is None else VIVID
        along_hue = (hue or Part(0, 1)).share
        along_lightness = (lightness or Part(1, 3)).share
        degrees = FIRST_HUE + HUES * along_hue
        light = DARKEST + LIGHTS * along_lightness
        return oklch(light, chroma, math.radians(degrees))


# ---- the drawings ----


def _figure(
    row: Row,
    alike: int,
    places: Places,
    plan: Plan,
) -> str:
    """Return an array with its devices; `alike` other rows lie as it does."""
    array = row.array
    tones = Tones.of(array, plan)
    is_gathered = array.use != array.spec
    kept = _devices(array.spec, tones, places, plan)
    panels = _panel("the array", _array(array, tones, plan))
    if is_gathered:
        in_use = _devices(array.use, tones, places, plan)
        panels += _panel("kept by the devices", kept)
        panels += _panel("in use", in_use)
    else:
        panels += _panel("on the devices", kept)

    times = f"{row.count} x " if row.count > 1 else ""
    used = f", used as {spelled(array.use)}" if is_gathered else ""
    verb = "lies" if alike == 1 else "lie"
    more = f", and {alike} more that {verb} alike" if alike else ""
    caption = (
        f"{times}{shaped(array.shape)} {array.dtype}, {spelled(array.spec)}{used}{more}"
    )
    return (
        f"<figure><figcaption><b>{escape(row.path)}</b><span>{escape(caption)}</span>"
        f'</figcaption><div class="row">{panels}</div></figure>'
    )


def _panel(title: str, drawing: str) -> str:
    return f"<div><small>{title}</small>{drawing}</div>"


def _devices(
    entries: Entries,
    tones: Tones,
    places: Places,
    plan: Plan,
) -> str:
    """Return the devices, each in the colour of the part that it holds."""
    columns, lines, panels = places.counts
    has_titles = columns * lines * panels <= MOST_TITLES
    splits = _splits(entries, plan)
    step = CELL + GAP
    panel_width = columns * step + PANEL_GAP
    side = CELL - STROKE

    drawn = ""
    for square in places.squares():
        parts = _held(splits, square.indices, plan)
        title = _title(square.indices, parts) if has_titles else ""
        x = 2 + square.panel * panel_width + square.column * step
        y = ABOVE + 2 + square.row * step
        path = f"M{x} {y}h{side}v{side}h-{side}z"
        drawn += f'<path color="{tones.colour(parts)}" d="{path}">{title}</path>'
    return _svg(
        panels * panel_width,
        ABOVE + lines * step,
        _directions(places),
        drawn,
        f"{spelled(entries)} on the devices",
    )


def _held(
    splits: Sequence[Split],
    indices: Mapping[str, int],
    plan: Plan,
) -> dict[int, Part]:
    """Return the part along each split dim that a device holds."""
    parts = {}
    for dim, axes, count in splits:
        index = 0
        for name in axes:
            index *= plan.mesh[name]
            index += indices.get(name, 0)
        parts[dim] = Part(index, count)
    return parts


def _title(
    indices: Mapping[str, int],
    parts: Mapping[int, Part],
) -> str:
    """Return what a square says under the pointer."""
    axes = [f"{name} {i}" for name, i in indices.items()]
    device = ", ".join(axes)
    held = " and ".join(
        f"part {part.number + 1} of {part.total} along dim {dim}"
        for dim, part in parts.items()
    )
    words = f"{escape(device or 'the device')}: {held or 'all of it'}"
    return f"<title>{words}</title>"


def _directions(places: Places) -> str:
    """Return which mesh axes run across, down and over the panels."""
    words = []
    for axes, arrow in (
        (places.across, "→"),
        (places.down, "↓"),
        (places.stack, "⇉"),
    ):
        if axes:
            named = " x ".join(f"{name} {n}" for name, n in axes)
            words.append(f"{named} {arrow}")
    return "  ".join(words) or "one device"


def _array(
    array: ArrayPlan,
    tones: Tones,
    plan: Plan,
) -> str:
    """Return the array's two most telling dims as a rectangle, cut into its parts."""
    splits = _splits(array.spec, plan)
    parts = {split.dim: split.parts for split in splits}
    down, across = _telling_dims(array, parts)
    ratio = _ratio(array, down, across)
    width = SIDE / max(ratio, 1)
    height = SIDE * min(ratio, 1)
    lines = min(COLUMNS, _parts(parts, down))
    columns = min(COLUMNS, _parts(parts, across))
    cell_width = width / columns
    cell_height = height / lines

    drawn = ""
    for row, column in itertools.product(range(lines), range(columns)):
        cell: dict[int, Part] = {}
        for dim, i, count in ((down, row, lines), (across, column, columns)):
            if dim in parts:
                total = parts[dim]
                cell[dim] = Part(i * total // count, total)
        drawn += (
            f'<rect x="{column * cell_width:.1f}" y="{ABOVE + row * cell_height:.1f}"'
            f' width="{cell_width + OVERLAP:.1f}" height="{cell_height + OVERLAP:.1f}"'
            f' fill="{tones.colour(cell)}"/>'
        )
    words = _dim_words(array, across, "→") + _dim_words(array, down, "↓")
    return _svg(
        width,
        ABOVE + height,
        "  ".join(words) or "a number",
        drawn,
        f"{shaped(array.shape)} in parts",
    )


def _telling_dims(
    array: ArrayPlan,
    parts: Mapping[int, int],
) -> tuple[int | None, int | None]:
    """Return the dims to draw down and across: those in parts, else the longest."""

    def weight(dim: int) -> tuple[bool, int]:
        return dim not in parts, -array.shape[dim]

    dims = sorted(range(len(array.shape)), key=weight)
    if not dims:
        return None, None
    if len(dims) == 1:
        return None, dims[0]
    down, across = sorted(dims[:2])
    return down, across


def _dim_words(
    array: ArrayPlan,
    dim: int | None,
    arrow: str,
) -> list[str]:
    return [] if dim is None else [f"dim {dim}: {array.shape[dim]:,} {arrow}"]


def _ratio(
    array: ArrayPlan,
    down: int | None,
    across: int | None,
) -> float:
    """Return height by width of a drawing: between the true one and a square."""
    if down is None or across is None:
        return VECTOR_RATIO
    true = array.shape[down] / array.shape[across]
    return min(MOST_RATIO, max(LEAST_RATIO, true**0.5))


def _parts(
    parts: Mapping[int, int],
    dim: int | None,
) -> int:
    return 1 if dim is None else parts.get(dim, 1)


def _svg(
    width: float,
    height: float,
    words: str,
    drawn: str,
    label: str,
) -> str:
    """Return a drawing below a line of words."""
    full_width = max(width, LETTER * len(words))
    full_height = height + 2
    return (
        f'<svg width="{full_width:.0f}" height="{full_height:.0f}" role="img"'
        f' aria-label="{escape(label)}"><text y="10"'
        f' xml:space="preserve">{escape(words)}</text>{drawn}</svg>'
    )

"""Who holds what: arrays cut into their parts, and the devices that hold them.

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

# (name, size) of mesh axes
Axes = tuple[tuple[str, int], ...]


def holders(plan: Plan) -> str:
    """Return drawings of the batch and of the heaviest parameters that lie apart."""
    every = rows(plan)
    if not every:
        return ""

    alike: dict[tuple, list[Row]] = {}
    for row in every:
        key = (row.array.spec, row.array.use, row.array.kind == "params")
        alike.setdefault(key, []).append(row)
    heaviest = [
        max(group, key=lambda row: row.elements)
        for (_, _, is_parameter), group in alike.items()
        if is_parameter
    ]
    heaviest.sort(key=lambda row: -row.elements)
    batch = [row for row in every if row.array.kind == "inputs"][:1]
    drawn = [*batch, *heaviest[: FIGURES - len(batch)]]

    places = Places.of(plan)
    others = {id(row): len(group) - 1 for group in alike.values() for row in group}
    text = (
        f"Squares are devices, in the mesh {meshed(plan)}. A colour is a part of the"
        " array: its hue tells the parts that are computed with, its lightness those"
        f" in which it is kept besides; grey is a copy of all of it.{places.remark}"
    )
    figures = [_figure(row, others[id(row)], places, plan) for row in drawn]
    return (
        f"<h4>Who holds what</h4><p style='margin:0 0 10px'>{escape(text)}</p>"
        + "".join(figures)
    )


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
        axes = [(name, n) for name, n in plan.mesh.items() if n > 1]
        if not axes:
            return cls((), (), (), wrap=1)
        if len(axes) == 1:
            (_, size) = axes[0]
            return cls(tuple(axes), (), (), wrap=min(COLUMNS, size))

        across, down, *_ = sorted(axes, key=lambda axis: -axis[1])
        stack = tuple(axis for axis in axes if axis not in (across, down))
        return cls((across,), (down,), stack)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Squares drawn along a row, along a column, and panels."""
        devices = _size(self.across)
        if self.wrap:
            return self.wrap, min(ROWS, -(-devices // self.wrap)), 1
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
        places = itertools.product(range(panels), range(lines), range(columns))
        for panel, row, column in places:
            across = _indices(self.across, column * _size(self.across) // columns)
            down = _indices(self.down, row * _size(self.down) // lines)
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
        each = _size(self.across) * _size(self.down) / (columns * lines)
        text = f" Each square stands for {each:.3g} devices." if each > 1 else ""
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


def _splits(
    entries: Entries,
    plan: Plan,
) -> list[Split]:
    """Return the dims that are split."""
    splits = []
    for dim, entry in enumerate(entries):
        axes = axes_of(entry)
        parts = math.prod(plan.mesh.get(name, 1) for name in axes)
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
        used = [split.dim for split in _splits(array.use, plan)]
        stored = [split.dim for split in _splits(array.spec, plan)]
        dims = list(dict.fromkeys([*used, *stored]))
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

        # hues go from blue to red; without a second dim the middle of three tones
        chroma = 0.02 if hue is None else 0.115
        i, n = hue or Part(0, 1)
        j, m = lightness or Part(1, 3)
        turn = math.radians(262 - 232 * (i / max(n - 1, 1)))
        return oklch(0.52 + 0.3 * (j / max(m - 1, 1)), chroma, turn)


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
    panels = _panel("the array", _array(array, tones, plan))
    title = "kept by the devices" if is_gathered else "on the devices"
    panels += _panel(title, _devices(array.spec, tones, places, plan))
    if is_gathered:
        panels += _panel("in use", _devices(array.use, tones, places, plan))

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
            index = index * plan.mesh[name] + indices.get(name, 0)
        parts[dim] = Part(index, count)
    return parts


def _title(
    indices: Mapping[str, int],
    parts: Mapping[int, Part],
) -> str:
    """Return what a square says under the pointer."""
    device = ", ".join(f"{name} {i}" for name, i in indices.items())
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
    parts = {split.dim: split.parts for split in _splits(array.spec, plan)}
    by_weight = sorted(
        range(len(array.shape)),
        key=lambda dim: (dim not in parts, -array.shape[dim]),
    )
    down, across = [None, None, *sorted(by_weight[:2])][-2:]
    ratio = _ratio(array, down, across)
    width = SIDE / max(ratio, 1)
    height = SIDE * min(ratio, 1)
    lines = min(COLUMNS, _parts(parts, down))
    columns = min(COLUMNS, _parts(parts, across))
    cell_width = width / columns
    cell_height = height / lines

    drawn = ""
    for row, column in itertools.product(range(lines), range(columns)):
        drawn_parts = {
            dim: Part(i * parts[dim] // drawn_count, parts[dim])
            for dim, i, drawn_count in ((down, row, lines), (across, column, columns))
            if dim in parts
        }
        drawn += (
            f'<rect x="{column * cell_width:.1f}" y="{ABOVE + row * cell_height:.1f}"'
            f' width="{cell_width + OVERLAP:.1f}" height="{cell_height + OVERLAP:.1f}"'
            f' fill="{tones.colour(drawn_parts)}"/>'
        )
    words = [
        f"dim {dim}: {array.shape[dim]:,} {arrow}"
        for dim, arrow in ((across, "→"), (down, "↓"))
        if dim is not None
    ]
    return _svg(
        width,
        ABOVE + height,
        "  ".join(words) or "a number",
        drawn,
        f"{shaped(array.shape)} in parts",
    )


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

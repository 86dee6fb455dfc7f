"""A plan as HTML and SVG that need nothing else: the mesh, who holds what, where memory
and time go.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.show.text import (
    Row,
    besides,
    duration,
    handled,
    meshed,
    money,
    names,
    rows,
    shaped,
    si,
    spelled,
    units,
)

if TYPE_CHECKING:
    from lepton_jax.planner.plans import ArrayPlan, Entries, Plan

# pixels of a device's square, and between two
CELL = 15
GAP = 2
# squares of a drawing, at most
COLUMNS = 16
ROWS = 8
PANELS = 2
FIGURES = 4  # arrays that are drawn
SIDE = 132  # pixels of an array's longer side
TOLD = 128  # squares that each say what they hold, at most

LIGHT = (
    "--page:#fbfbfa;--card:#fff;--ink:#1c1f23;--soft:#5c636b;--faint:#e6e7e6;--line:#d3d5d4;--copy:#b9c0c8;--bad:#c0262d;"
    "--good:#1d7a46;--main:#2463c4;--k0:#2463c4;--k1:#2f9080;--k2:#c8700c;--k3:#7a4bc2;--k4:#c0436f;--k5:#7c8a16;"
    "--k6:#5b7fa6;--k7:#8b6f5c"
)
DARK = (
    "--page:#131517;--card:#1a1d20;--ink:#e7e9ea;--soft:#9aa2aa;--faint:#282c30;--line:#3a4046;--copy:#59626b;"
    "--bad:#ff7b7b;--good:#5ec98b;--main:#78aaf5;--k0:#5e97ea;--k1:#55b8a2;--k2:#eb9a4c;--k3:#a583ea;--k4:#e87da2;--k5:#b5c04a;"
    "--k6:#86a8cc;--k7:#b59a86"
)
STYLE = (
    f"""
.lepton{{{LIGHT};color-scheme:light dark;background:var(--page);color:var(--ink);padding:22px 24px;border-radius:10px;
max-width:1120px;margin:0 auto;box-sizing:border-box;font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",
Arial,sans-serif;font-variant-numeric:tabular-nums}}
@media (prefers-color-scheme:dark){{.lepton{{{DARK}}}}}
[data-jp-theme-light="true"] .lepton,.vscode-light .lepton{{{LIGHT};color-scheme:light}}
[data-jp-theme-light="false"] .lepton,.vscode-dark .lepton{{{DARK};color-scheme:dark}}
"""
    + """.lepton *{box-sizing:border-box}
.lepton h3{font-size:23px;line-height:1.25;letter-spacing:-.012em;margin:0 0 2px;font-weight:650;overflow-wrap:anywhere}
.lepton h4{font-size:15px;font-weight:600;margin:30px 0 10px}
.lepton p{margin:0;color:var(--soft);overflow-wrap:anywhere}
.lepton .tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));margin:18px 0 0;background:var(--card);
border:1px solid var(--faint);border-radius:10px;overflow:hidden}
.lepton .tiles div{padding:11px 16px;box-shadow:1px 0 var(--faint),0 1px var(--faint)}
.lepton dt{color:var(--soft);font-size:12.5px;font-weight:400;margin:0}
.lepton dd{margin:0;font-size:21px;font-weight:600;letter-spacing:-.01em;line-height:1.3;white-space:nowrap}
.lepton small{display:block;color:var(--soft);font-size:12.5px;line-height:1.4}
.lepton figure{margin:0 0 12px;padding:14px 16px;background:var(--card);border:1px solid var(--faint);border-radius:10px;
break-inside:avoid}
.lepton figcaption{margin:0 0 10px;overflow-wrap:anywhere}
.lepton figcaption b{font-weight:600;margin-right:10px}.lepton figcaption span{color:var(--soft);font-size:12.5px}
.lepton .row{display:flex;flex-wrap:wrap;gap:14px 30px;align-items:flex-start}
.lepton .row>div{max-width:100%;overflow-x:auto}
.lepton svg{display:block}
.lepton svg text{fill:var(--soft);font-size:11px}.lepton svg.front{max-width:100%;height:auto}
.lepton svg.front text{font-size:12.5px}.lepton .row path{fill:currentcolor;stroke:currentcolor;stroke-width:4;
stroke-linejoin:round}.lepton .row rect{shape-rendering:crispEdges}
.lepton .bars{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:12px}
.lepton .bars figure{margin:0}
.lepton .bar{width:100%;height:20px;border-radius:4px;background:var(--faint);margin:0 0 10px}
.lepton .bar rect{stroke:var(--card);stroke-width:1.5;vector-effect:non-scaling-stroke}
.lepton .limit{stroke:var(--bad);stroke-width:3;vector-effect:non-scaling-stroke}
.lepton ul{list-style:none;margin:0;padding:0;font-size:13px}
.lepton li{display:flex;gap:8px;align-items:baseline;margin:0;padding:1px 0}
.lepton li s{flex:none;width:10px;height:10px;border-radius:2px;background:var(--faint);align-self:center}
.lepton li span{margin-left:auto;white-space:nowrap;color:var(--soft)}
.lepton .scroll+small{margin-top:6px}
.lepton .scroll{overflow-x:auto;background:var(--card);border:1px solid var(--faint);border-radius:10px}
.lepton table{border-collapse:collapse;width:100%;font-size:13px;margin:0;color:var(--ink);background:none}
.lepton th{text-align:left;font-weight:500;color:var(--soft);border-bottom:1px solid var(--line);white-space:nowrap}
.lepton th,.lepton td{padding:5px 10px;vertical-align:baseline;text-align:left}
.lepton th:first-child,.lepton td:first-child{padding-left:16px}
.lepton tbody tr+tr td{border-top:1px solid var(--faint)}
.lepton tbody tr,.lepton tbody tr:nth-child(odd){background:none}
.lepton td{white-space:nowrap}
.lepton .n{text-align:right}.lepton td.w{white-space:normal;min-width:230px;color:var(--soft);font-size:12.5px}
.lepton code{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;background:none;color:inherit;
padding:0}
.lepton .bad{color:var(--bad)}
.lepton dl.said{margin:0;display:grid;grid-template-columns:fit-content(190px) 1fr;gap:4px 16px;font-size:13px}
.lepton dl.said dt{font-size:13px}.lepton dl.said dd{font-size:13px;font-weight:400;white-space:normal;letter-spacing:0;
line-height:1.5}
@media (max-width:560px){.lepton{padding:14px 12px}.lepton dl.said{grid-template-columns:1fr}.lepton dl.said dd{margin:0 0 6px}}
@media print{.lepton{padding:0;max-width:none}.lepton *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""
)


def html(plan: Plan) -> str:
    """The plan as one element; see `page` for a file."""
    parts = [
        f"<h3>{escape(plan.name)} on {escape(plan.topology)}</h3>",
        f"<p>{escape(_story(plan))}</p>",
        _tiles(plan),
        _holders(plan),
        _bars(plan),
        _axes(plan),
        _parameters(plan),
        _collectives(plan),
        _rivals(plan),
        _said("Decisions", plan.reasons.items()),
        _said("Notes", (("!", note) for note in plan.notes)),
    ]
    return wrapped("".join(parts))


def wrapped(body: str) -> str:
    """An element that brings its style along."""
    return f'<div class="lepton"><style>{STYLE}</style>{body}</div>'


def page(title: str, *elements: str) -> str:
    """A file of them."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta'
        ' name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>body{{margin:0;background:#fbfbfa}}@media'
        " (prefers-color-"
        f"scheme:dark){{body{{background:#131517}}}}</style></head><body>{''.join(elements)}</body></html>\n"
    )


def table(
    title: str,
    heads: Sequence[str],
    cells: Iterable[Sequence[str]],
    kinds: str,
) -> str:
    """A table of ready HTML cells; of each column `kinds` says: "<" words, ">" numbers,
    "w" a text that may wrap.
    """
    classes = [{">": ' class="n"', "w": ' class="w"'}.get(kind, "") for kind in kinds]
    top = "".join(
        f"<th{c if 'n' in c else ''}>{escape(h)}</th>"
        for h, c in zip(heads, classes, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{c}>{x}</td>" for x, c in zip(row, classes, strict=True))
        + "</tr>"
        for row in cells
    )
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h4>{escape(title)}</h4><div class="scroll">{inner}</div>' if body else ""


# ---- what it costs ----


def _story(plan: Plan) -> str:
    parts = plan.micro_batches
    return (
        f"Best in {plan.objective}. Mesh {meshed(plan)}; a batch of {plan.batch_size:,}"
        f" {'over ' + ' and '.join(plan.batch_axes) if plan.batch_axes else 'on each device'}"
        f" in {parts} micro-batch{'es' if parts > 1 else ''}; rematerialization:"
        f" {plan.remat}; data {plan.data}; {plan.steps_per_call}"
        f" step{'s' if plan.steps_per_call > 1 else ''} a call."
    )


def _tiles(plan: Plan) -> str:
    tiles = []
    seconds = plan.step_seconds
    if plan.seconds:
        tiles.append(("predicted step", duration(seconds), ""))
        if seconds > 0:
            count, unit = units(plan)
            devices = math.prod(plan.mesh.values())
            tiles.append(
                (
                    f"{unit} a second",
                    si(count / seconds).strip(),
                    f"{si(count / seconds / devices).strip()} a device",
                )
            )
            tiles.append(
                ("computing, a device", f"{si(plan.flops / seconds)}FLOP/s", "")
            )
    else:
        tiles.append(
            ("predicted step", "not known yet", "there is no batch to take shapes from")
        )
    if plan.bytes_per_device:
        share = f", {plan.peak / plan.memory:.0%}" if plan.memory else ""
        tiles.append(
            ("memory, a device", size(plan.peak), f"of {size(plan.memory)}{share}")
        )
    hourly = plan.price_per_hour
    price = plan.price_per_step
    if hourly is not None and price is not None:
        tiles.append(
            (
                "price of a step",
                money(price) if plan.seconds else "not known yet",
                f"{money(hourly)} an hour",
            )
        )
    cells = "".join(
        f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><small>{escape(c)}</small></div>"
        for a, b, c in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _bars(plan: Plan) -> str:
    figures = []
    limit = plan.memory
    free = plan.memory - plan.peak
    if plan.bytes_per_device:
        note = f"{size(plan.peak)} of {size(limit)} a device"
        note = note if free >= 0 else f"{note}: {size(-free)} too much"
        segments = _segments(
            plan.bytes_per_device,
            max(limit, plan.peak),
            size,
        )
        if free > 0:
            segments.append(
                ("free", "", f"{size(free)}, {free / limit:.1%}", free / limit)
            )
        figures.append(
            _bar(
                "Memory",
                note,
                segments,
                limit / plan.peak if free < 0 else None,
            )
        )
    if plan.seconds:
        segments = _segments(
            plan.seconds,
            plan.step_seconds or 1.0,
            duration,
        )
        figures.append(
            _bar(
                "Time of a step",
                duration(plan.step_seconds),
                segments,
            )
        )
    return (
        f'<h4>Where memory and time go</h4><div class="bars">{"".join(figures)}</div>'
        if figures
        else ""
    )


Segment = tuple[str, str, str, float]  # kind, colour, what it comes to, share


def _segments(
    kinds: Mapping[str, float],
    scale: float,
    words: Callable[[float], str],
) -> list[Segment]:
    return [
        (
            kind,
            f"var(--k{i % 8})",
            f"{words(value)}, {value / scale:.1%}",
            value / scale,
        )
        for i, (kind, value) in enumerate(kinds.items())
        if value
    ]


def _bar(
    title: str,
    note: str,
    segments: list[Segment],
    limit: float | None = None,
) -> str:
    """A stacked bar with its legend; a red line where `limit` is."""
    at = 0.0
    drawn = ""
    keys = ""
    for kind, colour, told, share in segments:
        keys += (
            "<li><s"
            f' style="background:{colour}"></s>{escape(kind)}<span>{told}</span></li>'
        )
        if colour:
            drawn += (
                f'<rect x="{at:.2f}" width="{1000 * share:.2f}" height="20"'
                f' fill="{colour}"><title>{escape(kind)}: {told}'
            )
            drawn += "</title></rect>"
        at += 1000 * share
    if limit is not None:
        drawn += f'<path class="limit" d="M{1000 * limit:.2f} 0V20"/>'
    bad = "" if limit is None else ' class="bad"'
    return (
        f"<figure><figcaption><b>{title}</b><span{bad}>{escape(note)}</span></figcaption>"
        '<svg class="bar" viewBox="0 0 1000 20" preserveAspectRatio="none" role="img"'
        f' aria-label="{title} by kind">{drawn}'
        f"</svg><ul>{keys}</ul></figure>"
    )


# ---- who holds what ----


@dataclass(frozen=True)
class Places:
    """The devices as squares.

    Attributes:
      across, down, stack: mesh axes along columns, rows and panels, as (name, size)
        each.
      wrap: of one axis alone, the squares of a row.
    """

    across: tuple[tuple[str, int], ...]
    down: tuple[tuple[str, int], ...]
    stack: tuple[tuple[str, int], ...]
    wrap: int = 0

    @classmethod
    def of(cls, plan: Plan) -> Places:
        axes = [(name, n) for name, n in plan.mesh.items() if n > 1]
        if len(axes) < 2:
            return cls(
                tuple(axes),
                (),
                (),
                min(COLUMNS, axes[0][1]) if axes else 1,
            )
        order = sorted(axes, key=lambda axis: -axis[1])
        return cls(
            (order[0],),
            (order[1],),
            tuple(axis for axis in axes if axis not in order[:2]),
        )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Squares drawn along a row, along a column, and panels."""
        n = _size(self.across)
        if self.wrap:
            return self.wrap, min(ROWS, -(-n // self.wrap)), 1
        return (
            min(COLUMNS, n),
            min(ROWS, _size(self.down)),
            min(PANELS, _size(self.stack)),
        )

    def squares(self) -> Iterator[tuple[int, int, int, dict[str, int]]]:
        """(column, row, panel, index on each mesh axis) of what is drawn: every so
        manieth device, the first panels.
        """
        (columns, lines, panels), n, m = (
            self.counts,
            _size(self.across),
            _size(self.down),
        )
        for p, y, x in itertools.product(range(panels), range(lines), range(columns)):
            i = y * columns + x
            if not self.wrap:
                yield (
                    x,
                    y,
                    p,
                    (
                        _indices(self.across, x * n // columns)
                        | _indices(self.down, y * m // lines)
                        | _indices(self.stack, p)
                    ),
                )
            elif i < n:
                yield x, y, p, _indices(self.across, i * n // min(n, columns * lines))

    @property
    def remark(self) -> str:
        """What the drawing leaves out."""
        (columns, lines, panels), total = self.counts, _size(self.stack)
        each = _size(self.across) * _size(self.down) / (columns * lines)
        said = f" Each square stands for {each:.3g} devices." if each > 1 else ""
        return said + (
            f" The first {panels} of {total} panels are drawn."
            if panels < total
            else ""
        )


def _size(axes: Sequence[tuple[str, int]]) -> int:
    return math.prod(n for _, n in axes)


def _indices(axes: Sequence[tuple[str, int]], i: int) -> dict[str, int]:
    found = {}
    for name, n in reversed(axes):
        found[name] = i % n
        i = i // n
    return found


def _holders(plan: Plan) -> str:
    places = Places.of(plan)
    every = rows(plan)
    if not every:
        return ""
    chosen: dict[tuple, list[Row]] = {}
    for row in every:
        chosen.setdefault(
            (row.array.spec, row.array.use, row.array.kind == "params"), []
        ).append(row)
    heaviest = sorted(
        (
            max(
                alike,
                key=lambda r: math.prod(r.array.shape) * r.count,
            )
            for key, alike in chosen.items()
            if key[2]
        ),
        key=lambda r: -math.prod(r.array.shape) * r.count,
    )
    batch = [row for row in every if row.array.kind == "inputs"][:1]
    drawn = [*batch, *heaviest[: FIGURES - len(batch)]]
    alike = {id(row): len(rest) - 1 for rest in chosen.values() for row in rest}
    text = (
        f"Squares are devices, in the mesh {meshed(plan)}. A colour is a part of the"
        " array: its hue tells the parts that are computed with, its lightness those"
        f" in which it is kept besides; grey is a copy of all of it.{places.remark}"
    )
    return (
        f"<h4>Who holds what</h4><p style='margin:0 0 10px'>{escape(text)}</p>"
        + "".join(_figure(row, alike[id(row)], places, plan) for row in drawn)
    )


def _figure(
    row: Row,
    alike: int,
    places: Places,
    plan: Plan,
) -> str:
    more = f", and {alike} more that lie{'s' * (alike == 1)} alike" if alike else ""
    times = f"{row.count} x " if row.count > 1 else ""
    used = (
        f", used as {spelled(row.array.use)}" if row.array.use != row.array.spec else ""
    )
    tones = Tones.of(row.array, plan)
    panels = f"<div><small>the array</small>{_array(row.array, tones, plan)}</div>"
    kept = "kept by the devices" if used else "on the devices"
    panels += f"<div><small>{kept}</small>{_devices(row.array.spec, tones, places, plan)}</div>"
    if used:
        panels += (
            "<div><small>in"
            f" use</small>{_devices(row.array.use, tones, places, plan)}</div>"
        )
    told = (
        f"{times}{shaped(row.array.shape)} {row.array.dtype},"
        f" {spelled(row.array.spec)}{used}{more}"
    )
    return (
        f"<figure><figcaption><b>{escape(row.path)}</b><span>{escape(told)}</span></figcaption>"
        f'<div class="row">{panels}</div></figure>'
    )


def _split(entries: Entries, plan: Plan) -> list[tuple[int, tuple[str, ...], int]]:
    """(dim, its mesh axes, parts) of the dims that are split."""
    found = [
        (
            d,
            names(entry),
            math.prod(plan.mesh.get(n, 1) for n in names(entry)),
        )
        for d, entry in enumerate(entries)
    ]
    return [(d, axes, n) for d, axes, n in found if n > 1]


def _devices(
    entries: Entries,
    tones: Tones,
    places: Places,
    plan: Plan,
) -> str:
    columns, lines, panels = places.counts
    step = CELL + GAP
    split = _split(entries, plan)
    drawn = ""
    wide = columns * step + 12
    for x, y, p, where in places.squares():
        parts = {}
        for d, axes, n in split:
            index = 0
            for name in axes:
                index = index * plan.mesh[name] + where.get(name, 0)
            parts[d] = (index, n)
        told = ""
        if columns * lines * panels <= TOLD:
            device = (
                ", ".join(f"{name} {i}" for name, i in where.items()) or "the device"
            )
            held = (
                " and ".join(
                    f"part {i + 1} of {n} along dim {d}" for d, (i, n) in parts.items()
                )
                or "all of it"
            )
            told = f"<title>{escape(device)}: {held}</title>"
        inner = CELL - 4  # the stroke rounds its corners
        square = f"M{2 + p * wide + x * step} {18 + y * step}h{inner}v{inner}h-{inner}z"
        drawn += f'<path color="{tones.colour(parts)}" d="{square}">{told}</path>'
    along = [
        (" x ".join(f"{name} {n}" for name, n in axes), sign)
        for axes, sign in (
            (places.across, "→"),
            (places.down, "↓"),
            (places.stack, "⇉"),
        )
        if axes
    ]
    return _svg(
        panels * wide,
        16 + lines * step,
        "  ".join(f"{words} {sign}" for words, sign in along) or "one device",
        drawn,
        f"{spelled(entries)} on the devices",
    )


def _array(
    array: ArrayPlan,
    tones: Tones,
    plan: Plan,
) -> str:
    """The array's two most telling dims as a rectangle, cut into its parts."""
    parts = {d: n for d, _, n in _split(array.spec, plan)}
    dims = sorted(
        range(len(array.shape)),
        key=lambda d: (d not in parts, -array.shape[d]),
    )[:2]
    down, across = ([None] * 2 + sorted(dims))[-2:]
    tall, long = (1 if d is None else array.shape[d] for d in (down, across))
    ratio = min(1.6, max(0.45, (tall / long) ** 0.5)) if down is not None else 0.16
    width = SIDE / max(ratio, 1)
    height = SIDE * min(ratio, 1)
    lines, columns = (
        min(COLUMNS, 1 if d is None else parts.get(d, 1)) for d in (down, across)
    )
    w = width / columns
    h = height / lines
    drawn = ""
    for y, x in itertools.product(range(lines), range(columns)):
        part = {
            d: (i * parts[d] // n, parts[d])
            for d, i, n in ((down, y, lines), (across, x, columns))
            if d in parts
        }
        drawn += (
            f'<rect x="{x * w:.1f}" y="{16 + y * h:.1f}" width="{w + 0.6:.1f}"'
            f' height="{h + 0.6:.1f}" '
            # a little larger, or rounding leaves gaps
            f'fill="{tones.colour(part)}"/>'
        )
    words = [
        f"dim {d}: {array.shape[d]:,} {sign}"
        for d, sign in ((across, "→"), (down, "↓"))
        if d is not None
    ]
    return _svg(
        width,
        16 + height,
        "  ".join(words) or "a number",
        drawn,
        f"{shaped(array.shape)} in parts",
    )


def _svg(
    width: float,
    height: float,
    words: str,
    drawn: str,
    label: str,
) -> str:
    """A drawing below a line of words."""
    wide = max(width, 6.2 * len(words))
    tall = height + 2
    return (
        f'<svg width="{wide:.0f}" height="{tall:.0f}" role="img"'
        f' aria-label="{escape(label)}"><text y="10"'
        f' xml:space="preserve">{escape(words)}</text>{drawn}</svg>'
    )


@dataclass(frozen=True)
class Tones:
    """Which dim of an array a colour's hue tells, and which its lightness; a dim in no
    parts has neither.
    """

    hue: int | None
    lightness: int | None

    @classmethod
    def of(
        cls,
        array: ArrayPlan,
        plan: Plan,
    ) -> Tones:
        """The hue is for the parts that are computed with, if there are any."""
        used = [d for d, _, _ in _split(array.use, plan)]
        dims = used + [d for d, _, _ in _split(array.spec, plan) if d not in used]
        return cls(*([*dims, None, None])[:2])

    def colour(self, parts: Mapping[int, tuple[int, int]]) -> str:
        """Of the part (index, count) along each dim; grey for a whole array."""
        if self.hue not in parts and self.lightness not in parts:
            return "var(--copy)"
        i, n = parts.get(self.hue, (0, 1)) if self.hue is not None else (0, 1)
        j, m = (
            parts.get(self.lightness, (1, 3)) if self.lightness is not None else (1, 3)
        )
        chroma = 0.115 if self.hue in parts else 0.02
        return _oklch(
            0.52 + 0.3 * (j / max(m - 1, 1)),
            chroma,
            math.radians(262 - 232 * (i / max(n - 1, 1))),
        )


def _oklch(
    lightness: float,
    chroma: float,
    hue: float,
) -> str:
    """#rrggbb of an OKLCH colour: even steps to the eye (Ottosson 2020,
    https://bottosson.github.io/posts/oklab).
    """
    a = chroma * math.cos(hue)
    b = chroma * math.sin(hue)
    x, y, z = (
        (lightness + p * a + q * b) ** 3
        for p, q in (
            (0.3963377774, 0.2158037573),
            (-0.1055613458, -0.0638541728),
            (-0.0894841775, -1.2914855480),
        )
    )
    rgb = (
        4.0767416621 * x - 3.3077115913 * y + 0.2309699292 * z,
        -1.2684380046 * x + 2.6097574011 * y - 0.3413193965 * z,
        -0.0041960863 * x - 0.7034186147 * y + 1.7076147010 * z,
    )
    curved = (
        12.92 * v if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055
        for v in (min(1.0, max(0.0, v)) for v in rgb)
    )
    return "#" + "".join(f"{round(255 * v):02x}" for v in curved)


# ---- the tables ----


def _axes(plan: Plan) -> str:
    return table(
        "Named axes",
        ("axis", "size", "split over", "dims of parameters"),
        [
            (
                f"<code>{escape(a.name)}</code>",
                f"{a.size:,}",
                escape(" and ".join(f"{n} ({plan.mesh.get(n, 1)})" for n in a.mesh)),
                str(a.members),
            )
            for a in plan.axes
        ],
        "<><>",
    )


def _parameters(plan: Plan) -> str:
    cells = []
    reasons: dict[str, str] = {}
    for r in rows(plan):
        a = r.array
        number = reasons.setdefault(a.reason, str(len(reasons) + 1))
        cells.append(
            (
                f"<code>{escape(r.path)}</code>",
                f"{r.count} x" if r.count > 1 else "",
                shaped(a.shape),
                a.dtype,
                size(r.bytes),
                f"<code>{escape(spelled(a.spec))}</code>",
                escape(handled(a)),
                number,
            )
        )
    rest = "; ".join(besides(plan))
    heads = ("array", "", "shape", "dtype", "a device", "kept as", "in use", "why")
    return (
        table("Parameters and batch", heads, cells, "<>><><<>")
        + (f"<small>Besides: {escape(rest)}</small>" if rest else "")
        + _said("Why", ((number, reason) for reason, number in reasons.items()))
    )


def _collectives(plan: Plan) -> str:
    return table(
        "Communication of a step",
        ("kind", "over", "count", "bytes", "time", "most of it"),
        [
            (
                c.kind,
                escape(" and ".join(c.axes)),
                f"{c.count:,}",
                size(c.bytes),
                duration(c.seconds),
                escape(c.what),
            )
            for c in sorted(plan.collectives, key=lambda c: -c.seconds)
        ],
        "<<>>>w",
    )


def _rivals(plan: Plan) -> str:
    return table(
        "Rivals",
        ("strategy", "mesh", "remat", "micro-batches", "a step", "a device", "loses"),
        [
            (
                escape(r.name),
                escape(" x ".join(f"{k}={v}" for k, v in r.mesh.items())),
                r.remat,
                str(r.micro_batches),
                duration(r.seconds),
                size(r.bytes),
                escape(r.loses),
            )
            for r in plan.rivals
        ],
        "<<<>>>w",
    )


def _said(title: str, items: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in items
    )
    return f'<h4>{title}</h4><dl class="said">{cells}</dl>' if cells else ""

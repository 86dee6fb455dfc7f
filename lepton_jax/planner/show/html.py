"""A plan as HTML and SVG that need nothing else.

It shows the mesh, who holds what, where memory and time go, and the tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.plans import Plan
from lepton_jax.planner.show.holders import holders
from lepton_jax.planner.show.rows import (
    handled,
    longest_first,
    memory_verdict,
    meshed,
    numbered_reasons,
    other_state,
    rows,
    spelled,
    split_over,
    units,
)
from lepton_jax.planner.show.style import STYLE
from lepton_jax.planner.show.words import (
    duration,
    joined_mesh,
    money,
    plural,
    shaped,
    si,
)

# colours of kinds in the style sheet
KIND_COLOURS = 8
# width and height of a bar, in units of its own
BAR_WIDTH = 1000
BAR_HEIGHT = 20


def html(plan: Plan) -> str:
    """Return the plan as one element; see `page` for a file."""
    parts = [
        f"<h3>{escape(plan.name)} on {escape(plan.topology)}</h3>",
        f"<p>{escape(_story(plan))}</p>",
        _tiles(plan),
        holders(plan),
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
    """Return an element that brings its style along."""
    return f'<div class="lepton"><style>{STYLE}</style>{body}</div>'


def page(title: str, *elements: str) -> str:
    """Return a file of elements."""
    light = "body{margin:0;background:#fbfbfa}"
    dark = "@media (prefers-color-scheme:dark){body{background:#131517}}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta'
        ' name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{light}{dark}</style></head>"
        f"<body>{''.join(elements)}</body></html>\n"
    )


def table(
    title: str,
    heads: Sequence[str],
    cells: Iterable[Sequence[str]],
    kinds: str,
) -> str:
    """Return a table; empty if it has no rows.

    Args:
      title: in plain text.
      heads: titles of the columns, in plain text.
      cells: rows of ready HTML.
      kinds: for each column "<" for words, ">" for numbers, "w" for a text that may
        wrap.
    """
    attributes = {"<": "", ">": ' class="n"', "w": ' class="w"'}
    classes = [attributes[kind] for kind in kinds]
    body = "".join(f"<tr>{_cells(row, classes)}</tr>" for row in cells)
    if not body:
        return ""

    top = ""
    for head, kind in zip(heads, kinds, strict=True):
        number = attributes[">"] if kind == ">" else ""
        top += f"<th{number}>{escape(head)}</th>"
    inner = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h4>{escape(title)}</h4><div class="scroll">{inner}</div>'


def _cells(
    row: Sequence[str],
    classes: Sequence[str],
) -> str:
    pairs = zip(row, classes, strict=True)
    return "".join(f"<td{attribute}>{cell}</td>" for cell, attribute in pairs)


# ---- what it costs ----


def _story(plan: Plan) -> str:
    """Return the plan's decisions as a sentence."""
    over = "on each device"
    if plan.batch_axes:
        over = f"over {' and '.join(plan.batch_axes)}"
    return (
        f"Best in {plan.objective}. Mesh {meshed(plan)}; a batch of {plan.batch_size:,}"
        f" {over} in {plural(plan.micro_batches, 'micro-batch', 'es')};"
        f" rematerialization: {plan.remat}; data {plan.data};"
        f" {plural(plan.steps_per_call, 'step')} a call."
    )


class Tile(NamedTuple):
    """A figure with its title above and a remark below."""

    title: str
    figure: str
    remark: str


def _tiles(plan: Plan) -> str:
    tiles = _speed_tiles(plan)
    if plan.bytes_per_device:
        share = f", {plan.peak / plan.memory:.0%}" if plan.memory else ""
        remark = f"of {size(plan.memory)}{share}{memory_verdict(plan)}"
        tiles.append(
            Tile(
                "memory, a device",
                size(plan.peak),
                remark,
            )
        )

    hourly = plan.price_per_hour
    price = plan.price_per_step
    if hourly is not None and price is not None:
        figure = money(price) if plan.seconds else "not known yet"
        tiles.append(Tile("price of a step", figure, f"{money(hourly)} an hour"))

    cells = ""
    for tile in tiles:
        cells += f"<div><dt>{escape(tile.title)}</dt><dd>{escape(tile.figure)}</dd>"
        cells += f"<small>{escape(tile.remark)}</small></div>"
    return f'<dl class="tiles">{cells}</dl>'


def _speed_tiles(plan: Plan) -> list[Tile]:
    title = "predicted step"
    if not plan.seconds:
        remark = "there is no batch to take shapes from"
        return [Tile(title, "not known yet", remark)]

    seconds = plan.step_seconds
    tiles = [Tile(title, duration(seconds), "")]
    if seconds > 0:
        count, unit = units(plan)
        rate = count / seconds
        devices = math.prod(plan.mesh.values())
        remark = f"{si(rate / devices).strip()} a device"
        tiles.append(
            Tile(
                f"{unit} a second",
                si(rate).strip(),
                remark,
            )
        )
        flops = f"{si(plan.flops / seconds)}FLOP/s"
        tiles.append(Tile("computing, a device", flops, ""))
    return tiles


# ---- where memory and time go ----


class Segment(NamedTuple):
    """A part of a bar.

    Attributes:
      kind: what it is.
      colour: empty: the part is not drawn.
      words: value and share, for the legend.
      share: of the bar.
    """

    kind: str
    colour: str
    words: str
    share: float


def _bars(plan: Plan) -> str:
    figures = []
    if plan.bytes_per_device:
        figures.append(_memory_bar(plan))
    if plan.seconds:
        segments = _segments(plan.seconds, plan.step_seconds or 1.0, duration)
        figures.append(
            _bar(
                "Time of a step",
                duration(plan.step_seconds),
                segments,
            )
        )
    if not figures:
        return ""
    return (
        f'<h4>Where memory and time go</h4><div class="bars">{"".join(figures)}</div>'
    )


def _memory_bar(plan: Plan) -> str:
    limit = plan.memory
    free = plan.memory - plan.peak
    note = f"{size(plan.peak)} of {size(limit)} a device"
    segments = _segments(
        plan.bytes_per_device,
        max(limit, plan.peak),
        size,
    )
    if free < 0:
        note = f"{note}: {size(-free)} too much"
        return _bar("Memory", note, segments, limit / plan.peak)
    if free > 0:
        words = f"{size(free)}, {free / limit:.1%}"
        segments.append(Segment("free", "", words, free / limit))
    return _bar("Memory", note, segments)


def _segments(
    kinds: Mapping[str, float],
    scale: float,
    words: Callable[[float], str],
) -> list[Segment]:
    return [
        Segment(
            kind,
            f"var(--k{i % KIND_COLOURS})",
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
    """Return a stacked bar with its legend, and a red line at the share `limit`."""
    start = 0.0
    drawn = ""
    legend = ""
    for segment in segments:
        kind = escape(segment.kind)
        width = BAR_WIDTH * segment.share
        legend += f'<li><s style="background:{segment.colour}"></s>{kind}'
        legend += f"<span>{segment.words}</span></li>"
        if segment.colour:
            drawn += (
                f'<rect x="{start:.2f}" width="{width:.2f}" height="{BAR_HEIGHT}"'
                f' fill="{segment.colour}"><title>{kind}: {segment.words}</title>'
                "</rect>"
            )
        start += width

    bad = ""
    if limit is not None:
        bad = ' class="bad"'
        at = BAR_WIDTH * limit
        drawn += f'<path class="limit" d="M{at:.2f} 0V{BAR_HEIGHT}"/>'
    return (
        f"<figure><figcaption><b>{title}</b><span{bad}>{escape(note)}</span>"
        f'</figcaption><svg class="bar" viewBox="0 0 {BAR_WIDTH} {BAR_HEIGHT}"'
        f' preserveAspectRatio="none" role="img" aria-label="{title} by kind">{drawn}'
        f"</svg><ul>{legend}</ul></figure>"
    )


# ---- the tables ----


def _code(words: str) -> str:
    return f"<code>{escape(words)}</code>"


def _axes(plan: Plan) -> str:
    heads = ("axis", "size", "split over", "dims of parameters")
    cells = [
        (
            _code(axis.name),
            f"{axis.size:,}",
            escape(split_over(axis.mesh, plan, " and ")),
            str(axis.members),
        )
        for axis in plan.axes
    ]
    return table("Named axes", heads, cells, "<><>")


def _parameters(plan: Plan) -> str:
    plan_rows = rows(plan)
    numbers = numbered_reasons(plan_rows)
    heads = ("array", "", "shape", "dtype", "a device", "kept as", "in use", "why")
    cells = [
        (
            _code(row.path),
            f"{row.count} x" if row.count > 1 else "",
            shaped(row.array.shape),
            row.array.dtype,
            size(row.bytes),
            _code(spelled(row.array.spec)),
            escape(handled(row.array)),
            numbers[row.array.reason],
        )
        for row in plan_rows
    ]
    rest = "; ".join(other_state(plan))
    small = f"<small>Besides: {escape(rest)}</small>" if rest else ""
    why = _said("Why", ((number, reason) for reason, number in numbers.items()))
    return table("Parameters and batch", heads, cells, "<>><><<>") + small + why


def _collectives(plan: Plan) -> str:
    heads = ("kind", "over", "count", "bytes", "time", "most of it")
    cells = [
        (
            collective.kind,
            escape(" and ".join(collective.axes)),
            f"{collective.count:,}",
            size(collective.bytes),
            duration(collective.seconds),
            escape(collective.what),
        )
        for collective in longest_first(plan)
    ]
    return table("Communication of a step", heads, cells, "<<>>>w")


def _rivals(plan: Plan) -> str:
    heads = (
        "strategy",
        "mesh",
        "remat",
        "micro-batches",
        "a step",
        "a device",
        "loses",
    )
    cells = [
        (
            escape(rival.name),
            escape(joined_mesh(rival.mesh)),
            rival.remat,
            str(rival.micro_batches),
            duration(rival.seconds),
            size(rival.bytes),
            escape(rival.loses),
        )
        for rival in plan.rivals
    ]
    return table("Rivals", heads, cells, "<<<>>>w")


def _said(
    title: str,
    items: Iterable[tuple[str, str]],
) -> str:
    """Return a list of words with what is said of each; empty if there are none."""
    cells = ""
    for key, value in items:
        cells += f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"
    return f'<h4>{title}</h4><dl class="said">{cells}</dl>' if cells else ""

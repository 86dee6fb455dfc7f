"""A plan as text for a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.plans import SIMPLEST, Plan
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
from lepton_jax.planner.show.words import (
    duration,
    joined_mesh,
    money,
    plural,
    shaped,
    si,
)

# The widths below were chosen by eye.

# columns of the text
WIDTH = 110
# columns for what a rival loses by: names and meshes give way before it does
VERDICT = 44
# columns of one bar
BAR = 22
# columns of a bar's label, at most
LABEL = 16
# columns below which a column of a table does not give way
LEAST_COLUMN = 8
SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
}
# an eighth of a column after the other; the first is empty
EIGHTHS = " ▏▎▍▌▋▊▉"


def text(plan: Plan) -> str:
    """Return the plan in at most 110 columns.

    It says what the plan costs, lists the named axes, has a line per tied parameter,
    shows where memory and time go, the communication, the rivals, and why.
    """
    numbers = numbered_reasons(rows(plan))
    why = [(number, reason) for reason, number in numbers.items()]
    notes = [("!", note) for note in plan.notes]
    blocks = [
        head(plan),
        _axes(plan),
        _arrays(plan, numbers),
        _totals(plan),
        _collectives(plan),
        _rivals(plan),
        _listed("why", why),
        _listed("decisions", plan.reasons.items()),
        _listed("notes", notes),
    ]
    paragraphs = ["\n".join(block) for block in blocks if block]
    return "\n\n".join(paragraphs)


# ---- the head ----


def head(plan: Plan) -> list[str]:
    """Return strategy, mesh and what a step is predicted to cost."""
    axes = " and ".join(plan.batch_axes) or "one device"
    settings = [
        f"mesh {meshed(plan)}",
        f"batch {plan.batch_size:,} over {axes}",
        plural(plan.micro_batches, "micro-batch", "es"),
        f"remat {plan.remat}",
        f"data {plan.data}",
        f"{plural(plan.steps_per_call, 'step')} a call",
    ]
    lines = [
        f"{plan.name} on {plan.topology}, {_rank(plan)}",
        " · ".join(settings),
        " · ".join(prediction(plan)),
    ]
    return [wrapped for line in lines for wrapped in _wrapped(line)]


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ", break_long_words=False)


def _rank(plan: Plan) -> str:
    """Return the plan's place among the others in the objective."""
    if SIMPLEST in plan.reasons:
        best = "cheapest" if plan.objective == "cost" else "fastest"
        return f"the simplest of the {best}"
    return f"the best in {plan.objective}"


def prediction(plan: Plan) -> list[str]:
    """Return what a step costs, a phrase each."""
    if not plan.seconds:
        return [
            "the step's time is not known yet: there is no batch to take shapes from"
        ]

    seconds = plan.step_seconds
    price = plan.price_per_step
    phrases = [f"predicted {duration(seconds)} a step"]
    phrases.append("price not known" if price is None else f"{money(price)} a step")
    on_device = []
    if seconds > 0:
        count, unit = units(plan)
        phrases.append(f"{si(count / seconds).strip()} {unit}/s")
        on_device.append(f"{si(plan.flops / seconds)}FLOP/s")
    if plan.bytes_per_device:
        on_device.append(f"{_filled(plan)}{memory_verdict(plan)}")
    if on_device:
        phrases.append(f"on each device {' and '.join(on_device)}")
    return phrases


def _filled(plan: Plan) -> str:
    """Return the predicted peak of a device's memory."""
    share = f" ({plan.peak / plan.memory:.0%})" if plan.memory else ""
    return f"{size(plan.peak)} of {size(plan.memory)}{share}"


# ---- the tables ----


def _axes(plan: Plan) -> list[str]:
    cells = [
        (
            axis.name,
            f"{axis.size:,}",
            split_over(axis.mesh, plan, " + ") or "-",
            str(axis.members),
        )
        for axis in plan.axes
    ]
    titles = ("named axis", "size", "split over", "dims of parameters")
    return grid(titles, cells, "<><>") if cells else []


def _arrays(
    plan: Plan,
    numbers: dict[str, str],
) -> list[str]:
    """Return the table of parameters, which refers to reasons by their numbers."""
    cells = []
    for row in rows(plan):
        array = row.array
        cells.append(
            (
                row.path,
                f"x{row.count}" if row.count > 1 else "",
                shaped(array.shape),
                SHORT.get(array.dtype, array.dtype),
                size(row.bytes),
                spelled(array.spec),
                handled(array),
                numbers[array.reason],
            )
        )
    titles = ("parameter", "", "shape", "", "a device", "kept as", "in use", "why")
    lines = grid(
        titles,
        cells,
        "<>><><<>",
        flexible=(0, 5, 6),
    )
    rest = "; ".join(other_state(plan))
    if rest:
        lines += textwrap.wrap(f"besides: {rest}", WIDTH, subsequent_indent="  ")
    return lines


def _collectives(plan: Plan) -> list[str]:
    cells = [
        (
            collective.kind,
            "+".join(collective.axes),
            f"{collective.count:,}",
            size(collective.bytes),
            duration(collective.seconds),
            collective.what,
        )
        for collective in longest_first(plan)
    ]
    titles = (
        "communication of a step",
        "over",
        "count",
        "bytes",
        "time",
        "most of it",
    )
    return grid(titles, cells, "<<>>><", flexible=(5, 0)) if cells else []


def _rivals(plan: Plan) -> list[str]:
    cells = [
        (
            rival.name,
            joined_mesh(rival.mesh, ","),
            rival.remat,
            str(rival.micro_batches),
            duration(rival.seconds),
            size(rival.bytes),
            cut(rival.loses, VERDICT),
        )
        for rival in plan.rivals
    ]
    titles = ("rival", "mesh", "remat", "micro-batches", "a step", "a device", "loses")
    return grid(titles, cells, "<<<>>><", flexible=(0, 1)) if cells else []


def _listed(
    title: str,
    items: Iterable[tuple[str, str]],
) -> list[str]:
    lines = []
    for key, value in items:
        mark = f"  {key}  " if len(key) < 3 else f"  {key}: "
        wrapped = textwrap.wrap(
            value,
            WIDTH,
            initial_indent=mark,
            subsequent_indent=" " * min(len(mark), 6),
        )
        lines += wrapped or [mark.rstrip()]
    return [title, *lines] if lines else []


# ---- memory and time ----


def _totals(plan: Plan) -> list[str]:
    """Return memory and time by kind, side by side."""
    memory = _memory(plan) if plan.bytes_per_device else []
    seconds = _seconds(plan) if plan.seconds else []
    if not memory or not seconds:
        return memory or seconds

    width = max(map(len, memory)) + 4
    count = max(len(memory), len(seconds))
    memory += [""] * (count - len(memory))
    seconds += [""] * (count - len(seconds))
    return [
        f"{left:<{width}}{right}".rstrip()
        for left, right in zip(memory, seconds, strict=True)
    ]


def _memory(plan: Plan) -> list[str]:
    scale = max(plan.memory, plan.peak)
    kinds = [
        (kind, size(count), count / scale)
        for kind, count in plan.bytes_per_device.items()
        if count
    ]
    free = plan.memory - plan.peak
    if free >= 0:
        kinds.append(("free", size(free), free / scale))
    else:
        kinds.append(
            (
                "too much",
                size(-free),
                -free / scale,
            )
        )
    return [f"memory a device: {_filled(plan)}", *_bars(kinds)]


def _seconds(plan: Plan) -> list[str]:
    total = plan.step_seconds or 1.0
    kinds = [
        (kind, duration(seconds), seconds / total)
        for kind, seconds in plan.seconds.items()
        if seconds
    ]
    return [f"time of a step: {duration(plan.step_seconds)}", *_bars(kinds)]


def _bars(kinds: list[tuple[str, str, float]]) -> list[str]:
    """Return a line for each (kind, value in words, share)."""
    labels = [len(kind) for kind, _, _ in kinds]
    values = [len(value) for _, value, _ in kinds]
    left = min(LABEL, max(labels, default=0))
    right = max(values, default=0)
    return [
        f"  {cut(kind, left):<{left}} {value:>{right}} {_bar(share)}".rstrip()
        for kind, value, share in kinds
    ]


def _bar(share: float) -> str:
    """Return a bar to an eighth of a column; what is there at all has a thin one."""
    within = max(0.0, min(1.0, share))
    all_eighths = round(within * BAR * 8)
    columns, eighths = divmod(all_eighths, 8)
    bar = "█" * columns + EIGHTHS[eighths].strip()
    return bar or "▏" * (share > 0)


# ---- columns ----


def grid(
    titles: Sequence[str],
    cells: Sequence[Sequence[str]],
    align: str,
    flexible: Sequence[int] = (0,),
    width: int = WIDTH,
) -> list[str]:
    """Return a table with two spaces between its columns.

    Args:
      titles: of the columns.
      cells: rows.
      align: "<" or ">" for each column.
      flexible: columns of which the widest gives way where the table is too wide.
      width: columns of the text.
    """
    lines = [titles, *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    between = 2 * (len(widths) - 1)
    while sum(widths) + between > width:
        widest = max(flexible, key=lambda i: widths[i])
        if widths[widest] <= LEAST_COLUMN:
            break
        widths[widest] -= 1
    return [_line(line, widths, align) for line in lines]


def _line(
    cells: Sequence[str],
    widths: Sequence[int],
    align: str,
) -> str:
    columns: list[str] = []
    for cell, width, side in zip(cells, widths, align, strict=True):
        is_first = not columns
        short = cut(cell, width, front=is_first)
        columns.append(f"{short:{side}{width}}")
    return "  ".join(columns).rstrip()


def cut(
    words: str,
    width: int,
    front: bool = False,
) -> str:
    """Return words shortened to a width.

    A path is cut at its front if `front` says so, since its end tells more.
    """
    if len(words) <= width:
        return words
    if front and "/" in words:
        return "…" + words[len(words) - width + 1 :]
    return words[: width - 1] + "…"

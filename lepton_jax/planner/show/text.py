"""A plan for people: as text for a terminal here, as a page for a notebook in
`picture`.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lepton_jax.planner.estimate.feeding import size
from lepton_jax.planner.program.named import starred

if TYPE_CHECKING:
    from lepton_jax.planner.plans import ArrayPlan, Entries, Entry, Plan

WIDTH = 110  # columns of the text
# columns of what a rival loses by: names and meshes give way before it does
VERDICT = 44
SIMPLEST = "the simplest"  # the reason of a plan that is not the very best
BAR = 22  # of which one bar takes so many
SHORT = {
    "float64": "f64",
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int8": "i8",
    "uint8": "u8",
}


@dataclass(frozen=True)
class Row:
    """Arrays that repeated layers share: one line.

    Attributes:
      path: with `*` for the layers' numbers if there are several.
      array: the first of them.
      count: of arrays.
      bytes: of all of them on one device.
    """

    path: str
    array: ArrayPlan
    count: int
    bytes: int


def text(plan: Plan) -> str:
    """The plan in at most 110 columns: what it costs, the named axes, a line per tied
    parameter, where memory and time go, the communication, the rivals, and why.
    """
    table, reasons = _arrays(plan)
    blocks = [
        head(plan),
        _axes(plan),
        table,
        _totals(plan),
        _collectives(plan),
        _rivals(plan),
        _listed("why", [(str(number), reason) for reason, number in reasons.items()]),
        _listed("decisions", list(plan.reasons.items())),
        _listed("notes", [("!", note) for note in plan.notes]),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def html(plan: Plan) -> str:
    """The plan as HTML and SVG that need nothing else: the mesh, who holds what, where
    memory and time go, and the tables.
    """
    # drawn with the rows and words of this module
    from lepton_jax.planner.show import html as picture

    return picture.html(plan)


# ---- what both show ----


def head(plan: Plan) -> list[str]:
    """Strategy, mesh and what a step is predicted to cost."""
    parts = plan.micro_batches
    lines = [
        f"{plan.name} on {plan.topology}, {_rank(plan)}",
        " · ".join(
            [
                f"mesh {meshed(plan)}",
                (
                    f"batch {plan.batch_size:,} over"
                    f" {_and(plan.batch_axes) or 'one device'}"
                ),
                f"{parts} micro-batch{'es' if parts > 1 else ''}",
                f"remat {plan.remat}",
                f"data {plan.data}",
                (
                    f"{plan.steps_per_call}"
                    f" step{'s' if plan.steps_per_call > 1 else ''} a call"
                ),
            ]
        ),
    ]
    lines.append(" · ".join(prediction(plan)))
    return [
        line
        for whole in lines
        for line in textwrap.wrap(
            whole, WIDTH, subsequent_indent="  ", break_long_words=False
        )
    ]


def _rank(plan: Plan) -> str:
    """Place of the plan among the others in the objective."""
    if SIMPLEST in plan.reasons:
        return (
            "the simplest of the"
            f" {'cheapest' if plan.objective == 'cost' else 'fastest'}"
        )
    return f"the best in {plan.objective}"


def prediction(plan: Plan) -> list[str]:
    """What a step costs, a phrase each."""
    if not plan.seconds:
        return [
            "the step's time is not known yet: there is no batch to take shapes from"
        ]
    seconds = plan.step_seconds
    words = [f"predicted {duration(plan.step_seconds)} a step"]
    count, unit = units(plan)
    price = plan.price_per_step
    words.append("price not known" if price is None else f"{money(price)} a step")
    words += [f"{si(count / seconds).strip()} {unit}/s"] * (seconds > 0)
    held = [f"{si(plan.flops / seconds)}FLOP/s"] * (seconds > 0) + [
        _filled(plan)
    ] * bool(plan.bytes_per_device)
    return words + [f"on each device {_and(held)}"] * bool(held)


def rows(plan: Plan) -> list[Row]:
    """One row per tied parameter and array of a batch, in the model's order."""
    tied: dict[tuple, list[ArrayPlan]] = {}
    for a in (*plan.arrays, *plan.batch):
        if a.kind in ("params", "inputs", "targets"):
            tied.setdefault(
                (starred(a.path), a.shape, a.dtype, a.spec, a.use), []
            ).append(a)
    found = []
    for (path, *_), arrays in tied.items():
        name = (path if len(arrays) > 1 else arrays[0].path).removeprefix("params/")
        found.append(
            Row(
                name,
                arrays[0],
                len(arrays),
                sum(on_device(a, plan) for a in arrays),
            )
        )
    return found


def besides(plan: Plan) -> list[str]:
    """The state that is no parameter, a phrase for each kind."""
    kinds: dict[str, list[ArrayPlan]] = {}
    for a in plan.arrays:
        if a.kind != "params":
            kinds.setdefault(a.kind, []).append(a)
    found = []
    for kind, arrays in kinds.items():
        split = sum(ways(a.spec, plan) > 1 for a in arrays)
        many = (
            f" {len(arrays):,} arrays{f' ({split:,} in parts)' if split else ''}"
            if len(arrays) > 1
            else ""
        )
        found.append(
            f"{kind}{many}, {size(sum(on_device(a, plan) for a in arrays))} a device"
        )
    return found


def on_device(array: ArrayPlan, plan: Plan) -> int:
    """Bytes of an array that one device holds."""
    return -(-array.bytes // ways(array.spec, plan))


def ways(entries: Entries, plan: Plan) -> int:
    """In how many parts it is split."""
    return math.prod(
        plan.mesh.get(name, 1) for entry in entries for name in names(entry)
    )


def names(entry: Entry) -> tuple[str, ...]:
    """The mesh axes of a dim."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def spelled(entries: Entries) -> str:
    """As a PartitionSpec, without its quotes: P(None, data+fsdp)."""
    return f"P({', '.join('+'.join(names(entry)) or 'None' for entry in entries)})"


def handled(array: ArrayPlan) -> str:
    """What happens to it before it is computed with."""
    used = {n for entry in array.use for n in names(entry)}
    more = [n for entry in array.spec for n in names(entry) if n not in used]
    return (
        f"gathered: {'+'.join(more)}"
        if more
        else "in parts"
        if array.spec
        else "copied"
    )


def units(plan: Plan) -> tuple[int, str]:
    """What a step consumes: (count, "tokens") of a language model, else samples."""
    # whole numbers in a row are tokens; bytes are pixels, and columns have names
    for a in plan.batch:
        if (
            a.path == "inputs"
            and len(a.shape) == 2
            and a.dtype in ("int32", "int64", "uint32", "uint16")
        ):
            return a.shape[0] * a.shape[1], "tokens"
    return plan.batch_size, "samples"


def meshed(plan: Plan) -> str:
    return (
        " x ".join(f"{name}={count}" for name, count in plan.mesh.items())
        or "one device"
    )


def shaped(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def duration(seconds: float) -> str:
    """412 µs, 3.40 ms, 1.23 s, 4.5 min, 6.2 h, 12 d."""
    if seconds <= 0 or not math.isfinite(seconds):
        return "0 s" if seconds == 0 else str(seconds)
    for bound, unit, name in (
        (1e-3, 1e-6, "µs"),
        (1.0, 1e-3, "ms"),
        (100.0, 1.0, "s"),
        (6000.0, 60.0, "min"),
        (172800.0, 3600.0, "h"),
    ):
        if seconds < bound * 0.9995:
            return f"{_three(seconds / unit)} {name}"
    return f"{_three(seconds / 86400)} d"


def money(dollars: float) -> str:
    return (
        f"${dollars:,.0f}"
        if dollars >= 1000
        else f"${dollars:.2f}"
        if dollars >= 1
        else f"${dollars:.3g}"
    )


def si(value: float) -> str:
    """3.40M of something: to be followed by its unit."""
    for bound, sign in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound * 0.9995:
            return (
                f"{_three(value / bound)} {sign}"
                if sign in "GTP"
                else f"{_three(value / bound)}{sign}"
            )
    return _three(value) + " "


def _three(value: float) -> str:
    """To three significant digits."""
    value = float(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 9)}f}"


# ---- the text ----


def _axes(plan: Plan) -> list[str]:
    cells = [
        (
            a.name,
            f"{a.size:,}",
            " + ".join(f"{n} ({plan.mesh.get(n, 1)})" for n in a.mesh) or "-",
            str(a.members),
        )
        for a in plan.axes
    ]
    return (
        grid(
            ("named axis", "size", "split over", "dims of parameters"),
            cells,
            "<><>",
        )
        if cells
        else []
    )


def _arrays(plan: Plan) -> tuple[list[str], dict[str, int]]:
    """The table, and each reason with the number by which the table refers to it."""
    reasons: dict[str, int] = {}
    cells = []
    for row in rows(plan):
        a = row.array
        number = reasons.setdefault(a.reason, len(reasons) + 1)
        cells.append(
            (
                row.path,
                f"x{row.count}" if row.count > 1 else "",
                shaped(a.shape),
                SHORT.get(a.dtype, a.dtype),
                size(row.bytes),
                spelled(a.spec),
                handled(a),
                str(number),
            )
        )
    lines = grid(
        ("parameter", "", "shape", "", "a device", "kept as", "in use", "why"),
        cells,
        "<>><><<>",
        flexible=(0, 5, 6),
    )
    rest = "; ".join(besides(plan))
    return (
        lines
        + textwrap.wrap(f"besides: {rest}", WIDTH, subsequent_indent="  ") * bool(rest),
        reasons,
    )


def _totals(plan: Plan) -> list[str]:
    """Memory and time by kind, side by side."""
    left = right = []
    if plan.bytes_per_device:
        scale = max(plan.memory, plan.peak)
        kinds = [(k, size(v), v / scale) for k, v in plan.bytes_per_device.items() if v]
        rest = plan.memory - plan.peak
        kinds.append(
            ("free", size(rest), rest / scale)
            if rest >= 0
            else ("too much", size(-rest), -rest / scale)
        )
        left = [f"memory a device: {_filled(plan)}", *_bars(kinds)]
    if plan.seconds:
        total = plan.step_seconds or 1.0
        right = [
            f"time of a step: {duration(plan.step_seconds)}",
            *_bars([(k, duration(v), v / total) for k, v in plan.seconds.items() if v]),
        ]
    if not left or not right:
        return left or right
    count = max(len(left), len(right))
    width = max(map(len, left)) + 4
    left, right = (part + [""] * (count - len(part)) for part in (left, right))
    return [f"{a:<{width}}{b}".rstrip() for a, b in zip(left, right, strict=True)]


def _bars(kinds: list[tuple[str, str, float]]) -> list[str]:
    left = min(
        16,
        max(
            (len(kind) for kind, _, _ in kinds),
            default=0,
        ),
    )
    right = max(
        (len(v) for _, v, _ in kinds),
        default=0,
    )
    return [
        f"  {cut(kind, left):<{left}} {value:>{right}} {_bar(share)}".rstrip()
        for kind, value, share in kinds
    ]


def _bar(share: float) -> str:
    eighths = round(max(0.0, min(1.0, share)) * BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip() or "▏" * (share > 0)


def _filled(plan: Plan) -> str:
    share = f" ({plan.peak / plan.memory:.0%})" if plan.memory else ""
    return f"{size(plan.peak)} of {size(plan.memory)}{share}"


def _collectives(plan: Plan) -> list[str]:
    cells = [
        (
            c.kind,
            "+".join(c.axes),
            f"{c.count:,}",
            size(c.bytes),
            duration(c.seconds),
            c.what,
        )
        for c in sorted(plan.collectives, key=lambda c: -c.seconds)
    ]
    return (
        grid(
            ("communication of a step", "over", "count", "bytes", "time", "most of it"),
            cells,
            "<<>>><",
            flexible=(5, 0),
        )
        if cells
        else []
    )


def _rivals(plan: Plan) -> list[str]:
    cells = [
        (
            r.name,
            ",".join(f"{k}={v}" for k, v in r.mesh.items()),
            r.remat,
            str(r.micro_batches),
            duration(r.seconds),
            size(r.bytes),
            cut(r.loses, VERDICT),
        )
        for r in plan.rivals
    ]
    return (
        grid(
            ("rival", "mesh", "remat", "micro-batches", "a step", "a device", "loses"),
            cells,
            "<<<>>><",
            flexible=(0, 1),
        )
        if cells
        else []
    )


def _listed(title: str, items: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for key, value in items:
        mark = f"  {key}  " if len(key) < 3 else f"  {key}: "
        lines += textwrap.wrap(
            value,
            WIDTH,
            initial_indent=mark,
            subsequent_indent=" " * min(len(mark), 6),
        ) or [mark.rstrip()]
    return [title, *lines] if lines else []


def grid(
    titles: Sequence[str],
    cells: Sequence[Sequence[str]],
    align: str,
    flexible: Sequence[int] = (0,),
    width: int = WIDTH,
) -> list[str]:
    """A table with two spaces between its columns; where it is too wide, the widest of
    the `flexible` columns give way.
    """
    wide = [max(len(row[i]) for row in (titles, *cells)) for i in range(len(titles))]
    while sum(wide) + 2 * (len(wide) - 1) > width:
        widest = max(flexible, key=lambda i: wide[i])
        if wide[widest] <= 8:
            break
        wide[widest] -= 1
    line = "  ".join
    return [
        line(
            f"{cut(c, w, i == 0):{a}{w}}"
            for i, (c, w, a) in enumerate(zip(row, wide, align, strict=True))
        ).rstrip()
        for row in (titles, *cells)
    ]


def cut(
    words: str,
    width: int,
    front: bool = False,
) -> str:
    """Shortened to `width`: at its front if that is a path, whose end tells more."""
    if len(words) <= width:
        return words
    return (
        "…" + words[len(words) - width + 1 :]
        if front and "/" in words
        else words[: width - 1] + "…"
    )


def _and(words: Sequence[str]) -> str:
    return " and ".join(words)

"""The page of a preparation: `report.html`, one file that needs no other.

It is drawn from plain data, the facts, of which any part may be missing:

    name, folder, version, seconds   of the preparation and of its run
    alarms      [{level: "error" or "warning", what, details, examples: [text]}]
    sources     [{name, rows, refused, bytes, columns: [{name, type, reason, against,
                missing, examples}]}]
    steps       [{step, arguments, rows_in, rows_out, changed, flagged, reasons: {text:
                count}, learned}]
    splits      [{name, rows, target: {word: rows}}]
    profiles    [{title, note, tables: {table: Profile's JSON}}]
    drift       [{title, rows: [{column, psi, noise, p, distance, verdict}]}]
    dropped     [{row, step, reason, before, partner}]
    examples    [{row, before: {column: value}, after: {column: value}}]
    versions    {name: text}
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError, writing_remedy
from lepton_jax.monitor import bars
from lepton_jax.monitor.bars import share
from lepton_jax.monitor.page import STYLE
from lepton_jax.monitor.progress import duration, number

Facts = Mapping[str, Any]

# Assumptions about what is easy to look at.
MOST_REASONS = 4  # of a step
MOST_DRIFTING = 12  # columns of a comparison that have a row
MOST_DROPPED = 30  # rows
OPEN_COLUMNS = 30  # of a source: a longer table is folded
LONGEST_CELL = 120  # characters
DRIFT_SCALE = 0.5  # the index at which a bar is full

WHAT_DRIFT_MEANS = (
    "PSI, the population stability index, compares the shares of ten bins: below 0.1"
    " the tables are alike, above 0.25 they are different. By chance alone it would be"
    " about as large as the noise. The verdict says that the shift is larger than 0.1"
    " (or 0.25) and that there are rows enough to know (p below 0.001); with many rows"
    " every difference is significant, so significance alone would be no news. Distance"
    " is the largest difference of the cumulative shares."
)

EXTRA = """
.alarm{
 margin:0 0 10px;padding:12px 18px;background:var(--card);border-radius:10px;
 border:1px solid var(--faint);border-left:4px solid var(--warn)
}
.alarm.error{border-left-color:var(--bad)}
.alarm b{font-weight:600;display:block}
.alarm b::first-letter{text-transform:uppercase}
.alarm p{margin:2px 0 0;color:var(--soft);font-size:13.5px}
.fine{color:var(--good)}
td.why{white-space:normal;min-width:180px;color:var(--soft);font-size:12.5px}
td.cell{white-space:normal;overflow-wrap:anywhere;max-width:420px}
td code,p code{overflow-wrap:anywhere;white-space:normal}
.against{color:var(--warn);font-weight:600}
h3{font-size:14.5px;margin:22px 0 10px;font-weight:600}
p.note{margin:0 0 12px;max-width:92ch}
.large{color:var(--bad);font-weight:600}
.small{color:var(--warn);font-weight:600}
del{color:var(--soft)}
ins{text-decoration:none;font-weight:600}
.rows{width:170px;min-width:130px}
.rows s{
 display:inline-block;height:9px;background:var(--train);opacity:.8;
 border-radius:2px 0 0 2px
}
.rows s+s{background:var(--bad);border-radius:0 2px 2px 0}
.reasons{margin:0;padding:0;list-style:none}
"""


def write(path: Path, facts: Facts) -> Path:
    """Write the page, and return its path.

    Raises:
      LeptonError: it can't be written.
    """
    page = render(facts)
    try:
        part = path.with_suffix(".html.part")
        part.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(part, path)  # a reader sees the old page or the new one
    except OSError as error:
        raise LeptonError(
            f"the report can't be written: {error.strerror or error}",
            where=path,
            remedy=f"{writing_remedy(error)}; then write it again",
        ) from error
    return path


def render(facts: Facts) -> str:
    """Return the page, as HTML."""
    name = str(facts.get("name") or "data")
    sections = {
        "Alarms": _alarms(facts),
        "What each step did": _steps(facts.get("steps") or ()),
        "Sources, and what was inferred": _sources(facts.get("sources") or ()),
        "Splits": _splits(facts.get("splits") or ()),
        "Drift": _drift(facts.get("drift") or ()),
        **_profiles(facts.get("profiles") or ()),
        "Rows that were dropped": _dropped(facts.get("dropped") or ()),
        "Examples, before and after": _examples(facts.get("examples") or ()),
        "Versions": _pairs(facts.get("versions") or {}),
    }
    body = "".join(
        f"<section><h2>{escape(title)}</h2>{content}</section>"
        for title, content in sections.items()
        if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)} · data report</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}{bars.STYLE}{EXTRA}</style></head><body><main>"
        f"{_header(facts, name)}{_tiles(facts)}{body}"
        f"<footer>Written by lepton-jax {_text(facts.get('version'))}</footer>"
        "</main></body></html>\n"
    )


# ---- the head ----


def _header(facts: Facts, name: str) -> str:
    alarms = facts.get("alarms") or ()
    levels = {alarm.get("level") for alarm in alarms}
    status = ("good", "no alarm")
    if alarms:
        tone = "bad" if "error" in levels else "open"
        status = (
            tone,
            _plural(
                len(alarms),
                "alarm",
            ),
        )
    return (
        f'<header><h1>{escape(name)}</h1><p class="status">'
        f'<b class="{status[0]}">{status[1]}</b>'
        f"<span>{_text(facts.get('written'))}</span>"
        f"<span>{_text(facts.get('folder'))}</span></p></header>"
    )


def _tiles(facts: Facts) -> str:
    steps = facts.get("steps") or ()
    sources = facts.get("sources") or ()
    read = sum(source.get("rows") or 0 for source in sources)
    out = sum(split.get("rows") or 0 for split in facts.get("splits") or ())
    changed = sum(step.get("changed") or 0 for step in steps)
    refused = sum(source.get("refused") or 0 for source in sources)
    tiles = [
        (
            "rows read",
            f"{read:,}",
            _plural(
                len(sources),
                "source",
            ),
        ),
        (
            "rows kept",
            f"{out:,}",
            share(
                out,
                read + refused,
            ),
        ),
        ("rows dropped", f"{read - out:,}", _unreadable(refused)),
        (
            "cells changed",
            f"{changed:,}",
            _plural(
                len(steps),
                "step",
            ),
        ),
    ]
    missing = _missing(sources)
    if missing is not None:
        tiles.append(("missing cells", f"{missing:,}", "in the sources"))
    if facts.get("seconds") is not None:
        engine = _text(facts.get("engine"))
        tiles.append(("time", duration(facts["seconds"]), engine))
    shown = "".join(
        f"<div><dt>{title}</dt><dd>{figure}</dd><small>{remark}</small></div>"
        for title, figure, remark in tiles
    )
    return f'<dl class="tiles" style="--columns:{len(tiles)}">{shown}</dl>'


def _unreadable(refused: int) -> str:
    return f"{refused:,} more could not be read" if refused else "all could be read"


def _missing(sources: Sequence[Facts]) -> int | None:
    """Return the missing cells of all sources; None: they were not counted."""
    counts = [
        column.get("missing", -1)
        for source in sources
        for column in source.get("columns") or ()
    ]
    known = [count for count in counts if count is not None and count >= 0]
    return sum(known) if known else None


def _alarms(facts: Facts) -> str:
    alarms = facts.get("alarms") or ()
    if not alarms:
        return '<p class="empty">No leak was found, and nothing looks unusual.</p>'
    return "".join(map(_alarm, alarms))


def _alarm(alarm: Facts) -> str:
    examples = "".join(
        f"<p><code>{_text(example)}</code></p>"
        for example in alarm.get("examples") or ()
    )
    details = f"<p>{_text(alarm['details'])}</p>" if alarm.get("details") else ""
    level = "error" if alarm.get("level") == "error" else "warning"
    return (
        f'<div class="alarm {level}"><b>{_text(alarm.get("what"))}</b>'
        f"{details}{examples}</div>"
    )


# ---- steps ----


def _steps(steps: Sequence[Facts]) -> str:
    most = max(
        [step.get("rows_in") or 0 for step in steps],
        default=0,
    )
    return _table(
        [
            "step",
            "with",
            "#rows in",
            "#out",
            "kept and dropped",
            "#cells changed",
            "why",
        ],
        [_step(step, most) for step in steps],
    )


def _step(
    step: Facts,
    most: int,
) -> list[str]:
    rows_in = step.get("rows_in") or 0
    rows_out = step.get("rows_out") or 0
    kept = 100 * rows_out / most if most else 0
    dropped = (
        100
        * max(
            0,
            rows_in - rows_out,
        )
        / most
        if most
        else 0
    )
    bar = f'<s style="width:{kept:.2f}%"></s><s style="width:{dropped:.2f}%"></s>'
    return [
        f"<td><b>{_text(step.get('step'))}</b></td>",
        f'<td class="why">{_arguments(step.get("arguments") or {})}</td>',
        f'<td class="n">{rows_in:,}</td>',
        f'<td class="n">{rows_out:,}</td>',
        f'<td class="rows">{bar}</td>',
        f'<td class="n">{step.get("changed") or 0:,}</td>',
        f'<td class="why">{_reasons(step)}</td>',
    ]


def _arguments(arguments: Facts) -> str:
    shown = [
        f"{escape(name)}={_cell(value)}"
        for name, value in arguments.items()
        if value is not None
    ]
    return f"<code>{', '.join(shown)}</code>" if shown else ""


def _reasons(step: Facts) -> str:
    reasons = sorted(
        (step.get("reasons") or {}).items(),
        key=lambda item: -item[1],
    )
    lines = [f"{count:,} {_text(reason)}" for reason, count in reasons[:MOST_REASONS]]
    if len(reasons) > MOST_REASONS:
        lines.append(f"{len(reasons) - MOST_REASONS} more reasons")
    if step.get("learned"):
        lines.append(f"learned: {_cell(step['learned'])}")
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<ul class="reasons">{items}</ul>' if items else ""


# ---- sources, splits ----


def _sources(sources: Sequence[Facts]) -> str:
    return "".join(map(_source, sources))


def _source(source: Facts) -> str:
    columns = source.get("columns") or ()
    refused = source.get("refused") or 0
    parts = [
        _plural(
            source.get("rows") or 0,
            "row",
        ),
        _plural(len(columns), "column"),
    ]
    if refused:
        parts.append(f"{refused:,} rows could not be read")
    if source.get("digest"):
        parts.append(f"content {str(source['digest'])[:12]}")
    unfolded = " open" if len(columns) <= OPEN_COLUMNS else ""
    table = _table(
        ["column", "type", "#missing", "#against", "why it has this type"],
        [
            _inferred(
                column,
                source.get("rows") or 0,
            )
            for column in columns
        ],
    )
    return (
        f"<details{unfolded}><summary><b>{_text(source.get('name'))}</b>: "
        f"{', '.join(parts)}</summary>{table}</details>"
    )


def _inferred(
    column: Facts,
    rows: int,
) -> list[str]:
    missing = column.get("missing", -1)
    missed = "not counted"
    if missing is not None and missing >= 0:
        missed = f"{missing:,}"
        if missing and rows:
            missed += f" ({share(missing, rows)})"
    against = column.get("against") or 0
    examples = ", ".join(_cell(example) for example in column.get("examples") or ())
    because = _text(column.get("reason"))
    if examples:
        because += f"; against it: <code>{examples}</code>"
    tone = " against" if against else ""
    return [
        f"<td><code>{_text(column.get('name'))}</code></td>",
        f"<td>{_text(column.get('type'))}</td>",
        f'<td class="n">{missed}</td>',
        f'<td class="n{tone}">{against:,}</td>',
        f'<td class="why">{because}</td>',
    ]


def _splits(splits: Sequence[Facts]) -> str:
    total = sum(split.get("rows") or 0 for split in splits)
    words = list(
        dict.fromkeys(w for split in splits for w in split.get("target") or ())
    )
    rows = [
        [
            f"<td><b>{_text(split.get('name'))}</b></td>",
            f'<td class="n">{split.get("rows") or 0:,}</td>',
            f'<td class="n">{share(split.get("rows") or 0, total)}</td>',
            *[_target(split, word) for word in words],
        ]
        for split in splits
    ]
    return _table(
        ["split", "#rows", "#share", *[f"#{word}" for word in words]],
        rows,
    )


def _target(split: Facts, word: str) -> str:
    count = (split.get("target") or {}).get(
        word,
        0,
    )
    return f'<td class="n">{count:,} ({share(count, split.get("rows") or 0)})</td>'


# ---- distributions ----


def _profiles(profiles: Sequence[Facts]) -> dict[str, str]:
    return {str(part["title"]): _profile(part) for part in profiles}


def _profile(part: Facts) -> str:
    tables = part["tables"]
    first, *others = tables.values()
    cards = [
        bars.card(
            name,
            [column, *[t["columns"][name] for t in others if name in t["columns"]]],
        )
        for name, column in first["columns"].items()
    ]
    note = f'<p class="note">{_text(part["note"])}</p>' if part.get("note") else ""
    return (
        f'{note}{bars.legend(list(tables))}<div class="columns">{"".join(cards)}</div>'
    )


def _drift(comparisons: Sequence[Facts]) -> str:
    if not comparisons:
        return ""
    shown = "".join(map(_comparison, comparisons))
    return f'<p class="note">{WHAT_DRIFT_MEANS}</p>{shown}'


def _comparison(comparison: Facts) -> str:
    rows = comparison["rows"]
    left = len(rows) - MOST_DRIFTING
    note = f"{left:,} columns that moved less are left out" if left > 0 else ""
    table = _table(
        ["column", "#PSI", "", "#noise", "#p", "#distance", "verdict"],
        [_moved(row) for row in rows[:MOST_DRIFTING]],
    )
    return f'<h3>{_text(comparison["title"])}</h3>{table}<p class="note">{note}</p>'


def _moved(row: Facts) -> list[str]:
    verdict = str(row["verdict"])
    width = 100 * min(
        1.0,
        row["psi"] / DRIFT_SCALE,
    )
    shown = {"none": "alike", "small": "has moved", "large": "is different"}
    return [
        f"<td><code>{_text(row['column'])}</code></td>",
        f'<td class="n">{number(row["psi"], 3)}</td>',
        f'<td class="rows"><s style="width:{width:.1f}%"></s></td>',
        f'<td class="n">{number(row["noise"], 2)}</td>',
        f'<td class="n">{number(row["p"], 2)}</td>',
        f'<td class="n">{share(row["distance"], 1)}</td>',
        f'<td class="{verdict}">{shown.get(verdict, verdict)}</td>',
    ]


# ---- rows ----


def _dropped(dropped: Sequence[Facts]) -> str:
    rows = [
        [
            f"<td><code>{_text(note.get('row'))}</code></td>",
            f"<td>{_text(note.get('step'))}</td>",
            f'<td class="cell">{_text(note.get("reason"))}</td>',
            f"<td><code>{_text(note.get('partner'))}</code></td>",
            f'<td class="cell"><code>{_cell(note.get("before"))}</code></td>',
        ]
        for note in dropped[:MOST_DROPPED]
    ]
    return _table(
        ["row", "by", "because", "partner", "it was"],
        rows,
    )


def _examples(examples: Sequence[Facts]) -> str:
    return "".join(map(_example, examples))


def _example(example: Facts) -> str:
    before = example.get("before") or {}
    after = example.get("after") or {}
    rows = [
        [
            f"<td><code>{_text(name)}</code></td>",
            f'<td class="cell">{_cell(before.get(name))}</td>',
            f'<td class="cell">{_after(before, after, name)}</td>',
        ]
        for name in dict.fromkeys([*before, *after])
    ]
    table = _table(["column", "raw", "prepared"], rows)
    return f"<details><summary>{_text(example.get('row'))}</summary>{table}</details>"


def _after(
    before: Facts,
    after: Facts,
    name: str,
) -> str:
    if name not in after:
        return "<del>left out</del>"
    same = name in before and before[name] == after[name]
    shown = _cell(after[name])
    return shown if same else f"<ins>{shown}</ins>"


# ---- parts ----


def _table(
    names: Sequence[str],
    rows: Sequence[Sequence[str]],
) -> str:
    """Return a table; a name that begins with # heads a column of numbers."""
    if not rows:
        return ""
    heads = "".join(
        f'<th class="n">{escape(name[1:])}</th>'
        if name.startswith("#")
        else f"<th>{escape(name)}</th>"
        for name in names
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _pairs(pairs: Facts) -> str:
    rows = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_text(value)}</dd></div>"
        for key, value in pairs.items()
    )
    return f'<dl class="pairs">{rows}</dl>' if rows else ""


def _cell(value: Any) -> str:
    """Return a value as short text."""
    if value is None:
        return '<span class="note">missing</span>'
    if isinstance(value, float):
        return number(value)
    text = str(value)
    if len(text) > LONGEST_CELL:
        text = f"{text[:LONGEST_CELL]} …"
    return escape(text)


def _text(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"

"""The page that a run leaves behind: `report.html`, one file that needs nothing else.

python -m lepton_jax.monitor.report RUN_FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, LeptonError, writing_remedy
from lepton_jax.monitor import decisions, stragglers
from lepton_jax.monitor.chart import Curve, Mark, draw, legend, smooth
from lepton_jax.monitor.events import FILE, read_events
from lepton_jax.monitor.page import SCRIPT, STYLE
from lepton_jax.monitor.progress import best_evaluation, described, duration, number

ROWS = 60  # of saves in the list of events, at most

Series = tuple[np.ndarray, np.ndarray]


@dataclass
class Run:
    """What the events of one folder say, put together: where a resumed run repeats a
    step, the later record wins; what a rollback has undone is apart.
    """

    start: dict[str, Any] = field(default_factory=dict)
    end: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Series] = field(default_factory=dict)
    undone: list[Series] = field(default_factory=list)
    evaluations: dict[int, dict[str, Any]] = field(default_factory=dict)
    step_seconds: Series = field(default_factory=lambda: _series([], []))
    waits: Series = field(default_factory=lambda: _series([], []))
    marks: list[Mark] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    compilations: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    window_seconds: float = 0.0
    wait_seconds: float = 0.0
    samples: int = 0
    last: int = 0

    @property
    def status(self) -> str:
        return self.end.get("status") or "no end recorded"


def write_report(folder: Path) -> Path:
    """Writes `folder/report.html` from the run's events, its plan and its recipe, and
    returns its path.

    Raises:
      DataError: the folder holds no events, or damaged ones.
      LeptonError: the page can't be written.
    """
    folder = Path(folder)
    events = read_events(folder / FILE)
    if not events:
        raise DataError(
            "the run has no events yet",
            where=folder / FILE,
            remedy="name the folder of a run that began",
        )
    page = render(
        events,
        _read(folder / "plan.json"),
        _read(folder / "recipe.json"),
        folder.resolve().name,
        decisions.read_decisions(folder),
        _read(folder / "hosts.json"),
    )
    path = folder / "report.html"
    try:
        part = path.with_suffix(".html.part")
        part.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(part, path)  # a reader sees the old page or the new one
    except OSError as error:
        raise LeptonError(
            f"the report can't be written: {error.strerror or error}",
            where=path,
            remedy=(
                f"{writing_remedy(error)}; then run "
                f"python -m lepton_jax.monitor.report {shlex.quote(str(folder))}"
            ),
        ) from error
    return path


def collect(events: Iterable[dict[str, Any]]) -> Run:
    """Puts the events of a folder together; `O(events)`, and fields that are missing
    are passed over.
    """
    run = Run()
    began = None
    parts: dict[str, Any] = {}
    windows: list[Any] = []
    for event in events:
        kind = event["kind"]
        at = event.get("time") or 0.0
        began = at if began is None or kind == "start" else began
        step = event.get("step")
        # a start may first find damage
        if run.starts and not run.end and kind not in ("start", "damaged"):
            run.starts[-1]["until"] = at
        if kind == "start":
            if run.starts or step:
                run.marks.append(
                    Mark(
                        step or 0, "resume", "resumed", f"resumed at step {step or 0:,}"
                    )
                )
            run.starts = [*run.starts, {"at": at, "until": at}]
            run.start = event
            run.end = {}
            run.compilations = {}
        elif kind == "steps":
            _add_steps(run, event, parts, windows)
        elif kind == "evaluation" and step is not None:
            run.evaluations[step] = event.get("metrics") or {}
        elif kind == "compile":
            program = str(event.get("program"))
            run.compilations[program] = run.compilations.get(program, 0) + 1
            if (event.get("count") or 1) > 1:
                run.marks.append(
                    Mark(
                        run.last,
                        "compile",
                        "compiled again",
                        f"{program} compiled again",
                    )
                )
        elif kind == "save" and step is not None:
            run.marks.append(
                Mark(
                    step,
                    "save",
                    "checkpoint",
                    "",
                )
            )
        elif kind == "rollback" and step is not None:
            _go_back(run, event, parts)
        elif kind == "damaged" and step is not None:
            run.marks.append(
                Mark(
                    step,
                    "damaged",
                    "damaged checkpoint",
                    f"checkpoint of step {step:,} damaged",
                )
            )
        elif kind == "end":
            run.end = event
            if event.get("status") == "diverged":
                step = run.last if step is None else step
                run.marks.append(
                    Mark(step, "diverged", "diverged", f"diverged at step {step:,}")
                )
    run.seconds = sum(s["until"] - s["at"] for s in run.starts)
    run.records = {
        name: _series([x for x, _ in both], [y for _, y in both])
        for name, both in parts.items()
    }
    if windows:
        x, seconds, waits = (
            np.array(column, np.float64) for column in zip(*windows, strict=True)
        )
        run.step_seconds = _series([x], [seconds])
        run.waits = _series([x], [waits])
    return run


def _add_steps(
    run: Run,
    event: dict[str, Any],
    parts: dict,
    windows: list,
) -> None:
    first = event.get("first")
    last = event.get("last")
    if first is None or last is None or last < first:
        return
    for name, values in (event.get("records") or {}).items():
        y = np.array(
            [v if isinstance(v, int | float) else math.nan for v in values], np.float64
        )
        parts.setdefault(name, []).append(
            (np.arange(first, first + len(y), dtype=np.float64), y)
        )
    seconds = event.get("seconds")
    wait = event.get("data_wait")
    if seconds:
        share = math.nan if wait is None else 100 * wait / seconds
        windows.append(
            (
                last,
                seconds / (last - first + 1),
                share,
            )
        )
        run.window_seconds = run.window_seconds + seconds
        run.wait_seconds = run.wait_seconds + (wait or 0.0)
        run.samples += event.get("samples") or 0
    run.last = last


def _go_back(
    run: Run,
    event: dict[str, Any],
    parts: dict,
) -> None:
    """Take out what a rollback has undone; of the loss it is kept apart."""
    to = event.get("to") or 0
    for name, both in parts.items():
        if name == "loss":
            x, y = _series([x for x, _ in both], [y for _, y in both])
            if len(x) and x[-1] > to:
                run.undone.append((x[x > to], y[x > to]))
        parts[name] = [(x[x <= to], y[x <= to]) for x, y in both]
    run.evaluations = {
        step: metrics for step, metrics in run.evaluations.items() if step <= to
    }
    run.last = to
    text = (
        f"rolled back from step {event['step']:,} to {to:,}: {event.get('why') or ''}"
    )
    run.marks.append(
        Mark(
            event["step"],
            "rollback",
            "rolled back",
            text,
        )
    )


def _series(x: Sequence[np.ndarray], y: Sequence[np.ndarray]) -> Series:
    """One ascending curve from parts in the order of writing; of two values for a step,
    the later stays.
    """
    if not x:
        return np.zeros(0), np.zeros(0)
    steps, last = np.unique(
        np.concatenate(x)[::-1],
        return_index=True,
    )
    return steps, np.concatenate(y)[::-1][last]


def render(
    events: list[dict[str, Any]],
    plan: Any,
    recipe: Any,
    folder: str,
    decided: list[dict[str, Any]],
    hosts: Any = None,
) -> str:
    """The page, as HTML. `plan`, `recipe` and `hosts` are what their JSON files hold,
    or None; `decided` is what the journal tells of decisions.
    """
    run = collect(events)
    run.marks += decisions.marks(decided)
    name = str(run.start.get("name") or folder)
    settings = run.start.get("settings") or {}
    text = run.start.get("plan") or (
        json.dumps(plan, indent=2) if plan is not None else ""
    )
    kind = {"finished": "good", "diverged": "bad", "failed": "bad"}.get(
        run.status, "open"
    )
    reason = (
        f" <span>{escape(str(run.end['reason']))}</span>"
        if run.end.get("reason")
        else ""
    )
    when = time.strftime(
        "%d %B %Y, %H:%M", time.localtime(events[0].get("time") or 0)
    ).lstrip("0")
    sections = [
        ("Curves", _charts(run)),
        ("Decisions", decisions.table(decided)),
        ("Hosts", _hosts(hosts, run)),
        (
            "Plan",
            (
                f'<pre tabindex="0">{escape(str(text))}</pre>'
                if text
                else _empty("The run recorded no plan.")
            ),
        ),
        ("Parameters", _parameters(run.start.get("table") or [])),
        ("Events of note", _notes(events)),
        (
            "Settings",
            _pairs(settings) if settings else _empty("No settings were recorded."),
        ),
        (
            "Recipe",
            (
                _pairs(recipe)
                if isinstance(recipe, dict) and recipe
                else _empty("The run folder holds no recipe.json.")
            ),
        ),
        ("Versions", _pairs(_versions(run.start))),
    ]
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>"
        for title, content in sections
        if content
    )
    return (
        '<!doctype html><html lang="en"><head><meta'
        f' charset="utf-8"><title>{escape(name)} · run report</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light'
        f' dark"><style>{STYLE}</style></head><body><main><header>'
        f'<h1>{escape(name)}</h1><p class="status"><b'
        f' class="{kind}">{escape(run.status)}</b>{reason}'
        "<span>began"
        f" {when}</span><span>{escape(folder) if folder != name else ''}</span></p></header>"
        f"{_tiles(run)}{body}"
        "<footer>Written by lepton-jax"
        f" {escape(str(run.start.get('version') or ''))}</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _tiles(run: Run) -> str:
    """The key figures: (what, figure, remark)."""
    start = run.start
    end = run.end
    tiles = []
    latest = run.evaluations[max(run.evaluations)] if run.evaluations else {}
    best = best_evaluation(list(run.evaluations.items()), start)
    for name, value in (end.get("metrics") or latest).items():
        remark = (
            f"best {number(best[2])} at step {best[0]:,}"
            if best and best[1] == name
            else "at the last evaluation"
        )
        tiles.append((f"evaluation {name}", _figure(value), remark))
    if "loss" in run.records and not any(
        name == "evaluation loss" for name, *_ in tiles
    ):
        tiles.append(
            (
                "train loss",
                _figure(run.records["loss"][1][-1]),
                "at the last step",
            )
        )
    step = end.get("step", run.last)
    target = start.get("steps")
    resumed = f", resumed at step {start['step']:,}" if start.get("step") else ""
    tiles.append(
        (
            "steps",
            f"{step or 0:,}",
            (f"of {target:,}" if target else "no target recorded") + resumed,
        )
    )
    several = len(run.starts) > 1
    seconds = run.seconds if several or end.get("seconds") is None else end["seconds"]
    remark = "from start to end" if end else "up to the last event"
    tiles.append(
        (
            "time",
            duration(seconds),
            f"in {len(run.starts)} starts" if several else remark,
        )
    )
    rate = end.get("samples_per_second") or (
        run.samples / run.window_seconds if run.window_seconds else None
    )
    if rate:
        wait = (
            100 * run.wait_seconds / run.window_seconds if run.window_seconds else 0.0
        )
        tiles.append(
            (
                "samples per second",
                number(rate),
                f"{wait:.1f} % of the time waiting for data",
            )
        )
    count = sum(run.compilations.values()) or end.get("compilations", 0)
    programs = ", ".join(f"{n} {program}" for program, n in run.compilations.items())
    tiles.append(
        (
            "compilations",
            str(count),
            programs or "none recorded",
        )
    )
    if start.get("devices"):
        tiles.append(
            (
                "devices",
                f"{start['devices']:,}",
                str(start.get("device_kind") or start.get("platform") or ""),
            )
        )
    if start.get("parameters") is not None:
        batch = f"batch {start['batch_size']:,}" if start.get("batch_size") else ""
        tiles.append(("parameters", f"{start['parameters']:,}", batch))
    columns = (
        len(tiles)
        if len(tiles) < 7
        else math.ceil(len(tiles) / math.ceil(len(tiles) / 6))
    )
    return (
        f'<dl class="tiles" style="--columns:{columns}">'
        + "".join(
            f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><small>{escape(c)}</small></div>"
            for a, b, c in tiles
        )
        + "</dl>"
    )


def _charts(run: Run) -> str:
    if not run.records and not run.evaluations:
        return _empty(
            "No step was recorded: the run ended, or was stopped, before its first"
            " reading."
        )
    ends = [x[[0, -1]] for x, _ in run.records.values() if len(x)] + [
        np.array(list(run.evaluations) or [run.last])
    ]
    low = float(min(e.min() for e in ends))
    high = float(max(e.max() for e in ends))
    steps = (0.0 if low < 0.1 * high else low, max(high, low + 1))
    evaluated = {name for metrics in run.evaluations.values() for name in metrics}
    known = [
        *(run.start.get("metrics") or []),
        *run.records,
        *sorted(evaluated),
    ]
    names = [
        name
        for name in dict.fromkeys(
            [
                "loss",
                *(n for n in known if n != "learning_rate"),
                "learning_rate",
            ]
        )
        if not _idle(run, name)
    ]
    figures = []
    for name in names:
        curves = _learning(run, name)
        if curves:
            figures.append(
                draw(
                    name.replace("_", " "),
                    curves,
                    run.marks,
                    steps=steps,
                    log=name == "loss",
                    zero=name == "learning_rate",
                    wide=name == "loss",
                    note=_counted(curves),
                )
            )
    x, seconds = run.step_seconds
    if len(x):
        figures.append(
            draw(
                "step time",
                [Curve("per step", x, seconds * 1e3, "other")],
                run.marks,
                steps=steps,
                zero=True,
                log=True,
                unit=" ms",
                note="mean of each window",
            )
        )
        figures.append(
            draw(
                "data wait",
                [Curve("share of time", *run.waits, "other")],
                run.marks,
                steps=steps,
                zero=True,
                unit=" %",
                note="the loop waiting for samples",
            )
        )
    marks = legend([], run.marks) if run.marks else ""
    return f'{marks}<div class="charts">{"".join(figures)}</div>'


def _idle(run: Run, name: str) -> bool:
    """Whether a record has no curve of its own: a policy's share in a knob, and what
    nobody ever asked for.
    """
    measured = name in ("loss", *(run.start.get("metrics") or []))
    return ":" in name or (
        not measured
        and name in run.records
        and not np.nan_to_num(run.records[name][1]).any()
    )


def _learning(run: Run, name: str) -> list[Curve]:
    """The curves of one record: each step, smoothed, and the evaluations of the same
    name.
    """
    curves = []
    if name in run.records:
        x, y = run.records[name]
        if name in ("loss", *(run.start.get("metrics") or [])) and len(x) >= 90:
            curves = [
                Curve("each step", x, y, "raw"),
                Curve("train, smoothed", *smooth(x, y), "train"),
            ]
        else:
            curves = [Curve("train", x, y, "train")]
    if name == "loss":
        curves = [*(Curve("undone", *part, "undone") for part in run.undone), *curves]
    found = sorted(
        (step, metrics[name])
        for step, metrics in run.evaluations.items()
        if isinstance(metrics.get(name), int | float)
    )
    if found:
        x, y = np.array(found, np.float64).T
        curves.append(Curve("evaluation", x, y, "evaluation"))
    return curves


def _counted(curves: list[Curve]) -> str:
    n = next((len(c.x) for c in curves if c.style == "evaluation"), 0)
    return f"{n} evaluation{'s' if n != 1 else ''}" if n else ""


def _parameters(table: list[dict[str, Any]]) -> str:
    if not table:
        return _empty("The run recorded no parameter table.")
    total = sum(row.get("bytes") or 0 for row in table)
    most = max(row.get("bytes") or 0 for row in table) or 1
    kinds = len({row.get("kind") for row in table}) > 1
    rows = []
    for row in table:
        count = row.get("bytes") or 0
        share = count / total if total else 0.0
        width = 100 * count / most
        shape = " \u00d7 ".join(map(str, row.get("shape") or ())) or "scalar"
        cells = [
            f"<td><code>{_breakable(row.get('path'))}</code></td>",
            f"<td>{escape(shape)}</td>",
            f"<td>{_text(row.get('dtype'))}</td>",
            f"<td><code>{_text(row.get('spec'))}</code></td>",
            f"<td>{_text(row.get('kind'))}</td>" if kinds else "",
            f'<td class="n">{size(count)}</td>',
            (
                '<td class="share"><s'
                f' style="width:{width:.1f}%"></s><span>{_percent(share)}</span></td>'
            ),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = "<th>path</th><th>shape</th><th>dtype</th><th>layout</th>" + (
        "<th>kind</th>" if kinds else ""
    )
    body = (
        f'<div class="scroll"><table><thead><tr>{head}<th'
        ' class="n">size</th><th>share</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    heading = f"{len(table):,} array{'s' if len(table) != 1 else ''}, {size(total)}"
    return f"<details{' open' if len(table) <= 80 else ''}><summary>{heading}</summary>{body}</details>"


def _hosts(told: Any, run: Run) -> str:
    """Of a run that was watched over: the hosts as they were last heard of, and what
    failed.
    """
    if (
        not isinstance(told, dict)
        or not isinstance(told.get("hosts"), dict)
        or (run.starts and (told.get("time") or 0.0) < run.starts[-1]["at"])
    ):  # of an earlier start
        return ""
    table = stragglers.table(told["hosts"], told.get("slowest"))
    failed = "".join(
        f"<li>{_text(each.get('what'))}"
        + (
            f"; {duration(each['seconds_to_stepped'])} until the next step"
            if each.get("seconds_to_stepped") is not None
            else ""
        )
        + "</li>"
        for each in told.get("recoveries") or ()
    )
    return table + (
        f"<p>{told.get('restarts') or 0} restarts after a failure:</p><ul>{failed}</ul>"
        if failed
        else ""
    )


def _notes(events: list[dict[str, Any]]) -> str:
    """The table of what happened besides steps and evaluations, with times since the
    first event.
    """
    began = events[0].get("time") or 0.0
    running = False
    rows: list[Any] = []
    saves: dict[Any, Any] = {}
    for event in events:
        step = event.get("step")
        kind = event["kind"]
        if kind == "committed" and step in saves:
            row = saves.pop(step)
            row[3] += (
                f"; committed {duration(max(0.0, (event.get('time') or 0.0) - row[4]))}"
                " later"
            )
            continue
        if kind == "start":
            kind = "resumed" if step or running else "started"
            what = ""
            running = True
        elif kind == "compile":
            again = (event.get("count") or 1) > 1
            kind = "compiled again" if again else "compiled"
            what = str(event.get("program") or "")
            what += (
                f" in {duration(event['seconds'])}"
                if event.get("seconds") is not None
                else ""
            )
            what += f": {event['changed']}" if event.get("changed") else ""
        elif kind == "save":
            what = (
                f"held the loop for {duration(event['seconds'])}"
                if event.get("seconds") is not None
                else "written"
            )
        elif kind == "rollback":
            kind = "rolled back"
            what = f"to step {event.get('to')}: {event.get('why')}"
        elif kind == "control":
            kind = (
                f"{event.get('do')}"
                if event.get("ok")
                else f"{event.get('do')}, refused"
            )
            what = f"{event.get('text')} ({event.get('who')})"
        elif kind == "damaged":
            what = str(
                event.get("reason") or "a checkpoint that can't be read was passed over"
            )
        elif kind == "end":
            kind = str(event.get("status") or "ended")
            what = str(event.get("reason") or "")
        elif kind in ("steps", "evaluation", "committed"):
            continue
        else:
            what = described({k: v for k, v in event.items() if k != "step"})
        rows.append(
            [
                event.get("time") or began,
                step,
                kind,
                what,
                event.get("time") or 0.0,
            ]
        )
        if event["kind"] == "save":
            saves[step] = rows[-1]
    hidden = [row for row in rows if row[2] == "save"][:-ROWS]
    remark = (
        f'<p class="note">{len(hidden):,} earlier saves are left out.</p>'
        if hidden
        else ""
    )
    omitted = set(map(id, hidden))
    lines = "".join(
        f'<tr class="{_tone(kind)}"><td'
        f' class="n">{duration(max(0.0, at - began)) if at > began else "0 s"}</td><td'
        f' class="n">{"" if step is None else f"{step:,}"}</td><td'
        f' class="what">{escape(kind)}</td><td>{escape(what)}</td></tr>'
        for row in rows
        if id(row) not in omitted
        for at, step, kind, what, _ in [row]
    )
    return (
        f'{remark}<div class="scroll"><table class="events"><thead><tr><th'
        ' class="n">after</th>'
        f'<th class="n">step</th><th>event</th><th>details</th></tr></thead><tbody>{lines}</tbody></table></div>'
    )


def _tone(kind: str) -> str:
    if kind in ("damaged", "diverged", "failed", "rolled back"):
        return "bad"
    return (
        "open"
        if kind in ("compiled again", "warning", "skipped", "interrupted")
        else ""
    )


def _pairs(pairs: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        return (
            value
            if isinstance(value, str)
            else json.dumps(value, ensure_ascii=False, default=str)
        )

    return (
        '<dl class="pairs">'
        + "".join(
            f"<div><dt>{_text(key)}</dt><dd>{_text(shown(value))}</dd></div>"
            for key, value in pairs.items()
        )
        + "</dl>"
    )


def _versions(start: dict[str, Any]) -> dict[str, Any]:
    names = {
        "lepton-jax": "version",
        "jax": "jax",
        "Python": "python",
        "platform": "platform",
        "device": "device_kind",
        "recipe file": "recipe",
    }
    found = {
        name: start[key] for name, key in names.items() if start.get(key) is not None
    }
    return found or {"versions": "not recorded"}


def size(count: float) -> str:
    """Bytes as text, in powers of 1024: 512 B, 1.95 KiB, 3.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{number(count, 3)} {unit}"


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _figure(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _text(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _breakable(path: Any) -> str:
    return _text(path).replace("/", "/<wbr>").replace(".", ".<wbr>")


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _read(path: Path) -> Any:
    """What a JSON file beside the events holds; None if there is no such file, a text
    if it can't be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"unreadable": f"{path.name}: {error}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: writes the report of a run folder and prints its path; 2 if
    there is nothing to report on.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lepton_jax.monitor.report", description="Writes report.html."
    )
    parser.add_argument(
        "folder",
        type=Path,
        metavar="RUN_FOLDER",
        help="the folder that holds events.jsonl",
    )
    try:
        print(write_report(parser.parse_args(arguments).folder))
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

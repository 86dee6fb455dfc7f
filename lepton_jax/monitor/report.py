"""The page that a run leaves behind: `report.html`, one file that needs no other.

python -m lepton_jax.monitor.report RUN_FOLDER
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import DataError, LeptonError
from lepton_jax.monitor import decisions, examined, explained, square, stragglers
from lepton_jax.monitor.chart import Axis, Curve, draw, legend, smooth
from lepton_jax.monitor.costs import Tile, cost_tiles
from lepton_jax.monitor.events import FILE, Event, read_events
from lepton_jax.monitor.events_table import events_table
from lepton_jax.monitor.folds_page import FOLDS, write_folds_report
from lepton_jax.monitor.page import SCRIPT, STYLE
from lepton_jax.monitor.progress import best_evaluation, duration, number
from lepton_jax.monitor.recorded_run import Run, collect
from lepton_jax.monitor.writing import write_page

# The class that colours a status; every other one is "open".
STATE_CLASSES = {"finished": "good", "diverged": "bad", "failed": "bad"}

# Assumptions about what is easy to look at.
TILES_IN_A_ROW = 6  # at most
FEWEST_TO_SMOOTH = 90  # points of a curve
NEAR_THE_START = 0.1  # share of the run: an axis that begins there begins at 0
OPEN_ROWS = 80  # of the parameters' table: a longer one is folded


def write_report(folder: Path) -> Path:
    """Write `folder/report.html`, and return its path.

    Args:
      folder: of the run: its events, its plan and its recipe are reported.

    Raises:
      DataError: the folder holds no events, or damaged ones.
      LeptonError: the page can't be written.
    """
    folder = Path(folder)
    if (folder / FOLDS).is_file():
        return write_folds_report(folder)
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
        _read(folder / examined.FILE),
        folder,
    )
    return write_page(folder / "report.html", page, folder)


def render(
    events: list[Event],
    plan: Any,
    recipe: Any,
    folder: str,
    decided: list[dict[str, Any]],
    hosts: Any = None,
    facts: Any = None,
    place: Path | None = None,
) -> str:
    """Return the page, as HTML.

    Args:
      events: of the run.
      plan: the content of plan.json, or None.
      recipe: the content of recipe.json, or None.
      folder: name of the run's folder.
      decided: the decisions in the journal.
      hosts: the content of hosts.json, or None.
      facts: the content of examined.json, or None.
      place: the run's folder, for pictures and explanations; None: there are none.
    """
    run = collect(events)
    run.marks += decisions.marks(decided)
    why = None if place is None else _read(place / explained.FILE)
    name = str(run.start.get("name") or folder)
    sections = {
        "Curves": _charts(run),
        **examined.sections(facts, events, place),
        "Why": explained.section(why),
        "Decisions": decisions.table(decided),
        "Hosts": _hosts(hosts, run),
        "Plan": _plan(run, plan),
        "Parameters": _parameters(run.start.get("table") or []),
        "Events of note": events_table(events),
        "Settings": _pairs_or(
            run.start.get("settings"),
            "No settings were recorded.",
        ),
        "Recipe": _pairs_or(recipe, "The run folder holds no recipe.json."),
        "Versions": _pairs(_versions(run.start)),
    }
    body = "".join(
        f"<section><h2>{title}</h2>{content}</section>"
        for title, content in sections.items()
        if content
    )
    version = escape(str(run.start.get("version") or ""))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)} · run report</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}{square.STYLE}{examined.STYLE}"
        f"{explained.STYLE}</style></head><body><main>"
        f"{_header(run, name, folder, events[0].get('time') or 0)}"
        f"{_tiles(run, place)}{_notices(events)}{body}"
        f"<footer>Written by lepton-jax {version}</footer></main>"
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _header(
    run: Run,
    name: str,
    folder: str,
    began: float,
) -> str:
    state_class = STATE_CLASSES.get(run.status, "open")
    reason = ""
    if run.end.get("reason"):
        reason = f" <span>{escape(str(run.end['reason']))}</span>"
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(began)).lstrip("0")
    folder_if_other = escape(folder) if folder != name else ""
    return (
        f'<header><h1>{escape(name)}</h1><p class="status">'
        f'<b class="{state_class}">{escape(run.status)}</b>{reason}'
        f"<span>began {when}</span><span>{folder_if_other}</span></p></header>"
    )


def _notices(events: list[Event]) -> str:
    """Return why the run may be worse than it could be, a sentence each."""
    told = [str(event.get("text")) for event in events if event["kind"] == "notice"]
    lines = dict.fromkeys(told)
    return "".join(f'<p class="note">! {escape(text)}</p>' for text in lines)


# ---- key figures ----


def _tiles(run: Run, folder: Path | None) -> str:
    tiles = [
        *_metric_tiles(run),
        _steps_tile(run),
        _time_tile(run),
        *_rate_tiles(run),
        *cost_tiles(run, folder),
        _compilations_tile(run),
        *_size_tiles(run.start),
    ]
    rows = math.ceil(len(tiles) / TILES_IN_A_ROW)
    columns = math.ceil(len(tiles) / rows)
    shown = "".join(
        f"<div><dt>{escape(tile.name)}</dt><dd>{escape(tile.figure)}</dd>"
        f"<small>{escape(tile.remark)}</small></div>"
        for tile in tiles
    )
    return f'<dl class="tiles" style="--columns:{columns}">{shown}</dl>'


def _metric_tiles(run: Run) -> list[Tile]:
    latest = run.evaluations[max(run.evaluations)] if run.evaluations else {}
    metrics = run.end.get("metrics") or latest
    best = best_evaluation(list(run.evaluations.items()), run.start)
    tiles = []
    for name, value in metrics.items():
        remark = "at the last evaluation"
        if best and best.metric == name:
            remark = f"best {number(best.value)} at step {best.step:,}"
        tiles.append(Tile(f"evaluation {name}", _figure(value), remark))

    if "loss" in run.records and "loss" not in metrics:
        _, losses = run.records["loss"]
        tiles.append(
            Tile(
                "train loss",
                _figure(losses[-1]),
                "at the last step",
            )
        )
    return tiles


def _steps_tile(run: Run) -> Tile:
    step = run.end.get("step", run.last) or 0
    target = run.start.get("steps")
    remark = f"of {target:,}" if target else "no target recorded"
    if run.start.get("step"):
        remark += f", resumed at step {run.start['step']:,}"
    return Tile("steps", f"{step:,}", remark)


def _time_tile(run: Run) -> Tile:
    seconds = run.end.get("seconds")
    if len(run.attempts) > 1:
        remark = f"in {len(run.attempts)} starts"
        return Tile("time", duration(run.seconds), remark)
    remark = "from start to end" if run.end else "up to the last event"
    return Tile(
        "time",
        duration(run.seconds if seconds is None else seconds),
        remark,
    )


def _rate_tiles(run: Run) -> list[Tile]:
    rate = run.end.get("samples_per_second")
    wait = 0.0
    if run.window_seconds:
        rate = rate or run.samples / run.window_seconds
        wait = 100 * run.wait_seconds / run.window_seconds
    if not rate:
        return []
    remark = f"{wait:.1f} % of the time waiting for data"
    return [Tile("samples per second", number(rate), remark), *_feed_tiles(run.feed)]


def _feed_tiles(feed: dict[str, float]) -> list[Tile]:
    """Return how much was read at once, and how much of the rows was padding."""
    tiles = []
    if feed.get("workers"):
        ahead = f"{feed.get('blocks_ahead', 0):.0f} blocks ahead"
        held = f"{feed.get('bytes', 0) / 2**20:,.0f} MiB"
        tiles.append(Tile("reading threads", str(feed["workers"]), f"{ahead}, {held}"))
    if feed.get("padding") is not None:
        padding = f"{100 * feed['padding']:.1f} %"
        tiles.append(Tile("padding", padding, "of the tokens of fitted rows"))
    return tiles


def _compilations_tile(run: Run) -> Tile:
    count = sum(run.compilations.values()) or run.end.get("compilations", 0)
    programs = ", ".join(f"{n} {program}" for program, n in run.compilations.items())
    return Tile("compilations", str(count), programs or "none recorded")


def _size_tiles(start: dict[str, Any]) -> list[Tile]:
    tiles = []
    if start.get("devices"):
        kind = str(start.get("device_kind") or start.get("platform") or "")
        tiles.append(Tile("devices", f"{start['devices']:,}", kind))
    if start.get("parameters") is not None:
        batch = f"batch {start['batch_size']:,}" if start.get("batch_size") else ""
        tiles.append(Tile("parameters", f"{start['parameters']:,}", batch))
    return tiles


# ---- curves ----


def _charts(run: Run) -> str:
    if not run.records and not run.evaluations:
        return _empty(
            "No step was recorded: the run ended, or was stopped, before its first"
            " reading."
        )

    steps = _step_range(run)
    figures = []
    for name in _curve_names(run):
        curves = _learning(run, name)
        if curves:
            figures.append(
                draw(
                    name.replace("_", " "),
                    curves,
                    run.marks,
                    steps=steps,
                    axis=Axis(zero=name == "learning_rate", log=name == "loss"),
                    wide=name == "loss",
                    note=_counted(curves),
                )
            )
    if len(run.step_seconds[0]):
        figures += _time_figures(run, steps)
    marks = legend([], run.marks) if run.marks else ""
    return f'{marks}<div class="charts">{"".join(figures)}</div>'


def _step_range(run: Run) -> tuple[float, float]:
    """Return the ends of the horizontal axis."""
    steps = list(run.evaluations) or [run.last]
    for x, _ in run.records.values():
        if len(x):
            steps += [x[0], x[-1]]
    first = float(min(steps))
    last = float(max(steps))
    low = 0.0 if first < NEAR_THE_START * last else first
    return low, max(last, first + 1)


def _curve_names(run: Run) -> list[str]:
    """Return the names that have a curve: the loss first, the learning rate last."""
    evaluated = {name for metrics in run.evaluations.values() for name in metrics}
    known = [
        *run.metrics,
        *run.records,
        *sorted(evaluated),
    ]
    others = [name for name in known if name != "learning_rate"]
    names = dict.fromkeys(["loss", *others, "learning_rate"])
    return [name for name in names if not _idle(run, name)]


def _time_figures(run: Run, steps: tuple[float, float]) -> list[str]:
    x, seconds = run.step_seconds
    step_time = draw(
        "step time",
        [Curve("per step", x, seconds * 1e3, "other")],
        run.marks,
        steps=steps,
        axis=Axis(zero=True, log=True, unit=" ms"),
        note="mean of each window",
    )
    data_wait = draw(
        "data wait",
        [Curve("share of time", *run.waits, "other")],
        run.marks,
        steps=steps,
        axis=Axis(zero=True, unit=" %"),
        note="the loop waiting for samples",
    )
    return [step_time, data_wait]


def _idle(run: Run, name: str) -> bool:
    """Whether a record has no curve of its own.

    That is a policy's share in a knob, and a record that is always 0 and is no metric.
    """
    if ":" in name:
        return True
    if name == "loss" or name in run.metrics or name not in run.records:
        return False
    _, values = run.records[name]
    return not np.nan_to_num(values).any()


def _learning(run: Run, name: str) -> list[Curve]:
    """Return the curves of one record: each step, smoothed, undone, and evaluations."""
    curves = []
    if name == "loss":
        curves += [Curve("undone", *part, "undone") for part in run.undone]
    if name in run.records:
        curves += _training_curves(run, name)

    evaluations = sorted(
        (step, metrics[name])
        for step, metrics in run.evaluations.items()
        if isinstance(metrics.get(name), int | float)
    )
    if evaluations:
        x, y = np.array(evaluations, np.float64).T
        curves.append(Curve("evaluation", x, y, "evaluation"))
    return curves


def _training_curves(run: Run, name: str) -> list[Curve]:
    x, y = run.records[name]
    is_noisy = name == "loss" or name in run.metrics
    if is_noisy and len(x) >= FEWEST_TO_SMOOTH:
        return [
            Curve("each step", x, y, "raw"),
            Curve("train, smoothed", *smooth(x, y), "train"),
        ]
    return [Curve("train", x, y, "train")]


def _counted(curves: list[Curve]) -> str:
    counts = [len(curve.x) for curve in curves if curve.style == "evaluation"]
    return _plural(counts[0], "evaluation") if counts and counts[0] else ""


# ---- the other sections ----


def _plan(run: Run, plan: Any) -> str:
    text = run.start.get("plan")
    if not text and plan is not None:
        text = json.dumps(plan, indent=2)
    if not text:
        return _empty("The run recorded no plan.")
    return f'<pre tabindex="0">{escape(str(text))}</pre>'


def _parameters(table: list[dict[str, Any]]) -> str:
    if not table:
        return _empty("The run recorded no parameter table.")
    total = sum(row.get("bytes") or 0 for row in table)
    most = max(row.get("bytes") or 0 for row in table) or 1
    kinds = len({row.get("kind") for row in table}) > 1
    rows = "".join(_parameter_row(row, total, most, kinds) for row in table)
    kind = "<th>kind</th>" if kinds else ""
    body = (
        '<div class="scroll"><table><thead><tr>'
        f"<th>path</th><th>shape</th><th>dtype</th><th>layout</th>{kind}"
        '<th class="n">size</th><th>share</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    heading = f"{_plural(len(table), 'array')}, {size(total)}"
    unfolded = " open" if len(table) <= OPEN_ROWS else ""
    return f"<details{unfolded}><summary>{heading}</summary>{body}</details>"


def _parameter_row(
    row: dict[str, Any],
    total: int,
    most: int,
    kinds: bool,
) -> str:
    count = row.get("bytes") or 0
    share = count / total if total else 0.0
    width = 100 * count / most
    shape = " \u00d7 ".join(map(str, row.get("shape") or ())) or "scalar"
    kind = f"<td>{_text(row.get('kind'))}</td>" if kinds else ""
    return (
        f"<tr><td><code>{_breakable(row.get('path'))}</code></td>"
        f"<td>{escape(shape)}</td><td>{_text(row.get('dtype'))}</td>"
        f"<td><code>{_text(row.get('spec'))}</code></td>{kind}"
        f'<td class="n">{size(count)}</td><td class="share">'
        f'<s style="width:{width:.1f}%"></s><span>{_percent(share)}</span></td></tr>'
    )


def _hosts(hosts_file: Any, run: Run) -> str:
    """Return the hosts as they were last heard of, and what failed.

    Args:
      hosts_file: the content of hosts.json, which a run that was watched over has.
      run: the run.
    """
    if not isinstance(hosts_file, dict) or not isinstance(
        hosts_file.get("hosts"), dict
    ):
        return ""
    written = hosts_file.get("time") or 0.0
    if run.attempts and written < run.attempts[-1].at:  # of an earlier start
        return ""

    table = stragglers.table(hosts_file["hosts"], hosts_file.get("slowest"))
    failed = "".join(map(_recovery, hosts_file.get("recoveries") or ()))
    if not failed:
        return table
    restarts = hosts_file.get("restarts") or 0
    return f"{table}<p>{restarts} restarts after a failure:</p><ul>{failed}</ul>"


def _recovery(recovery: dict[str, Any]) -> str:
    until = ""
    if recovery.get("seconds_to_stepped") is not None:
        until = f"; {duration(recovery['seconds_to_stepped'])} until the next step"
    return f"<li>{_text(recovery.get('what'))}{until}</li>"


def _pairs_or(pairs: Any, otherwise: str) -> str:
    return _pairs(pairs) if isinstance(pairs, dict) and pairs else _empty(otherwise)


def _pairs(pairs: dict[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, str):
            return value
        return json.dumps(value, ensure_ascii=False, default=str)

    rows = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_text(shown(value))}</dd></div>"
        for key, value in pairs.items()
    )
    return f'<dl class="pairs">{rows}</dl>'


def _versions(start: dict[str, Any]) -> dict[str, Any]:
    names = {
        "lepton-jax": "version",
        "jax": "jax",
        "Python": "python",
        "platform": "platform",
        "device": "device_kind",
        "recipe file": "recipe",
    }
    versions = {
        name: start[key] for name, key in names.items() if start.get(key) is not None
    }
    return versions or {"versions": "not recorded"}


def size(count: float) -> str:
    """Return bytes as text, in powers of 1024: 512 B, 1.95 KiB, 3.2 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            break
        count /= 1024
    return f"{number(count, 3)} {unit}"


def _percent(share: float) -> str:
    return "< 0.1 %" if 0 < share < 0.0005 else f"{100 * share:.1f} %"


def _figure(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else str(value)


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' if count != 1 else ''}"


def _text(value: Any) -> str:
    return "" if value is None else escape(str(value))


def _breakable(path: Any) -> str:
    return _text(path).replace("/", "/<wbr>").replace(".", ".<wbr>")


def _empty(text: str) -> str:
    return f'<p class="empty">{escape(text)}</p>'


def _read(path: Path) -> Any:
    """Return the content of a JSON file next to the events.

    None if there is no such file; a dict that says why if it can't be read.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return {"unreadable": f"{path.name}: {error}"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of a run folder, and print its path.

    Returns:
      the exit code: 2 if there is nothing to report on.
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

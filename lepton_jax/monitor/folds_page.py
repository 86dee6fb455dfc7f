"""The page of a cross validation: the folds side by side, and their learning curves.

It is drawn from `folds.json` and the events of each fold's run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.errors import DataError
from lepton_jax.monitor.chart import Axis, Curve, draw
from lepton_jax.monitor.events import FILE, read_events
from lepton_jax.monitor.page import SCRIPT, STYLE
from lepton_jax.monitor.progress import number
from lepton_jax.monitor.recorded_run import Run, collect
from lepton_jax.monitor.writing import write_page

FOLDS = "folds.json"
MOST_CURVES = 20  # folds that have a curve each; assumption: more can't be told apart


def write_folds_report(folder: Path) -> Path:
    """Write `folder/report.html` of a cross validation, and return its path.

    Raises:
      DataError: folds.json is missing or damaged.
      LeptonError: the page can't be written.
    """
    folder = Path(folder)
    path = folder / FOLDS
    try:
        facts = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"the results of the folds can't be read: {error}",
            where=path,
            remedy="name the folder of a cross validation",
        ) from error
    runs = {}
    for events in sorted(folder.glob(f"fold_*/{FILE}")):
        runs[events.parent.name] = collect(read_events(events))
    return write_page(
        folder / "report.html",
        render(facts, runs, folder.name),
        folder,
    )


def render(facts: Mapping[str, Any], runs: Mapping[str, Run], name: str) -> str:
    """Return the page, as HTML.

    Args:
      facts: the content of folds.json.
      runs: the runs of the folds by their folders' names.
      name: of the folder.
    """
    done = len(facts["results"])
    state = "good" if done == facts["folds"] else "open"
    lines = "".join(f"<p>{escape(line)}</p>" for line in facts["text"].splitlines())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)} · folds</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main>"
        f'<header><h1>{escape(name)}</h1><p class="status"><b class="{state}">'
        f"{done} of {facts['folds']} folds</b></p></header>"
        f"<section><h2>Together</h2>{lines}</section>"
        f"<section><h2>Learning curves</h2>{curves(runs)}</section>"
        f"<section><h2>Each fold</h2>{_table(facts)}</section>"
        f"</main><script>{SCRIPT}</script></body></html>\n"
    )


def curves(runs: Mapping[str, Run]) -> str:
    """Return a figure for each metric, with the evaluations of all folds."""
    names: dict[str, None] = {}
    for run in runs.values():
        for metrics in run.evaluations.values():
            names |= dict.fromkeys(metrics)
    figures = [_figure(name, runs) for name in names]
    if not figures:
        return '<p class="empty">No fold was evaluated yet.</p>'
    return f'<div class="charts">{"".join(figures)}</div>'


def _figure(name: str, runs: Mapping[str, Run]) -> str:
    series = {
        fold: _series(
            run,
            name,
        )
        for fold, run in runs.items()
    }
    known = {fold: one for fold, one in series.items() if len(one[0])}
    lines = [
        Curve(
            fold.replace("_", " "),
            x,
            y,
            "raw",
        )
        for fold, (x, y) in list(known.items())[:MOST_CURVES]
    ]
    mean = _mean(list(known.values()))
    lines.append(Curve("mean of the folds", *mean, "evaluation"))
    last = max(float(x[-1]) for x, _ in known.values())
    return draw(
        name.replace("_", " "),
        lines,
        steps=(0.0, max(1.0, last)),
        axis=Axis(log=name == "loss"),
        note=f"{len(known)} folds, by step",
        wide=name == "loss",
    )


def _series(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = sorted(
        (step, metrics[name])
        for step, metrics in run.evaluations.items()
        if isinstance(metrics.get(name), int | float)
    )
    if not points:
        return np.zeros(0), np.zeros(0)
    x, y = np.array(
        points,
        np.float64,
    ).T
    return x, y


def _mean(series: list[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean over the folds at the evaluations that all of them have."""
    count = min(len(x) for x, _ in series)
    steps = np.mean(
        [x[:count] for x, _ in series],
        axis=0,
    )
    return steps, np.mean(
        [y[:count] for _, y in series],
        axis=0,
    )


def _table(facts: Mapping[str, Any]) -> str:
    results = facts["results"]
    if not results:
        return '<p class="empty">No fold is finished yet.</p>'
    names = list(results[0]["metrics"])
    theirs = [one["name"] for one in results[0]["baselines"]]
    heads = "".join(f'<th class="n">{escape(one)}</th>' for one in [*names, *theirs])
    rows = "".join(
        _row(
            one,
            names,
            len(theirs),
        )
        for one in results
    )
    return (
        '<div class="scroll"><table><thead><tr><th>fold</th><th class="n">test rows'
        f'</th><th class="n">steps</th>{heads}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _row(result: Mapping[str, Any], names: list[str], baselines: int) -> str:
    values = [number(result["metrics"][name]) for name in names]
    for one in result["baselines"][:baselines]:
        shown = [
            f"{part['metric']} {number(part['baseline'][0])}"
            for part in one["compared"]
        ]
        values.append(one["failed"] or ", ".join(shown))
    cells = "".join(f'<td class="n">{escape(str(value))}</td>' for value in values)
    name = f"fold_{result['fold']:02}"
    link = f'<a href="{name}/report.html">{result["fold"]}</a>'
    return (
        f'<tr><td>{link}</td><td class="n">{result["rows"]:,}</td>'
        f'<td class="n">{result["steps"]:,}</td>{cells}</tr>'
    )

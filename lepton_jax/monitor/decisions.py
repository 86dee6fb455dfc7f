"""The journal of the controller in the report: marks on the curves, and a table."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from lepton_jax.monitor.chart import Mark
from lepton_jax.monitor.events import read_events
from lepton_jax.monitor.progress import number

FILE = "controller.jsonl"
ROWS = 240  # of the table, at most
MARKS = 400


def read_decisions(folder: Path) -> list[dict[str, Any]]:
    """What was decided, in the order of the journal; a line that goes on where another
    of the same policy and knob ends is part of it, and lines that a rollback has undone
    have "undone".

    Raises:
      DataError: the journal is damaged.
    """
    if not (folder / FILE).exists():
        return []
    found: list[dict[str, Any]] = []
    latest: dict[tuple, dict[str, Any]] = {}
    for line in read_events(folder, FILE):
        if line["kind"] == "rollback":
            for old in found:
                old["undone"] = old.get("undone", False) or (
                    old["kind"] != "rollback" and old["step"] > line["to"]
                )
            latest = {}
        elif line["kind"] == "start":
            continue
        key = line.get("policy"), line.get("knob")
        before = latest.get(key)
        if (
            before is not None
            and "knob" in line
            and before.get("last", before["step"]) + 1 == line["step"]
        ):
            before |= {name: line[name] for name in ("to", "signals") if name in line}
            before["last"] = line.get("last", line["step"])
            continue
        found.append(dict(line))
        latest[key] = found[-1]
    return found


def marks(decisions: Iterable[dict[str, Any]]) -> list[Mark]:
    """A mark where each decision begins; rollbacks are marked by their events."""
    chosen = [
        d
        for d in decisions
        if d["kind"] != "rollback"
        and d.get("policy") != "schedule"
        and not d.get("undone")
    ]
    kinds = {True: ("live", "a person's request"), False: ("decision", "decision")}
    return [
        Mark(
            d["step"],
            *kinds[d["kind"] == "live"],
            f"{_by(d)}: {_what(d)}",
        )
        for d in chosen[:MARKS]
    ]


def table(decisions: list[dict[str, Any]]) -> str:
    """The table of decisions, as HTML; "" without any."""
    if not decisions:
        return ""
    shown = (
        decisions
        if len(decisions) <= ROWS
        else [*decisions[: ROWS // 2], *decisions[-ROWS // 2 :]]
    )
    left = len(decisions) - len(shown)
    remark = (
        f'<p class="note">{left:,} in the middle are left out; controller.jsonl has'
        " them.</p>"
        if left
        else ""
    )
    lines = "".join(
        f'<tr class="{"bad" if d["kind"] == "rollback" else "undone" if d.get("undone") else ""}">'
        f'<td class="n">{_steps(d)}</td><td'
        f' class="what">{escape(_by(d))}</td><td>{escape(_what(d))}</td>'
        f"<td>{escape(_why(d))}</td></tr>"
        for d in shown
    )
    return (
        f'{remark}<div class="scroll"><table class="events"><thead><tr><th'
        ' class="n">step</th><th>by</th><th>what</th>'
        f"<th>because</th></tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _steps(line: dict[str, Any]) -> str:
    last = line.get("last", line["step"])
    return f"{line['step']:,}" + (f" to {last:,}" if last > line["step"] else "")


def _by(line: dict[str, Any]) -> str:
    return str(line.get("who") or line.get("policy") or "the run")


def _what(line: dict[str, Any]) -> str:
    if line["kind"] == "rollback":
        return f"back to step {line['to']:,}" + (
            f", learning rate times {line['rate']:g}"
            if line.get("rate", 1) != 1
            else ""
        )
    if line["kind"] == "live":
        return " ".join(
            [
                str(line.get("request")),
                *(f"{k}={v:g}" for k, v in line.get("settings", {}).items()),
            ]
        )
    undone = " (undone)" if line.get("undone") else ""
    knob = str(line.get("knob")).replace("_", " ")
    if (
        line.get("from") == 0
        and line.get("to") == 1
        and "contribution" in line
        and line["contribution"] == 1
    ):
        return knob + undone
    # a schedule comes from nowhere
    before = (
        "" if line.get("from") != line.get("from") else f"{number(line.get('from'))} "
    )
    return f"{knob} {before}to {number(line.get('to'))}{undone}"


def _why(line: dict[str, Any]) -> str:
    if line.get("why"):
        return str(line["why"])
    return ", ".join(
        f"{name} {number(value)}" for name, value in (line.get("signals") or {}).items()
    )

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

Decision = dict[str, Any]  # one line of the journal, or several that go on


# Assumptions: more are slow to draw, and nobody looks at them.
MOST_ROWS = 240  # of the table
MOST_MARKS = 400  # on a curve


def read_decisions(folder: Path) -> list[Decision]:
    """Return the decisions, in the order of the journal.

    A line that goes on where another of the same policy and knob ends is part of it:
    its decision has "last". Decisions that a rollback has undone have "undone".

    Raises:
      DataError: the journal is damaged.
    """
    if not (folder / FILE).exists():
        return []

    decisions: list[Decision] = []
    latest: dict[tuple, Decision] = {}  # by policy and knob
    for line in read_events(folder, FILE):
        if line["kind"] == "start":
            continue
        if line["kind"] == "rollback":
            _undo(decisions, line["to"])
            latest = {}

        key = (line.get("policy"), line.get("knob"))
        before = latest.get(key)
        if before is not None and _goes_on(before, line):
            before |= {name: line[name] for name in ("to", "signals") if name in line}
            before["last"] = line.get("last", line["step"])
        else:
            decisions.append(dict(line))
            latest[key] = decisions[-1]
    return decisions


def _undo(decisions: list[Decision], to: int) -> None:
    for decision in decisions:
        is_later = decision["kind"] != "rollback" and decision["step"] > to
        decision["undone"] = decision.get("undone", False) or is_later


def _goes_on(before: Decision, line: Decision) -> bool:
    if "knob" not in line:
        return False
    last: Any = before.get("last", before["step"])
    return last + 1 == line["step"]


def marks(decisions: Iterable[Decision]) -> list[Mark]:
    """Return a mark where each decision begins.

    Rollbacks have none, as their events are marked already.
    """
    marked = [
        decision
        for decision in decisions
        if decision["kind"] != "rollback"
        and decision.get("policy") != "schedule"
        and not decision.get("undone")
    ]
    return [_mark(decision) for decision in marked[:MOST_MARKS]]


def _mark(decision: Decision) -> Mark:
    text = f"{_by(decision)}: {_what(decision)}"
    if decision["kind"] == "live":
        return Mark(decision["step"], "live", "a person's request", text)
    return Mark(decision["step"], "decision", "decision", text)


def table(decisions: list[Decision]) -> str:
    """Return the table of decisions, as HTML; "" without any."""
    if not decisions:
        return ""

    shown = decisions
    remark = ""
    left = len(decisions) - MOST_ROWS
    if left > 0:
        half = MOST_ROWS // 2
        shown = [*decisions[:half], *decisions[-half:]]
        remark = (
            f'<p class="note">{left:,} in the middle are left out; controller.jsonl has'
            " them.</p>"
        )
    return (
        f'{remark}<div class="scroll"><table class="events"><thead><tr>'
        '<th class="n">step</th><th>by</th><th>what</th><th>because</th>'
        f"</tr></thead><tbody>{''.join(map(_row, shown))}</tbody></table></div>"
    )


def _row(decision: Decision) -> str:
    tone = "undone" if decision.get("undone") else ""
    if decision["kind"] == "rollback":
        tone = "bad"
    return (
        f'<tr class="{tone}"><td class="n">{_steps(decision)}</td>'
        f'<td class="what">{escape(_by(decision))}</td>'
        f"<td>{escape(_what(decision))}</td><td>{escape(_why(decision))}</td></tr>"
    )


def _steps(line: Decision) -> str:
    last = line.get("last", line["step"])
    first = f"{line['step']:,}"
    return f"{first} to {last:,}" if last > line["step"] else first


def _by(line: Decision) -> str:
    return str(line.get("who") or line.get("policy") or "the run")


def _what(line: Decision) -> str:
    if "what" in line:
        return f"notices that {line['what']}; {line.get('remedy')}"
    if line["kind"] == "rollback":
        rate = line.get("rate", 1)
        slower = f", learning rate times {rate:g}" if rate != 1 else ""
        return f"back to step {line['to']:,}{slower}"
    if line["kind"] == "live":
        settings = [f"{k}={v:g}" for k, v in line.get("settings", {}).items()]
        return " ".join([str(line.get("request")), *settings])

    undone = " (undone)" if line.get("undone") else ""
    knob = str(line.get("knob")).replace("_", " ")
    before = line.get("from")
    after = line.get("to")
    is_flag = before == 0 and after == 1 and line.get("contribution") == 1
    if is_flag:
        return f"{knob}{undone}"
    # a schedule comes from nowhere: its value before is NaN, which differs from itself
    if before != before:
        return f"{knob} to {number(after)}{undone}"
    return f"{knob} {number(before)} to {number(after)}{undone}"


def _why(line: Decision) -> str:
    if line.get("why"):
        return str(line["why"])
    signals = line.get("signals") or {}
    return ", ".join(f"{name} {number(value)}" for name, value in signals.items())

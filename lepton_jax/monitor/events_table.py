"""The table of a run's events in the report, but for steps and evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from lepton_jax.monitor.events import Event
from lepton_jax.monitor.progress import baseline_lines, described, duration

MOST_SAVES = 60  # in the table; assumption: as many as a person scrolls through
LEFT_OUT = ("steps", "evaluation", "committed")  # the curves and the saves show them

BAD = ("damaged", "diverged", "failed", "rolled back")
OPEN = ("compiled again", "warning", "notice", "skipped", "interrupted")


@dataclass(eq=False)
class Row:
    """One event: its time, its step if it has one, and its words."""

    time: float
    step: int | None
    event: str
    details: str


def events_table(events: list[Event]) -> str:
    """Return the table as HTML, with times since the first event."""
    began = events[0].get("time") or 0.0
    rows = _rows(events, began)
    saves = [row for row in rows if row.event == "save"]
    hidden = set(saves[:-MOST_SAVES])
    remark = ""
    if hidden:
        remark = f'<p class="note">{len(hidden):,} earlier saves are left out.</p>'
    lines = [_row_html(row, began) for row in rows if row not in hidden]
    return (
        f'{remark}<div class="scroll"><table class="events"><thead><tr>'
        '<th class="n">after</th><th class="n">step</th><th>event</th><th>details</th>'
        f"</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _rows(events: list[Event], began: float) -> list[Row]:
    rows: list[Row] = []
    saves: dict[Any, tuple[Row, float]] = {}  # by step: not committed yet
    running = False
    for event in events:
        kind = event["kind"]
        step = event.get("step")
        time = event.get("time") or 0.0
        if kind == "committed" and step in saves:
            row, saved = saves.pop(step)
            row.details += f"; committed {duration(max(0.0, time - saved))} later"
        if kind in LEFT_OUT:
            continue

        words = _WORDS.get(kind, _other)
        name, details = words(event)
        if kind == "start" and (step or running):
            name = "resumed"
        running = running or kind == "start"
        rows.append(Row(time or began, step, name, details))
        if kind == "save":
            saves[step] = (rows[-1], time)
    return rows


def _row_html(row: Row, began: float) -> str:
    after = duration(max(0.0, row.time - began)) if row.time > began else "0 s"
    step = "" if row.step is None else f"{row.step:,}"
    return (
        f'<tr class="{_tone(row.event)}"><td class="n">{after}</td>'
        f'<td class="n">{step}</td><td class="what">{escape(row.event)}</td>'
        f"<td>{escape(row.details)}</td></tr>"
    )


def _tone(event: str) -> str:
    if event in BAD:
        return "bad"
    return "open" if event in OPEN else ""


# ---- the name and the details of each kind of event ----


def _start(event: Event) -> tuple[str, str]:
    return "started", ""


def _compile(event: Event) -> tuple[str, str]:
    details = str(event.get("program") or "")
    if event.get("seconds") is not None:
        details += f" in {duration(event['seconds'])}"
    if event.get("changed"):
        details += f": {event['changed']}"
    again = (event.get("count") or 1) > 1
    return "compiled again" if again else "compiled", details


def _save(event: Event) -> tuple[str, str]:
    if event.get("seconds") is None:
        return "save", "written"
    return "save", f"held the loop for {duration(event['seconds'])}"


def _rollback(event: Event) -> tuple[str, str]:
    return "rolled back", f"to step {event.get('to')}: {event.get('why')}"


def _control(event: Event) -> tuple[str, str]:
    refused = "" if event.get("ok") else ", refused"
    return f"{event.get('do')}{refused}", f"{event.get('text')} ({event.get('who')})"


def _notice(event: Event) -> tuple[str, str]:
    return "notice", f"{event.get('text')} ({event.get('policy')})"


def _budget(event: Event) -> tuple[str, str]:
    steps = f"steps {event.get('begun', 0) + 1:,} to {event.get('end'):,}"
    return "budget", f"{steps}, for {', '.join(event.get('policies') or [])}"


def _damaged(event: Event) -> tuple[str, str]:
    passed_over = "a checkpoint that can't be read was passed over"
    return "damaged", str(event.get("reason") or passed_over)


def _baseline(event: Event) -> tuple[str, str]:
    return "baseline", "; ".join(baseline_lines(event))


def _end(event: Event) -> tuple[str, str]:
    return str(event.get("status") or "ended"), str(event.get("reason") or "")


def _other(event: Event) -> tuple[str, str]:
    fields = {name: value for name, value in event.items() if name != "step"}
    return event["kind"], described(fields)


_WORDS = {
    "start": _start,
    "compile": _compile,
    "save": _save,
    "rollback": _rollback,
    "control": _control,
    "budget": _budget,
    "notice": _notice,
    "damaged": _damaged,
    "baseline": _baseline,
    "end": _end,
}

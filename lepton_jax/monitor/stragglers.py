"""The hosts of a run next to each other, and the one that the others wait for.

The table is text for a terminal, or HTML for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lepton_jax.monitor.progress import duration

Hosts = Mapping[str, Any]  # the rows of hosts.json, by the host's number

HEADS = (
    "host",
    "state",
    "phase",
    "for",
    "step",
    "waits for data",
    "in evaluation",
    "in save",
    "silent",
    "slowest for",
    "memory",
)
FIRST_NUMBER = 3  # the columns from here on hold numbers
NOTE = (
    "In one program every host waits for the slowest, so all take the same time for a"
    " step, and the time in evaluations and saves holds waiting for others too. What"
    " tells hosts apart is time of their own: they wait for data, fall silent, are"
    " behind. A device that computes more slowly than the others can't be seen from"
    " here: profile it."
)


def rows(hosts: Hosts) -> list[tuple[str, ...]]:
    """Return a row for each host, in the order of HEADS.

    Args:
      hosts: as in hosts.json; a cell is empty if its value is not known.
    """
    return [_row(number, host) for number, host in hosts.items()]


def _row(number: str, host: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = host.get("seconds") or {}
    data_wait = _duration(seconds.get("data"))
    if host.get("data_share") is not None:
        data_wait += f" ({100 * host['data_share']:.0f} % lately)"
    memory = []
    if host.get("memory") is not None:
        memory.append(_gibibytes(host["memory"]))
    if host.get("device_memory") is not None:
        memory.append(f"{_gibibytes(host['device_memory'])} on a device")

    return (
        f"{number} {host.get('machine') or ''}".strip(),
        str(host.get("state") or ""),
        str(host.get("phase") or ""),
        _duration(host.get("seconds_in_it")),
        "" if host.get("step") is None else f"{host['step']:,}",
        data_wait,
        _duration(seconds.get("evaluation")),
        _duration(seconds.get("save")),
        _duration(host.get("seconds_silent")),
        _duration(host.get("seconds_slowest") or None),
        ", ".join(memory),
    )


def verdict(slowest: Mapping[str, Any] | None, hosts: Hosts) -> str:
    """Return a sentence that says which host is the slowest, and why.

    It is empty if one host is alone.
    """
    if slowest:
        return f"slowest: host {slowest.get('host')}, {slowest.get('why')}"
    if len(hosts) < 2:
        return ""

    longest = max(
        hosts,
        key=lambda host: hosts[host].get("seconds_slowest") or 0.0,
    )
    seconds = hosts[longest].get("seconds_slowest")
    if not seconds:
        return "no host stands out"
    return f"no host stands out now; host {longest} did for {duration(seconds)}"


def text(
    hosts: Hosts,
    slowest: Mapping[str, Any] | None = None,
) -> str:
    """Return the table for a terminal; empty without hosts."""
    if not hosts:
        return ""

    columns = zip(HEADS, *rows(hosts), strict=True)
    used = [column for column in columns if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = []
    for cells in zip(*used, strict=True):
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join(padded).rstrip())
    sentence = verdict(slowest, hosts)
    if sentence:
        lines.append(sentence)
    return "\n".join(lines)


def table(
    hosts: Hosts,
    slowest: Mapping[str, Any] | None = None,
) -> str:
    """Return the table as HTML; empty without hosts."""
    if not hosts:
        return ""

    head = "".join(
        f'<th class="{"n" if place >= FIRST_NUMBER else ""}">{name}</th>'
        for place, name in enumerate(HEADS)
    )
    slowest_host = str((slowest or {}).get("host"))
    body = "".join(
        _row_html(row, host == slowest_host)
        for host, row in zip(hosts, rows(hosts), strict=True)
    )
    sentence = escape(verdict(slowest, hosts))
    note = ""
    if sentence:
        note = f'<p class="note">{sentence[:1].upper()}{sentence[1:]}. {NOTE}</p>'
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{note}"
    )


def _row_html(row: tuple[str, ...], is_slowest: bool) -> str:
    classes = ["n" if place >= FIRST_NUMBER else "" for place in range(len(row))]
    classes[0] = "what"
    cells = "".join(
        f'<td class="{css_class}">{escape(cell)}</td>'
        for css_class, cell in zip(classes, row, strict=True)
    )
    opening = "<tr class=open>" if is_slowest else "<tr>"
    return f"{opening}{cells}</tr>"


def _gibibytes(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return duration(seconds) if seconds else "0 s"

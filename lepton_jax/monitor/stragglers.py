"""The hosts of a run side by side, and which of them the others wait for: as text, and
for the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from lepton_jax.monitor.progress import duration

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
NOTE = (
    "In one program every host waits for the slowest, so all take the same time for a"
    " step, and the time in evaluations and saves holds waiting for others too. What"
    " tells hosts apart is time of their own: they wait for data, fall silent, are"
    " behind. A device that computes more slowly than the others can't be seen from"
    " here: profile it."
)


def rows(hosts: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row for each host, in the order of HEADS; empty where something is not known.

    Args:
      hosts: as in hosts.json.
    """
    return [_row(host, each) for host, each in hosts.items()]


def _row(host: str, each: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = each.get("seconds") or {}
    share = each.get("data_share")
    data = _duration(seconds.get("data")) + (
        "" if share is None else f" ({100 * share:.0f} % lately)"
    )
    memory = ", ".join(
        f"{each[key] / 2**30:.2f} GiB{of}"
        for key, of in (("memory", ""), ("device_memory", " on a device"))
        if each.get(key) is not None
    )
    return (
        f"{host} {each.get('machine') or ''}".strip(),
        str(each.get("state") or ""),
        str(each.get("phase") or ""),
        _duration(each.get("seconds_in_it")),
        "" if each.get("step") is None else f"{each['step']:,}",
        data,
        _duration(seconds.get("evaluation")),
        _duration(seconds.get("save")),
        _duration(each.get("seconds_silent")),
        _duration(each.get("seconds_slowest") or None),
        memory,
    )


def verdict(slowest: Mapping[str, Any] | None, hosts: Mapping[str, Any]) -> str:
    """Which host is the slowest, and why, in a sentence; empty where one host is
    alone.
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
    return "no host stands out" + (
        f" now; host {longest} did for {duration(seconds)}" if seconds else ""
    )


def text(
    hosts: Mapping[str, Any],
    slowest: Mapping[str, Any] | None = None,
) -> str:
    """The table for a terminal; empty without hosts."""
    if not hosts:
        return ""
    table = [HEADS, *rows(hosts)]
    used = [column for column in zip(*table, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = [
        "  ".join(
            f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in zip(*used, strict=True)
    ]
    return "\n".join([*lines, *filter(None, [verdict(slowest, hosts)])])


def table(
    hosts: Mapping[str, Any],
    slowest: Mapping[str, Any] | None = None,
) -> str:
    """The table as HTML; empty without hosts."""
    if not hosts:
        return ""
    number = (slowest or {}).get("host")
    body = "".join(
        f"<tr{' class=open' if host == str(number) else ''}>"
        + "".join(
            f'<td class="{"what" if place == 0 else "n" if place > 2 else ""}">{escape(cell)}</td>'
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for host, row in zip(hosts, rows(hosts), strict=True)
    )
    head = "".join(
        f'<th class="{"n" if place > 2 else ""}">{name}</th>'
        for place, name in enumerate(HEADS)
    )
    said = escape(verdict(slowest, hosts))
    note = f'<p class="note">{said[:1].upper()}{said[1:]}. {NOTE}</p>' if said else ""
    return (
        "<div"
        f' class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{note}'
    )


def _duration(seconds: float | None) -> str:
    return "" if seconds is None else duration(seconds) if seconds else "0 s"

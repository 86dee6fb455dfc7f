"""The page of the status server: a run's status as one HTML document."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from lepton_jax.monitor import stragglers
from lepton_jax.monitor.page import STYLE
from lepton_jax.monitor.progress import duration, number

Status = Mapping[str, Any]  # as `Watch.status` gives it

RELOAD_SECONDS = 5  # assumption: as often as a person looks at it
COLUMNS = 5  # tiles next to each other at most, so that each keeps its text in one line
# the class that colours a state; every other state is "open"
STATE_CLASSES = {
    "finished": "good",
    "diverged": "bad",
    "failed": "bad",
    "gone": "bad",
}


class Tile(NamedTuple):
    """One figure of the page, with its name above and a remark below."""

    name: str
    figure: str
    remark: str


def status_html(status: Status) -> str:
    """Return a status as a page that needs no other file and reloads itself.

    Args:
      status: as `Watch.status` gives it.
    """
    name = escape(str(status["name"]))
    state = escape(status["state"])
    state_class = STATE_CLASSES.get(status["state"], "open")
    reason = escape(status["reason"] or "")
    folder = escape(status["folder"])
    tiles = _tiles(status)
    columns = min(len(tiles), COLUMNS)
    hosts = stragglers.table(status["hosts"], status["slowest"])
    section = f"<section><h2>Hosts</h2>{hosts}</section>" if hosts else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="refresh" content="{RELOAD_SECONDS}">'
        f"<title>{name}: {state}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{STYLE}</style></head><body><main>"
        f'<header><h1>{name}</h1><p class="status"><b class="{state_class}">{state}</b>'
        f"<span>{reason}</span><span>{folder}</span></p></header>"
        f'<dl class="tiles" style="--columns:{columns}">'
        f"{''.join(map(_tile_html, tiles))}</dl>"
        f"{section}</main></body></html>\n"
    )


def _tiles(status: Status) -> list[Tile]:
    until = status["until"]
    rate = status["steps_per_second"]
    wall_seconds = status["seconds"]["wall"]
    eta = status["eta"]
    return [
        Tile("step", f"{status['step']:,}", f"of {until:,}" if until else ""),
        Tile("loss", _figure(status["loss"]), "of the last step"),
        *_evaluation_tiles(status["evaluation"]),
        Tile(
            "samples per second",
            _figure(status["samples_per_second"]),
            "" if rate is None else f"{number(rate)} steps/s",
        ),
        Tile("waits for data", _percent(status["data_share"]), "of the last minute"),
        Tile("goodput", _percent(status["goodput"]), f"of {duration(wall_seconds)}"),
        *_cost_tiles(status["cost"]),
        Tile("restarts", str(status["restarts"]), f"{status['rollbacks']} rollbacks"),
        Tile(
            "ETA",
            "" if eta is None else duration(eta),
            "if nothing fails",
        ),
    ]


def _evaluation_tiles(evaluation: Mapping[str, Any] | None) -> list[Tile]:
    if not evaluation:
        return []
    remark = f"at step {evaluation['step'] or 0:,}"
    return [
        Tile(f"evaluation {name}", _figure(value), remark)
        for name, value in evaluation["metrics"].items()
    ]


def _cost_tiles(cost: Mapping[str, float] | None) -> list[Tile]:
    if cost is None:
        return []
    return [Tile("cost", f"${cost['so_far']:,.2f}", f"at ${cost['per_hour']:,.2f}/h")]


def _tile_html(tile: Tile) -> str:
    figure = escape(tile.figure) or "-"
    return (
        f"<div><dt>{escape(tile.name)}</dt><dd>{figure}</dd>"
        f"<small>{escape(tile.remark)}</small></div>"
    )


def _figure(value: Any) -> str:
    return number(value) if isinstance(value, int | float) else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"

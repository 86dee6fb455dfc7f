"""What a run has cost so far: goodput, energy and money, as tiles of its report."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lepton_jax.errors import DataError
from lepton_jax.monitor.progress import number
from lepton_jax.monitor.recorded_run import Run
from lepton_jax.monitor.status import status

SECONDS_OF_AN_HOUR = 3600
JOULES_OF_A_KILOJOULE = 1000
LONGEST_REASON = 60  # characters of a tile's remark; assumption: three lines


class Tile(NamedTuple):
    """A key figure, with its name above and a remark below."""

    name: str
    figure: str
    remark: str


def cost_tiles(run: Run, folder: Path | None) -> list[Tile]:
    """Return tiles of goodput, energy and money.

    Args:
      run: its events, put together.
      folder: of the run; None: goodput is left out.
    """
    return [*_goodput(folder), *_energy(run), *_money(run)]


# ---- internals ----


def _goodput(folder: Path | None) -> list[Tile]:
    try:
        share = None if folder is None else status(folder)["goodput"]
    except DataError:
        return []
    if share is None:
        return []
    remark = "of the time since the first start went to steps that count"
    return [Tile("goodput", f"{100 * share:.1f} %", remark)]


def _energy(run: Run) -> list[Tile]:
    """Return a tile of the energy since the last start; none in an older run."""
    told = run.end.get("energy")
    if told is None:
        return []
    joules = told.get("joules")
    if not joules:
        reason = str(told.get("not_measured", ""))
        if len(reason) > LONGEST_REASON:
            reason = f"{reason[:LONGEST_REASON]}..."
        return [Tile("energy", "not measured", reason)]
    total = sum(joules.values())
    remark = f"{', '.join(joules)} of host 0"
    if run.samples:
        remark += f"; {number(total / run.samples)} J a sample"
    return [Tile("energy", f"{number(total / JOULES_OF_A_KILOJOULE)} kJ", remark)]


def _money(run: Run) -> list[Tile]:
    price = run.start.get("price_per_hour")
    if not price:
        return []
    cost = price * run.seconds / SECONDS_OF_AN_HOUR
    return [
        Tile("cost", f"${cost:,.2f}", f"so far, at a list price of ${price:,.2f}/h")
    ]

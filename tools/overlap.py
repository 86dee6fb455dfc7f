"""Count what runs beside products, with XLA's flags and without.

    python tools/overlap.py --out benchmarks/overlap.json

A step of `recipes/lm.py` is planned, compiled for TPUs that are not there until XLA has
scheduled it, and its text is read (`verify.schedule`), collectives and copies to the
host: once with the flags of `planner.xla.flags`, once without.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1]))

import lepton_jax as lepton
from lepton_jax.data import sample, settled
from lepton_jax.errors import PlanError
from lepton_jax.planner import Plan, Trace, trace
from lepton_jax.planner.probe import early
from lepton_jax.train.program import Program
from lepton_jax.verify.probing import devices_of
from lepton_jax.verify.schedule import Scheduled, schedule
from recipes.lm import recipe

GIB = 2**30


class Case(NamedTuple):
    """A model on a topology."""

    topology: str
    size: str
    settings: dict[str, Any]


CASES = (
    Case("v5p:4x4x4", "8b", {}),
    Case("v6e:16x16", "8b", {}),
    Case("v5e:8x8", "1b", {}),
    Case("v5p:4x4x8", "8b", {"experts": 32}),
    Case("v5p:8x8x8", "8b", {"length": 131072, "batch_size": 32}),
    Case("v5p:8x8x8", "70b", {}),
)


def compiled(made: Trace, plan: Plan) -> dict[str, Any]:
    """Return the collectives of a plan's schedule, and XLA's peak."""
    devices = devices_of(plan, lepton.topology(plan.topology))
    program = Program(made, replace(plan, steps_per_call=1), devices)
    flat = list(getattr(devices, "flat", devices))
    placed = early.placed(program.lower(), flat)
    kinds = schedule(placed.text)
    return {
        "kinds": [asdict(kind) for kind in kinds],
        "bytes": sum(kind.bytes for kind in kinds),
        "bytes_beside": sum(kind.bytes_beside for kind in kinds),
        "temporaries": placed.memory.temporaries,
    }


def measured(case: Case) -> dict[str, Any]:
    """Return both schedules of a case."""
    made = _traced(recipe(size=case.size, **case.settings))
    row: dict[str, Any] = {**case._asdict()}
    for name, flags in (("with", None), ("without", {})):
        plan = lepton.plan(made, lepton.topology(case.topology), flags=flags)
        row["plan"] = plan.name
        try:
            row[name] = compiled(made, plan)
        except PlanError as error:
            row[name] = {"error": error.what}
            print(f"{case.topology} {case.size} {name}: {error.what}", flush=True)
            continue
        print(f"{case.topology} {case.size} {name} flags: {_spelled(row[name])}")
    return row


def _traced(asked: lepton.Recipe) -> Trace:
    data = settled(asked.train)
    return trace(asked, *sample(data))


def _spelled(found: dict[str, Any]) -> str:
    """Return the figures of a schedule as a line."""
    parts = []
    for kind in (Scheduled(**kind) for kind in found["kinds"]):
        share = f"{kind.bytes_beside / GIB:.1f} of {kind.bytes / GIB:.1f} GiB"
        parts.append(f"{kind.kind} {share}, {kind.beside} of {kind.count}")
    return "; ".join(parts)


def main() -> None:
    """Compile each case, print it and write all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a part of a topology's name")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for case in CASES:
        if options.only is None or options.only in case.topology:
            rows.append(measured(case))
    if options.out is not None:
        record = {"libtpu": version("libtpu"), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Put every form of a step through every event: python -m tools.faults.matrix.

Forms are those of `forms.py`, events those of `cells.py`. Cells that are done are not
repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError, SettingError, nearest
from tools.faults import cells
from tools.faults.forms import FORMS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
      0 if every cell is as it should be, 1 if not, 2 for a mistake of the user's.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(arguments)
        _check("--form", options.form, FORMS)
        _check("--event", options.event, cells.CELLS)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    rows = matrix(options)
    kept = sum(row["kept"] for row in rows)
    left = len(options.form) * len(options.event) - len(rows)
    print(f"{kept} of {len(rows)} as they should be, {left} not run")
    if options.json is not None:
        # some of the benchmarks ask JAX for its devices when they are imported
        from tools.bench.cli import surroundings

        record = {
            **surroundings([]),
            "command": f"python -m tools.faults.matrix {' '.join(arguments)}",
            "kept": kept,
            "not_run": left,
            "cells": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if kept == len(rows) else 1


def matrix(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the cells that are not done yet, and print a line for each."""
    options.folder.mkdir(parents=True, exist_ok=True)
    results = options.folder / "matrix.jsonl"
    done = {}
    if results.exists():
        for row in map(json.loads, results.read_text().splitlines()):
            done[row["form"], row["event"]] = row

    until = time.monotonic() + 60 * options.minutes
    asked = [(form, event) for event in options.event for form in options.form]
    for form, event in asked:
        if (form, event) not in done and time.monotonic() < until:
            row = _cell(form, event, options.folder / form)
            done[form, event] = row
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return [done[cell] for cell in asked if cell in done]


# ---- internals ----


def _cell(form: str, event: str, folder: Path) -> dict[str, Any]:
    began = time.monotonic()
    own = folder / event.replace(",", "").replace(" ", "-")
    shutil.rmtree(own, ignore_errors=True)
    try:
        outcome = cells.CELLS[event](form, own)
    except LeptonError as error:
        outcome = cells.Outcome(False, None, 0.0, str(error))
    row = {"form": form, "event": event, **dataclasses.asdict(outcome)}
    row["seconds"] = round(time.monotonic() - began, 1)

    apart = "" if outcome.apart is None else f"{outcome.apart:.2g} apart"
    verdict = "as it should be" if outcome.kept else f"WRONG: {outcome.wrong}"
    print(f"{form:12} {event:24} {apart:16} {verdict}", flush=True)
    if outcome.kept:
        shutil.rmtree(own, ignore_errors=True)
    return row


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.faults.matrix",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    forms = list(FORMS)
    events = list(cells.CELLS)
    add("--form", nargs="+", metavar="FORM", default=forms, help=", ".join(forms))
    add("--event", nargs="+", metavar="EVENT", default=events, help=", ".join(events))
    add(
        "--minutes",
        type=float,
        metavar="N",
        default=math.inf,
        help="begin no cell after this many; the next call does (default: all)",
    )
    add(
        "--folder",
        type=Path,
        metavar="DIR",
        default=Path(tempfile.gettempdir()) / "lepton-forms",
        help="for the runs (default: %(default)s)",
    )
    add(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write results, machine and versions to FILE",
    )
    return parser


def _check(option: str, names: list[str], known: Any) -> None:
    """Raise a SettingError for a name that is not known."""
    for name in names:
        if name not in known:
            raise SettingError(
                f"{name!r} is not known{nearest(name, known)}",
                where=option,
                remedy=f"use some of {', '.join(known)}",
            )


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", cells.DEVICES)
    sys.exit(main())

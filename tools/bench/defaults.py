"""What each recipe reaches without arguments, in what time, next to cheap methods.

`tools.bench defaults [RECIPE ...]`. Each recipe is started by `tools/launch.py` in a
process of its own, as a newcomer would. The figures are what its run wrote down: the
last evaluation, and the comparisons with the baselines.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError
from lepton_jax.monitor.events import read_events
from tools.bench import options as checks

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "recipes"
MOST_SECONDS = 90.0  # that a default may take on two quiet cores; a promise of README
PATIENCE = 10  # times that, before a run counts as hanging; assumption: a busy machine
WIDTH = 16  # of the table's first column


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `defaults` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "defaults",
        __doc__,
        "what each recipe reaches without arguments",
    )
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help=f"of {', '.join(names())} (default: all)",
    )
    parser.set_defaults(run=run)


def names() -> list[str]:
    """Return the names of all recipes."""
    files = sorted(FOLDER.glob("*.py"))
    return [file.stem for file in files if not file.stem.startswith("_")]


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the recipes asked for, and print a line for each.

    Raises:
      SettingError: there is no such recipe.
      LeptonError: a recipe failed.
    """
    checks.check_names(options.recipes, names(), "RECIPE", "recipe")
    results = []
    for name in options.recipes or names():
        result = measure(name)
        print(line_of(result), flush=True)
        results.append(result)
    return results


def measure(name: str) -> dict[str, Any]:
    """Run a recipe in a process of its own, and return what it reached.

    Raises:
      LeptonError: it failed.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        began = time.perf_counter()
        file = FOLDER / f"{name}.py"
        done = subprocess.run(
            [sys.executable, "tools/launch.py", file, "--run-dir", folder],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE * MOST_SECONDS,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise LeptonError(
                f"it ended with exit code {done.returncode}: {done.stderr[-400:]}",
                where=f"recipes/{name}.py",
                remedy="run it by itself",
            )
        events = read_events(folder)
    return {"recipe": name, "seconds": round(seconds, 1), **figures(events)}


def figures(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last evaluation of a run, and what its baselines reached."""
    evaluations = [event for event in events if event["kind"] == "evaluation"]
    last = evaluations[-1] if evaluations else {}
    return {
        "values": dict(last.get("metrics") or {}),
        "baselines": [
            compared_of(event)
            for event in events
            if event["kind"] == "baseline" and not event["failed"]
        ],
    }


def compared_of(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return a baseline's first metric beside the network's."""
    first = event["compared"][0]
    network = first["network"]
    return {
        "name": event["name"],
        "metric": first["metric"],
        "network": None if network is None else network[0],
        "baseline": first["baseline"][0],
        "verdict": first["verdict"],
    }


def line_of(result: Mapping[str, Any]) -> str:
    """Return a recipe's figures as a line of the table."""
    values = [f"{name} {value:.4g}" for name, value in result["values"].items()]
    theirs = [
        f"{one['name']}: {one['metric']} {one['baseline']:.4g} ({one['verdict']})"
        for one in result["baselines"]
    ]
    return (
        f"{result['recipe']:{WIDTH}}  {result['seconds']:6.1f} s"
        f"  {', '.join(values)} | {'; '.join(theirs)}"
    )

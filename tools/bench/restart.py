"""How soon a run that was stopped trains again.

`tools.bench restart`. The quickstart (`recipes/digits_cnn.py`) is stopped again and
again, and a new process, or several, go on with it. Measured are the seconds from the
start of the command to the first event that reports a new step, which is a little later
than the step; and how many of the programs that the run needs had to be compiled on how
many hosts, since they were not in the run folder's cache.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lepton_jax.errors import LeptonError
from lepton_jax.monitor import read_events
from tools.bench import options as checks

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.05  # seconds between two looks at the events
PATIENCE = 300  # seconds in which a run must have stopped
# The first start compiles for a new run, the second one what only a resumed run needs.
NOT_COUNTED = 2
CASES = {"one host": (), "4 hosts": ("--hosts", "local:4", "--devices", "2")}


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `restart` to the subcommands."""
    parser = checks.add_command(
        commands, shared, "restart", __doc__, "how soon a stopped run trains again"
    )
    checks.add_timing(parser, rounds=5)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both cases, and print a line for each.

    Raises:
      SettingError: no rounds.
      LeptonError: a run fails.
    """
    checks.check_positive(options, "rounds")
    print(f"{'case':10}  {'median s':>9}  {'worst s':>9}  compiled anew", flush=True)
    results = []
    for case, arguments in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            row = _measure(Path(folder) / "run", arguments, options.rounds)
        results.append({"case": case, **row})
        print(
            f"{case:10}  {row['median']:9.2f}  {row['worst']:9.2f}  {row['compiled']}"
            f" of {row['programs']} programs",
            flush=True,
        )
    return results


def _measure(
    folder: Path,
    arguments: tuple[str, ...],
    rounds: int,
) -> dict[str, Any]:
    seconds = []
    cached: list[bool] = []
    for number in range(NOT_COUNTED + rounds):
        began = time.time()
        events = _start_and_stop(folder, arguments, began)
        if number < NOT_COUNTED:
            continue
        first = next(event for event in events if event["kind"] == "steps")
        seconds.append(first["time"] - began)
        for event in events:
            cached += event["cached"] if event["kind"] == "compile" else []
    return {
        "median": statistics.median(seconds),
        "worst": max(seconds),
        "seconds": seconds,
        "programs": len(cached),
        "compiled": cached.count(False),
    }


def _start_and_stop(
    folder: Path, arguments: tuple[str, ...], began: float
) -> list[dict[str, Any]]:
    """Go on with the run until it has trained a step; return its events so far."""
    dropped = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    command = [
        sys.executable,
        str(ROOT / "tools" / "launch.py"),
        str(ROOT / "recipes" / "digits_cnn.py"),
        "--epochs",
        "200",
        "--run-dir",
        str(folder),
        "--go-on",
        *arguments,
    ]
    with subprocess.Popen(
        command,
        env={k: v for k, v in os.environ.items() if k not in dropped},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        events = _until(folder, "steps", began, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    return events


def _until(
    folder: Path, kind: str, began: float, process: subprocess.Popen
) -> list[dict[str, Any]]:
    """Wait for an event of a kind; return all events since `began`."""
    while True:
        events = read_events(folder) if (folder / "events.jsonl").exists() else []
        events = [event for event in events if event["time"] >= began]
        if any(event["kind"] == kind for event in events):
            return events
        if process.poll() is not None:
            raise LeptonError(
                f"the run ends with exit code {process.returncode}",
                where="restart",
                remedy=f"see what it says: {process.communicate()[1].strip()[-300:]}",
            )
        time.sleep(POLL)

"""`tools.bench restart`: how soon a run that was stopped trains again.

The quickstart (`recipes/digits_cnn.py`) is stopped again and again, and gone on with by
a new process, or by several. Counted are the seconds from the start of the command to
the first event that reports a new step, which is a little later than the step; and on
how many hosts each program that the run needs had to be compiled, as it was not in the
run folder's cache.
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

from lepton_jax.errors import LeptonError, SettingError
from lepton_jax.monitor import read_events

ROOT = Path(__file__).resolve().parents[2]
CASES = {"one host": (), "4 hosts": ("--hosts", "local:4", "--devices", "2")}


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `restart` to the subcommands."""
    parser = commands.add_parser(
        "restart",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help="how soon a stopped run trains again",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="restarts a case (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure both cases, and print a line for each.

    Raises:
      SettingError: no rounds.
      LeptonError: a run fails.
    """
    if options.rounds < 1:
        raise SettingError(
            "there is nothing to measure",
            where="--rounds",
            remedy="give a number from 1",
        )
    print(f"{'case':10}  {'median s':>9}  {'worst s':>9}  compiled anew", flush=True)
    results = []
    for case, arguments in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            results.append(
                {
                    "case": case,
                    **_measure(Path(folder) / "run", arguments, options.rounds),
                }
            )
        row = results[-1]
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
    environment = {
        k: v
        for k, v in os.environ.items()
        if k not in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    }
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
    seconds = []
    cached = []
    # the first one compiles for a new run, the second one what only a resumed one needs
    for number in range(rounds + 2):
        began = time.time()
        quiet = {
            "stdout": subprocess.DEVNULL,
            "stderr": subprocess.PIPE,
            "text": True,
        }
        with subprocess.Popen(command, env=environment, **quiet) as process:
            events = _until(folder, "steps", began, process)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=300)
        if number > 1:
            seconds.append(
                next(event["time"] for event in events if event["kind"] == "steps")
                - began
            )
            cached += [
                hit
                for event in events
                if event["kind"] == "compile"
                for hit in event["cached"]
            ]
    return {
        "median": statistics.median(seconds),
        "worst": max(seconds),
        "seconds": seconds,
        "programs": len(cached),
        "compiled": cached.count(False),
    }


def _until(
    folder: Path,
    kind: str,
    began: float,
    process: subprocess.Popen,
) -> list[dict[str, Any]]:
    """The events since then, once there is one of that kind."""
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
        time.sleep(0.05)

"""What a run left behind when it was over, as a trial looks at it."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.errors import LeptonError
from lepton_jax.monitor import read_events, read_samples
from tools.faults.kinds import STEPS


@dataclass
class Ending:
    """Remains of a run that has ended.

    Attributes:
      at: the Unix time at which it was over.
      codes: exit codes, host 0's first; None if it was not over within its bound.
      checksums: of each array in the final checkpoint; empty if there is none.
      samples: which samples each step consumed.
      losses: of the steps 1 to `STEPS`; NaN where none was recorded.
      log: all that its processes wrote.
      left: processes of it that are still there.
      recoveries: the faults that its supervisors noticed, and what came after each.
    """

    at: float
    codes: list[int] | None
    checksums: dict[str, int]
    samples: list[Any]
    losses: list[float]
    log: str
    left: list[int]
    recoveries: list[Any]


def look(
    folder: Path,
    codes: list[int] | None,
) -> Ending:
    """Return how the run in a trial's folder ended."""
    run = folder / "run"
    at = time.time()
    samples = []
    with contextlib.suppress(OSError):
        samples = read_samples(run)
    return Ending(
        at=at,
        codes=codes,
        checksums=_checksums(run),
        samples=samples,
        losses=_losses(run),
        log=(folder / "log.txt").read_text(errors="replace"),
        left=processes_with(str(run)),
        recoveries=_recoveries(run),
    )


def processes_with(text: str) -> list[int]:
    """Return the processes, except this one, whose command line holds a text."""
    pids = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit() or int(path.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):  # it has ended by now
            if text.encode() in (path / "cmdline").read_bytes():
                pids.append(int(path.name))
    return pids


def _checksums(run: Path) -> dict[str, int]:
    checkpoints = Checkpoints(run / "checkpoints")
    if STEPS not in checkpoints.steps():
        return {}
    checksums = checkpoints._record(STEPS)[1]
    checkpoints.close()
    return checksums


def _losses(run: Path) -> list[float]:
    by_step: dict[int, float] = {}
    with contextlib.suppress(LeptonError, OSError):
        for event in read_events(run):
            if event["kind"] == "steps":
                steps = range(event["first"], event["last"] + 1)
                by_step |= zip(steps, event["records"]["loss"], strict=True)
    return [by_step.get(step, float("nan")) for step in range(1, STEPS + 1)]


def _recoveries(run: Path) -> list[Any]:
    record = run / "hosts.json"
    return json.loads(record.read_text())["recoveries"] if record.exists() else []

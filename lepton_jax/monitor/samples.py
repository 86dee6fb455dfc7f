"""The samples that each step was made of: one JSON line a step, in `samples.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lepton_jax.monitor.events import Lines, encode

FILE = "samples.jsonl"


class SampleTrace:
    """A writer of lines {"step": s, "samples": [identifiers]}.

    There is a line for each step that the run's state has seen: those of steps that a
    resumed or rolled back run has forgotten are taken away.

    Args:
      folder: of the run.
    """

    def __init__(self, folder: Path):
        self._lines = Lines(Path(folder) / FILE)

    def back(self, step: int) -> None:
        """Go back to after a step."""
        steps = [line["step"] for line in _read(self._lines.path)]
        self._lines.cut(sum(done <= step for done in steps))

    def add(
        self,
        step: int,
        names: list[str],
    ) -> None:
        """Write the identifiers of a step's samples."""
        self._lines.append(encode({"step": step, "samples": names}))

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


def read_samples(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of a run, in the order of their steps."""
    return _read(Path(folder) / FILE)


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]

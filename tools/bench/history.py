"""Lines that a judged run appends to its history, a file of JSON lines."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax

ROOT = Path(__file__).resolve().parents[2]


def append(file: Path, figures: Mapping[str, Any]) -> None:
    """Append a line: date, commit, figures, versions and the command that was called.

    Args:
      file: its path from the root of the repository.
      figures: aggregates only.
    """
    line = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "figures": dict(figures),
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "command": ["python", "-m", "tools.bench", *_plain_arguments()],
    }
    with (ROOT / file).open("a") as stream:
        stream.write(json.dumps(line) + "\n")


def _commit() -> str:
    """Return the commit, with a plus where the working tree differs from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    return f"{commit}+" if git("status", "--porcelain", "--", "*.py") else commit


def _plain_arguments() -> list[str]:
    """Return the arguments without folders of this machine."""
    return [Path(x).name if "/" in x else x for x in sys.argv[1:]]

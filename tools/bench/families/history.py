"""The history of judged runs: a line of JSON each."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
MEMORY = FOLDER / "judged-memory.jsonl"
TIME = FOLDER / "judged-time.jsonl"
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")


def of_apart(family: str) -> Path:
    """Return the history of the memory of a family that is judged apart."""
    return MEMORY.with_stem(f"{MEMORY.stem}-{family}")


def append(
    file: Path,
    figures: Mapping[str, Any],
    arguments: Sequence[str],
) -> None:
    """Append a judged run to its history.

    Args:
      file: the history, one of this module's.
      figures: aggregate ones alone.
      arguments: of the command line that measured them.
    """
    # without folders of this machine
    plain = [Path(x).name if "/" in x else x for x in arguments]
    entry = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "figures": dict(figures),
        "versions": versions(),
        "command": f"python -m tools.bench {shlex.join(plain)}",
    }
    with file.open("a") as lines:
        lines.write(json.dumps(entry) + "\n")


def commit() -> str:
    """Return the commit that is checked out, with "+" if files differ from it."""
    head = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return head + "+" * bool(changed)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide the figures."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments],
        cwd=FOLDER,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown" * (done.returncode != 0)

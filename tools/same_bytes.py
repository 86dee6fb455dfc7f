"""Prepare a specification in many ways, and compare every byte of what comes out.

    python -m tools.same_bytes [SPEC.py] [--kills 10] [--ray]

The ways are 1, 2 and 5 workers; a run that is killed (SIGKILL) at a random moment and
started again, as often as --kills says; and, with --ray, a Ray cluster of two nodes on
this machine. Without a specification, a table with texts, missing cells and repeated
rows is generated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError
from tools.bench.cli import surroundings

ROOT = Path(__file__).resolve().parents[1]
WORKERS = (1, 2, 5)
KILLS = 10
SEED = 0
ROWS = 60_000
POLL = 0.01  # seconds between two looks at a folder
PATIENCE = 600  # seconds in which a run must have ended
NODES = 2
# Steps of each kind: with a state and without, of the training split and of all rows.
SPECIFICATION = """
from pathlib import Path

from lepton_jax.data.prepare import (
    CleanText, Duplicates, FillMissing, Preparation, Split, Standardize, Vocabulary,
)


def preparation(table: Path = Path("table.csv")) -> Preparation:
    return Preparation(
        sources={"table": table},
        steps=[
            CleanText(["text"], noted=False),
            Split(test=0.2, seed=1),
            FillMissing("amount", by="median"),
            Standardize(["amount"]),
            Vocabulary("kind"),
            Duplicates(["text"]),
        ],
        target="label",
        piece_bytes=100_000,
    )
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if all bytes are the same, else 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parser().parse_args(words)
        # a way of the campaign works in a folder of its own
        record_at = options.json and options.json.resolve()
        with tempfile.TemporaryDirectory() as folder:
            rows = campaign(options, Path(folder))
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_same = all(row["same"] for row in rows)
    print("all the same" if is_same else "NOT the same")
    if record_at is not None:
        command = f"python -m tools.same_bytes {' '.join(words)}"
        record = {**surroundings([]), "command": command, "results": rows}
        text = json.dumps(record, indent=1)
        record_at.write_text(f"{text}\n")
    return 0 if is_same else 1


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.same_bytes", description=__doc__)
    add = parser.add_argument
    add("specification", nargs="?", type=Path, metavar="SPEC.py")
    add("--kills", type=int, default=KILLS, metavar="N")
    add("--seed", type=int, default=SEED, metavar="N")
    add("--rows", type=int, default=ROWS, metavar="N")
    add("--ray", action="store_true", help="also on a Ray cluster of two nodes")
    add("--json", type=Path, metavar="FILE")
    return parser


def campaign(
    options: argparse.Namespace,
    folder: Path,
) -> list[dict[str, Any]]:
    """Prepare in all ways; return a row for each."""
    specification = options.specification or _generated(folder, options.rows)
    rows = []
    expected: dict[str, str] | None = None
    seconds = 0.0
    for workers in WORKERS:
        out = folder / f"workers-{workers}"
        process = _start(specification, out, "--workers", str(workers))
        _await_work(process, out)
        began = time.monotonic()
        _finish(process)
        seconds = time.monotonic() - began
        expected = expected or files_of(out)
        rows.append(_row(f"{workers} workers", out, expected))
    assert expected is not None

    out = folder / "killed"
    moments = kill(
        specification,
        out,
        options.kills,
        options.seed,
        seconds,
    )
    _finish(_start(specification, out))
    rows.append(
        {**_row("killed", out, expected), "killed_after": moments},
    )
    if options.ray:
        out = folder / "ray"
        nodes = _on_cluster(specification, out)
        rows.append(
            {**_row("ray", out, expected), "nodes": nodes},
        )
    return rows


def _row(
    way: str,
    out: Path,
    expected: dict[str, str],
) -> dict[str, Any]:
    files = files_of(out)
    row = {
        "way": way,
        "same": files == expected,
        "files": len(
            files,
        ),
    }
    print(row, flush=True)
    return row


def files_of(folder: Path) -> dict[str, str]:
    """Return the checksums of all files that a preparation has written for others."""
    return {
        str(
            path.relative_to(folder),
        ): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "work" not in path.parts
    }


# ---- killing ----


def kill(
    specification: Path,
    out: Path,
    kills: int,
    seed: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Start a run and kill it, some times, each at a random moment of its work.

    Args:
      specification: of the preparation.
      out: the folder of all runs.
      kills: how often.
      seed: of the moments.
      seconds: that the work of a whole run takes.

    Returns:
      Of each kill the seconds of work before it, how many files there were, and whether
      a run was through before.
    """
    chance = random.Random(seed)
    moments = []
    for _ in range(kills):
        process = _start(specification, out)
        _await_work(process, out)
        # what is done is not done again, so that later runs are shorter
        moment = chance.uniform(0, seconds / kills)
        time.sleep(moment)
        process.kill()
        process.communicate()
        files = sum(path.is_file() for path in out.rglob("*"))
        is_whole = (out / "manifest.json").exists()
        moments.append({"seconds": moment, "files": files, "whole": is_whole})
    return moments


def _await_work(process: subprocess.Popen, out: Path) -> None:
    """Wait until a run has its folder, after the imports.

    Raises:
      LeptonError: it fails before.
    """
    lock = out / "work" / "lock"
    before = lock.stat().st_mtime_ns if lock.exists() else 0
    while not lock.exists() or lock.stat().st_mtime_ns == before:
        if process.poll() is not None:
            raise _failed(process)
        time.sleep(POLL)


def _start(
    specification: Path,
    out: Path,
    *more: str,
) -> subprocess.Popen:
    command = [
        sys.executable,
        str(
            ROOT / "tools" / "prepare.py",
        ),
        str(specification),
    ]
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        cwd=specification.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _finish(process: subprocess.Popen) -> None:
    """Wait for the end of a run.

    Raises:
      LeptonError: it fails.
    """
    _, process.errors = process.communicate(timeout=PATIENCE)  # type: ignore
    if process.returncode:
        raise _failed(process)


def _failed(process: subprocess.Popen) -> LeptonError:
    said = (
        getattr(
            process,
            "errors",
            None,
        )
        or process.communicate()[1]
    )
    return LeptonError(
        f"a run ends with exit code {process.returncode}",
        where="same_bytes",
        remedy=f"see what it says: {said.strip()[-500:]}",
    )


# ---- a cluster ----


def _on_cluster(specification: Path, out: Path) -> int:
    """Prepare on a cluster of two nodes; return how many of them worked."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    from ray.cluster_utils import Cluster

    from lepton_jax.cli import settings
    from lepton_jax.data.prepare import prepare, run
    from lepton_jax.data.prepare.engines.ray_data import RayData

    os.chdir(specification.parent)
    preparation = settings.load(specification, "preparation")()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    engines: list[RayData] = []

    def watched(
        address: str | None,
        workers: int | None,
    ) -> RayData:
        engines.append(RayData(address, workers))
        return engines[-1]

    try:
        for _ in range(NODES - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        run.RayData = watched  # type: ignore
        prepare(preparation, out, engine="ray", address=cluster.address)
    finally:
        run.RayData = RayData  # type: ignore
        cluster.shutdown()
    return len(engines[0].nodes)


# ---- the table ----


def _generated(folder: Path, rows: int) -> Path:
    """Write a table and its specification; return the specification."""
    chance = random.Random(SEED)
    with (folder / "table.csv").open("w") as file:
        file.write("text,amount,kind,label\n")
        for row in range(rows):
            number = row if row % 20 else chance.randrange(row + 1)
            text = f" text   number {number}, with a comma"
            amount = "" if row % 13 == 5 else f"{chance.gauss(0, 10):.4f}"
            kind = f"kind {chance.randrange(50)}"
            file.write(f'"{text}",{amount},{kind},{row % 2}\n')
    specification = folder / "specification.py"
    specification.write_text(SPECIFICATION)
    return specification


if __name__ == "__main__":
    sys.exit(main())

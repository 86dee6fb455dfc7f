"""Predict many rows while things die, and check that every row comes out once.

    python -m tools.every_row [--kills 10] [--ray] [--json FILE]

The ways are `lepton predict` in one process; the same, killed (SIGKILL) at random
moments and started again; and, with --ray, on a Ray cluster of two nodes on this
machine, one of which is killed (SIGKILL of its raylet) in the middle of the work, while
the command goes on. What comes out is compared with the first way, file by file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax
import polars as pl

import lepton_jax as lepton
from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError
from tools.bench.cli import surroundings

ROOT = Path(__file__).resolve().parents[1]
ROWS = 200_000
FILES = 4
PIECE = "20KB"  # some 200 shards, so that a kill falls between some of them
KILLS = 10
SEED = 0
POLL = 0.01  # seconds between two looks at a folder
PATIENCE = 300  # seconds in which a run must have ended
# Share of the shards that are there when the node is killed.
MIDDLE = 0.3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if every row came out once, else 1."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(words)
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = campaign(options, Path(folder))
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    is_right = all(row["once"] and row["same"] for row in results)
    print("every row once" if is_right else "NOT every row once")
    if options.json is not None:
        command = f"python -m tools.every_row {' '.join(words)}"
        record = {**surroundings([]), "command": command, "results": results}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if is_right else 1


def _parser() -> Parser:
    parser = Parser(prog="python -m tools.every_row", description=__doc__)
    add = parser.add_argument
    add("--rows", type=int, default=ROWS, metavar="N")
    add("--kills", type=int, default=KILLS, metavar="N")
    add("--seed", type=int, default=SEED, metavar="N")
    add("--ray", action="store_true", help="also on a Ray cluster of two nodes")
    add("--json", type=Path, metavar="FILE")
    return parser


def campaign(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Predict in all ways; return a row for each."""
    work = Work(folder, options.rows)
    began = time.monotonic()
    work.finish(work.start("whole"))
    seconds = time.monotonic() - began
    expected = files_of(folder / "whole")
    results = [work.judged("one process", "whole", expected, seconds=seconds)]

    chance = random.Random(options.seed)
    kills = [
        work.kill("killed", chance.uniform(0, 1 / (options.kills + 1)), len(expected))
        for _ in range(options.kills)
    ]
    work.finish(work.start("killed"))
    results.append(
        work.judged("one process, killed", "killed", expected, parts_at_kills=kills)
    )
    if options.ray:
        found = on_cluster(work, len(expected))
        results.append(
            work.judged("two nodes, one killed", "cluster", expected, **found)
        )
    return results


class Work:
    """An artifact, files of rows, and runs of `lepton predict` on them.

    Args:
      folder: for all of it.
      rows: of the files.
    """

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder = folder
        self.rows = rows
        self.artifact = folder / "model.lepton"
        self.data = folder / "rows"
        save_trained(self.artifact)
        self._write()

    def start(self, out: str, *more: str) -> subprocess.Popen:
        """Start a run that writes to a folder."""
        command = [sys.executable, "-m", "lepton_jax", "predict", str(self.artifact)]
        words = ["--data", str(self.data), "--out", str(self.folder / out)]
        return subprocess.Popen(
            [*command, *words, "--piece", PIECE, "--keep", "id", *more],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen) -> None:
        """Wait for the end of a run.

        Raises:
          LeptonError: it fails.
        """
        _, errors = process.communicate(timeout=PATIENCE)
        if process.returncode:
            raise LeptonError(
                f"a run ends with exit code {process.returncode}",
                where="every_row",
                remedy=f"see what it says: {errors.strip()[-800:]}",
            )

    def parts(self, out: str) -> int:
        """Return how many shards there are."""
        return len(list((self.folder / out).glob("part-*.parquet")))

    def kill(self, out: str, share: float, whole: int) -> int:
        """Start a run and kill it when it has made a share of the shards.

        Returns:
          The shards that there are then.
        """
        process = self.start(out)
        goal = self.parts(out) + share * whole
        while self.parts(out) < goal and process.poll() is None:
            time.sleep(POLL)
        process.kill()
        process.communicate()
        return self.parts(out)

    def judged(
        self,
        way: str,
        out: str,
        expected: dict[str, str],
        **more: Any,
    ) -> dict[str, Any]:
        """Return whether every row is there once, and as the first way has it."""
        table = pl.read_parquet(self.folder / out / "part-*.parquet")
        once = sorted(table["id"].to_list()) == list(range(self.rows))
        places = table.select("file", "row")
        row = {
            "way": way,
            "rows": table.height,
            "once": once and places.n_unique() == table.height,
            "same": files_of(self.folder / out) == expected,
            "parts": len(expected),
            **more,
        }
        print(json.dumps(row), flush=True)
        return row

    def _write(self) -> None:
        chance = np.random.default_rng(SEED)
        self.data.mkdir()
        table = pl.DataFrame(
            {"id": np.arange(self.rows)}
            | {f"x{k}": chance.normal(size=self.rows).round(4) for k in range(4)}
        )
        size = -(-self.rows // FILES)
        for number, part in enumerate(table.iter_slices(size)):
            part.write_csv(self.data / f"rows-{number}.csv")


def files_of(folder: Path) -> dict[str, str]:
    """Return the checksums of the shards."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("part-*.parquet"))
    }


def save_trained(place: Path) -> None:
    """Train a small model of four columns, and save its artifact."""
    from lepton_jax.data.prepare import Preparation, Serving, prepare
    from lepton_jax.data.prepare.steps.categories import Classes
    from lepton_jax.data.prepare.steps.model_inputs import AsFloats
    from lepton_jax.data.prepare.steps.splitting import Split
    from lepton_jax.data.readers import reader_of

    chance = np.random.default_rng(SEED)
    table = pl.DataFrame({f"x{k}": chance.normal(size=500) for k in range(4)})
    sign = (
        pl.when(pl.col("x0") > pl.col("x1"))
        .then(pl.lit("up"))
        .otherwise(pl.lit("down"))
    )
    names = list(table.columns)
    with tempfile.TemporaryDirectory() as folder:
        preparation = Preparation(
            {"rows": reader_of(table.with_columns(sign.alias("way")))},
            [Split(test=0.2), AsFloats(names), Classes("way")],
            inputs=names,
            target="way",
        )
        serving = Serving(prepare(preparation, Path(folder)), names)
        recipe = lepton.Recipe(
            name="signs",
            model=partial(lepton.models.MLP, (4, 16, 2)),
            loss=lepton.losses.cross_entropy,
            train=serving.split(),
            preparation=serving,
            optimizer=optax.adamw,
            learning_rate=1e-2,
            steps=20,
            batch_size=32,
        )
        trainer = lepton.Trainer(recipe, devices=1)
        trainer.fit()
        lepton.Artifact.of(trainer, rows=20).save(place)


# ---- a cluster ----


def on_cluster(work: Work, whole: int) -> dict[str, Any]:
    """Predict on a cluster of two nodes, and kill one in the middle.

    Returns:
      "killed_at": shards that there were then; "seconds" until the end after it.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # its workers must find Lepton and the same platform
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        other = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        process = work.start("cluster", "--on", "ray", "--address", cluster.address)
        while work.parts("cluster") < MIDDLE * whole and process.poll() is None:
            time.sleep(POLL)
        raylet = other.all_processes["raylet"][0].process.pid
        os.kill(raylet, signal.SIGKILL)
        killed_at = work.parts("cluster")
        began = time.monotonic()
        work.finish(process)
        return {
            "killed_at": killed_at,
            "seconds_after": round(time.monotonic() - began, 1),
        }
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    sys.exit(main())

"""Preparations in real processes: killed, at the same time, from the command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lepton_jax.cli.prepare import MISTAKE, main
from lepton_jax.data.prepare import open_prepared, prepare
from tests.data.test_preparation import preparation
from tools.same_bytes import files_of, kill

ROOT = Path(__file__).resolve().parents[2]
KILLS = 3
# Each piece takes 20 ms in each pass, so that there is something to interrupt.
SPECIFICATION = """
import dataclasses
import time

from tests.data.preparing import Memory, Piece, Rows
from tests.data.test_preparation import STEPS, people
from lepton_jax.data.prepare import Preparation


class Slow(Memory):
    def read(self, piece: Piece) -> Rows:
        time.sleep(0.02)
        return super().read(piece)


def preparation(rows: int = 1500, limit: int = 2) -> Preparation:
    \"\"\"People who are not too young.

    Args:
      rows: how many people there are.
      limit: years up to which they are too young.
    \"\"\"
    steps = [STEPS[0], dataclasses.replace(STEPS[1], limit=limit), *STEPS[2:]]
    return Preparation({"a": Slow(people(rows))}, steps, target="sick")
"""


@pytest.fixture
def specification(tmp_path) -> Path:
    path = tmp_path / "people.py"
    path.write_text(SPECIFICATION)
    return path


def command(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "prepare.py"), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_run_that_was_killed_goes_on_and_leaves_the_same_bytes(
    specification, tmp_path
):
    kill(specification, tmp_path / "killed", KILLS, seed=1, seconds=1.2)
    done = command(specification, "--out", tmp_path / "killed", "--workers", 1)
    assert done.returncode == 0, done.stderr
    assert "train: " in done.stdout

    assert main([str(specification), "--out", str(tmp_path / "whole")]) == 0
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert "unfinished" not in " ".join(map(str, (tmp_path / "killed").rglob("*")))


def test_a_row_is_explained_and_a_mistake_is_not_a_traceback(
    specification, tmp_path, capsys
):
    arguments = [str(specification), "--out", str(tmp_path / "out"), "--rows", "200"]
    assert main([*arguments, "--explain", "a:150"]) == 0
    words = capsys.readouterr().out
    assert "goes into the split 'test'" in words
    assert "DROPPED: seen before" in words and "dropped by Once" in words

    assert main([*arguments, "--explain", "b:150"]) == MISTAKE
    assert "there is no source 'b'" in capsys.readouterr().err
    assert main([*arguments, "--limt", "3"]) == MISTAKE
    assert "did you mean '--limit'" in capsys.readouterr().err
    assert main(["--help", str(specification)]) == 0
    assert "years up to which they are too young" in capsys.readouterr().out


def test_a_cluster_of_two_nodes_gives_the_bytes_of_this_process(tmp_path):
    pytest.importorskip("ray", reason="needs the extra 'ray'")
    from ray.cluster_utils import Cluster

    prepare(preparation(), tmp_path / "local")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        prepare(preparation(), tmp_path / "ray", engine="ray", address=cluster.address)
    finally:
        cluster.shutdown()
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "local")
    assert open_prepared(tmp_path / "ray").splits == ["train", "test"]

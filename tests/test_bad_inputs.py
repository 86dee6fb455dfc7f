"""A person's mistakes: each is a LeptonError with its place and remedy, exit code 2, no traceback, and nothing lost."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_inputs import COMMAND_LINES, DATA_FILES, RECIPE, Bad, given, recipe, write
from flax import linen, nnx

import lepton_jax as lepton
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    LeptonError,
    ModelError,
    PlanError,
    RecipeError,
)
from lepton_jax.launch import cli, settings
from lepton_jax.losses import binary_cross_entropy, cross_entropy, huber, squared_error

ROOT = Path(__file__).resolve().parents[1]
X = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
Y = np.arange(16, dtype=np.int32) % 3


def rows(cases: list[Bad]):
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def check(error: BaseException, case: Bad) -> None:
    assert type(error) is case.error, repr(error)
    assert isinstance(error, LeptonError)
    assert case.place in (error.where or "no place"), error
    assert case.remedy and case.remedy in error.remedy, error
    assert case.what in error.what, error
    assert "Traceback" not in str(error)


# ---- the command line, and files ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """A run folder with the committed steps 1, 2 and 3."""
    jax.devices()  # --devices would otherwise decide how many there are for the whole session
    folder = tmp_path_factory.mktemp("committed")
    file = write(folder / "small.py", RECIPE)
    assert cli.main([str(file), "--run-dir", str(folder / "run"), "--devices", "1"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def reader(committed) -> lepton.Trainer:
    return lepton.Trainer(settings.load(committed.parent / "small.py")(), devices=1)


@pytest.fixture
def run(committed, tmp_path) -> Path:
    """A copy of it, for a test to spoil."""
    return shutil.copytree(committed, tmp_path / "run")


def restorable(reader: lepton.Trainer, run: Path) -> list[int]:
    steps = []
    for folder in (run / "checkpoints").iterdir():
        if folder.name.isdigit():
            assert int(reader.load(run, int(folder.name)).state.step) == int(folder.name)
            steps.append(int(folder.name))
    return sorted(steps)


@rows(COMMAND_LINES)
def test_command_line(case, run, reader, tmp_path, monkeypatch, capsys):
    launch, errors = cli.launch, []

    def recording(arguments):
        try:
            return launch(arguments)
        except LeptonError as error:
            errors.append(error)
            raise

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "launch", recording)
    monkeypatch.setattr(cli, "_short_of_memory", lambda problem, find=cli._short_of_memory: errors.append(find(problem)) or errors[-1])
    code = cli.main(case.provoke(tmp_path))
    printed = capsys.readouterr().err
    assert code == 2
    check(errors[0], case)
    assert printed.endswith(f"error: {errors[0]}\n") and "Traceback" not in printed
    assert {1, 2, 3} <= set(restorable(reader, run))


@rows(DATA_FILES)
def test_data_file(case, tmp_path):
    with pytest.raises(LeptonError) as caught:
        case.provoke(tmp_path)
    check(caught.value, case)


def test_an_error_as_json(capsys):
    assert cli.main(["nothing.py", "--json"]) == 2
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "failed" and "nothing.py" in summary["error"] and summary["remedy"] and summary["where"]


@rows(NOTEBOOKS)
def test_notebook(case, tmp_path):
    with pytest.raises(LeptonError) as caught:
        case.provoke(tmp_path)
    check(caught.value, case)

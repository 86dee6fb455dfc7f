"""A person's mistakes.

Each is a LeptonError with its place and remedy, exit code 2, no traceback, and nothing
lost.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_inputs import (
    COMMAND_LINES,
    DATA_FILES,
    HEAD,
    RECIPE,
    RUN_FOLDERS,
    Bad,
    given,
    recipe,
    write,
)
from bad_notebooks import NOTEBOOKS, REGRESSION, elements, trainer

import lepton_jax as lepton
from lepton_jax.cli import launch as cli
from lepton_jax.cli import settings
from lepton_jax.errors import (
    CheckpointError,
    DataError,
    DivergedError,
    LeptonError,
    PlanError,
)
from lepton_jax.losses import squared_error
from lepton_jax.monitor import read_events

ROOT = Path(__file__).resolve().parents[1]


def rows(cases: list[Bad]):
    assert len({case.name for case in cases}) == len(cases)
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def check(error: BaseException, case: Bad) -> None:
    assert type(error) is case.error, repr(error)
    assert isinstance(error, LeptonError)
    assert case.place in (error.where or "no place"), error
    assert case.remedy, error
    assert case.remedy in error.remedy, error
    assert case.what in error.what, error
    assert "Traceback" not in str(error)


# ---- the command line, and files ----


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> Path:
    """Return a run folder with the committed steps 1, 2 and 3."""
    # --devices would otherwise decide how many there are for the whole session
    jax.devices()
    folder = tmp_path_factory.mktemp("committed")
    file = write(folder / "small.py", RECIPE)
    assert (
        cli.main([str(file), "--run-dir", str(folder / "run"), "--devices", "1"]) == 0
    )
    return folder / "run"


@pytest.fixture(scope="module")
def reader(committed) -> lepton.Trainer:
    return lepton.Trainer(settings.load(committed.parent / "small.py")(), devices=1)


@pytest.fixture
def run(committed, tmp_path) -> Path:
    """Return a copy of that run folder, for a test to spoil."""
    return shutil.copytree(committed, tmp_path / "run")


def restorable(reader: lepton.Trainer, run: Path) -> list[int]:
    steps = []
    for folder in (run / "checkpoints").iterdir():
        if folder.name.isdigit():
            assert int(reader.load(run, int(folder.name)).state.step) == int(
                folder.name
            )
            steps.append(int(folder.name))
    return sorted(steps)


@rows(COMMAND_LINES)
def test_command_line(case, committed, reader, tmp_path, monkeypatch, capsys):
    launch = cli.launch
    short_of_memory = cli._short_of_memory
    errors = []

    def recording(arguments):
        try:
            return launch(arguments)
        except LeptonError as error:
            errors.append(error)
            raise

    if case in RUN_FOLDERS:
        shutil.copytree(committed, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "launch", recording)
    monkeypatch.setattr(
        cli,
        "_short_of_memory",
        lambda problem: errors.append(short_of_memory(problem)) or errors[-1],
    )
    code = cli.main(case.provoke(tmp_path))
    printed = capsys.readouterr().err
    assert code == 2

    check(errors[0], case)
    assert printed.endswith(f"error: {errors[0]}\n")
    assert "Traceback" not in printed
    assert case not in RUN_FOLDERS or {1, 2, 3} <= set(
        restorable(reader, tmp_path / "run")
    )


@rows(DATA_FILES)
def test_data_file(case, tmp_path):
    with pytest.raises(LeptonError) as caught:
        case.provoke(tmp_path)
    check(caught.value, case)


def test_numbers_of_numpy_are_numbers():
    assert (
        trainer(
            steps=np.int64(2), learning_rate=np.float32(0.5), seed=np.uint8(1)
        ).recipe.seed
        == 1
    )


def test_an_error_as_json(capsys):
    assert cli.main(["nothing.py", "--json"]) == 2
    summary = json.loads(capsys.readouterr().out)
    assert summary["status"] == "failed"
    assert "nothing.py" in summary["error"]
    assert summary["remedy"]
    assert summary["where"]


@rows(NOTEBOOKS)
def test_notebook(case, tmp_path):
    with pytest.raises(LeptonError) as caught:
        case.provoke(tmp_path)
    check(caught.value, case)


# ---- real processes ----

NAN = (
    HEAD
    + """
def recipe():
    x = np.ones((16, 4))
    x[5, 2] = np.nan
    return lepton.Recipe(
        model=lambda rngs: Net(4, rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd,
        learning_rate=0.1,
        train=(x, np.zeros(16, int)),
        batch_size=8,
        steps=9,
    )
"""
)
PROCESSES = [
    case
    for case in COMMAND_LINES
    if case.name
    in {
        "recipe-missing-with-near-name",
        "recipe-syntax-error",
        "recipe-exits-at-import",
        "setting-unknown",
        "run-folder-occupied",
        "run-folder-cannot-be-made",
        "resume-recipe-json-cut",
        "resume-other-width",
        "batch-beyond-memory",
    }
] + [
    Bad(
        "platform-unknown",
        given(),
        PlanError,
        place="JAX_PLATFORMS=nope",
        remedy="JAX_PLATFORMS=cpu",
        what="no devices",
    ),
    Bad(
        "data-not-finite",
        recipe(NAN),
        DivergedError,
        place="first in 5",
        remedy="leave out these samples",
        what="is nan",
    ),
]


def process(
    arguments: list[str],
    folder: Path,
    limit: int | None = None,
    platform: str = "cpu",
    module: bool = False,
):
    """Run tools/launch.py as a process of its own.

    `limit` is the size in bytes beyond which it can write no file.
    """
    command = (
        ["-m", "lepton_jax", "launch"]
        if module
        else [str(ROOT / "tools" / "launch.py")]
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    if limit is not None:
        command = [
            "-c",
            (
                "import resource, runpy, sys;"
                f" resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
                " sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0],"
                " run_name='__main__')"
            ),
            *command,
        ]
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
        check=False,
    )


@pytest.fixture(scope="module")
def finished(committed, tmp_path_factory):
    """Return every case's process, ended, and its folder; two run at a time."""

    def start(numbered):
        index, case = numbered
        folder = tmp_path_factory.mktemp("process")
        shutil.copytree(committed, folder / "run")
        platform = "nope" if case.name == "platform-unknown" else "cpu"
        return (
            process(
                case.provoke(folder), folder, platform=platform, module=bool(index % 2)
            ),
            folder,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(
            zip(
                [case.name for case in PROCESSES],
                pool.map(start, enumerate(PROCESSES)),
                strict=True,
            )
        )


@rows(PROCESSES)
def test_process(case, finished, reader):
    done, folder = finished[case.name]
    assert done.returncode == 2, done.stderr
    what, where, remedy = done.stderr[done.stderr.rindex("error: ") :].rsplit("\n  ", 2)
    assert case.what in what, done.stderr
    assert case.place in where, done.stderr
    assert case.remedy in remedy, done.stderr
    assert where.startswith("where:")
    assert remedy.startswith("remedy:")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert restorable(reader, folder / "run") == [1, 2, 3]


# ---- checkpoints that are damaged, or can't be written ----


def damage(step: Path) -> None:
    for file in (step / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        file.write_bytes(content)


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_whichever_file_of_the_latest_step_is_damaged(
    how, committed, reader, tmp_path, capfd
):
    """A run with a damaged file is read as a whole step.

    That is the latest step, if the file holds nothing of it, or the one before; never a
    mixture.
    """
    expected = {
        step: jax.device_get(reader.load(committed, step).state.params)
        for step in (2, 3)
    }
    passed_over = 0
    for file in sorted(
        p
        for p in (committed / "checkpoints" / "3").rglob("*")
        if p.is_file() and p.stat().st_size
    ):
        run = shutil.copytree(committed, tmp_path / "run")
        spoiled = run / file.relative_to(committed)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 0xFF
        (
            spoiled.unlink()
            if how == "remove"
            else spoiled.write_bytes(
                content[: len(content) // 2] if how == "cut" else content
            )
        )
        reader.load(run)
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get(reader.state.params),
            expected[reader.step],
        )
        passed_over += reader.step == 2
        shutil.rmtree(run)
    assert passed_over >= 3
    assert capfd.readouterr().err == ""


def test_a_damaged_step_is_passed_over_reported_and_saved_anew(run, reader, capfd):
    damage(run / "checkpoints" / "3")
    assert cli.main(["--resume", str(run), "--devices", "1"]) == 0
    printed = capfd.readouterr().err
    assert "checkpoint of step 3 is damaged" in printed
    assert "resumed at step 2" in printed
    assert "Traceback" not in printed
    (event,) = (e for e in read_events(run) if e["kind"] == "damaged")
    assert event["step"] == 3
    assert event["reason"]
    assert restorable(reader, run) == [1, 2, 3]
    assert (run / "set_aside" / "3").is_dir()


def test_a_step_under_another_name_is_passed_over(run, reader):
    (run / "checkpoints" / "2").rename(run / "checkpoints" / "7")
    assert reader.load(run).step == 3
    with pytest.raises(CheckpointError, match="it holds step 2 under another name"):
        reader.load(run, 7)


def test_if_all_are_damaged_each_is_listed(run, capfd):
    for step in (run / "checkpoints").iterdir():
        damage(step)
    assert cli.main(["--resume", str(run), "--devices", "1"]) == 2
    printed = capfd.readouterr().err
    assert "none of the 3 checkpoints can be read" in printed
    assert "where:" in printed
    assert "remedy:" in printed
    assert all(f"step {step}: " in printed for step in (1, 2, 3))
    assert "Traceback" not in printed


@pytest.fixture(scope="module")
def wide(committed) -> Path:
    """Return a run whose checkpoints take megabytes; steps 1 and 2 are committed."""
    folder = committed.parent
    arguments = [
        "--width",
        "20000",
        "--steps",
        "2",
        "--devices",
        "1",
        "--run-dir",
        str(folder / "wide"),
    ]
    assert cli.main([str(folder / "small.py"), *arguments]) == 0
    return folder / "wide"


def test_a_checkpoint_that_cannot_be_written(wide, tmp_path):
    run = shutil.copytree(wide, tmp_path / "run")
    done = process(["--resume", "run", "--steps", "6"], tmp_path, limit=500_000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert (
        "error: the checkpoint of step 3 can't be written (step 2 is the last committed"
        " one)" in done.stderr
    )
    assert "where:" in done.stderr
    assert "remedy: free disk space" in done.stderr
    assert read_events(run)[-1]["status"] == "failed"
    assert cli.main(["--resume", str(run), "--steps", "4", "--devices", "1"]) == 0

    wide_reader = lepton.Trainer(
        settings.load(wide.parent / "small.py")(width=20000), devices=1
    )
    assert restorable(wide_reader, run) == [1, 2, 3, 4]


def test_a_disk_that_is_full(wide, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk],
        capture_output=True,
        check=False,
    ).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        write(tmp_path / "r.py", RECIPE)
        done = process(
            ["r.py", "--run-dir", "disk/run", "--width", "20000", "--steps", "9"],
            tmp_path,
        )
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert "remedy: free disk space" in done.stderr
        wide_reader = lepton.Trainer(
            settings.load(wide.parent / "small.py")(width=20000), devices=1
        )
        assert restorable(wide_reader, disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_model_that_cannot_be_saved_leaves_the_older_save(wide, tmp_path):
    model = lepton.Trainer(
        settings.load(wide.parent / "small.py")(width=20000), devices=1
    ).load(wide)
    saved = model.save(tmp_path / "saved")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="can't be written"):
            model.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert restorable(model, saved) == [2]


def test_a_journal_that_cannot_be_written(run, reader, tmp_path):
    journal = run / "events.jsonl"
    with journal.open("a") as file:
        file.write(
            (json.dumps({"time": 0, "kind": "warning", "text": "x" * 1000}) + "\n")
            * 500
        )
    done = process(
        ["--resume", "run", "--steps", "200"],
        tmp_path,
        limit=journal.stat().st_size + 5000,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert (
        "error: the journal of the run can't be written: File too large" in done.stderr
    )
    assert "run/events.jsonl\n" in done.stderr
    assert "another run folder" in done.stderr
    assert len(restorable(reader, run)) >= 3
    assert read_events(run)


def test_data_that_end_leave_the_steps_before(tmp_path):
    data = elements().to_iter_dataset()
    with pytest.raises(DataError, match="ended after 16 samples"):
        trainer(train=data, steps=3, save_every=1, run_dir=tmp_path / "run").fit()
    end = read_events(tmp_path / "run")[-1]
    assert end["status"] == "failed"
    assert "ended after 16 samples" in end["reason"]
    assert restorable(trainer(steps_per_call=1), tmp_path / "run") == [1, 2]


# ---- training that diverges ----


def schedule(rate: float):
    """Return a schedule: 0.01, and from the fourth step on `rate`."""
    return lambda step: jnp.where(step < 3, 0.01, rate)


def diverging(run: Path, rate: float) -> lepton.Trainer:
    return trainer(
        loss=lambda o, t: squared_error(o[:, 0], t),
        optimizer=optax.sgd,
        learning_rate=schedule(rate),
        steps=8,
        save_every=1,
        keep=10,
        run_dir=run,
        **REGRESSION,
    )


def test_parameters_that_are_not_finite_are_never_saved(tmp_path):
    with pytest.raises(DivergedError, match="parameters that are not finite") as caught:
        diverging(tmp_path / "run", np.inf).fit()
    assert caught.value.where == "step 4"
    assert "step 3 is the last committed checkpoint" in caught.value.remedy
    assert read_events(tmp_path / "run")[-1]["status"] == "diverged"
    repaired = diverging(tmp_path / "run", 0.01).resume()
    assert repaired.step == 3
    assert restorable(repaired, tmp_path / "run") == [1, 2, 3]
    repaired.load(tmp_path / "run")
    assert np.isfinite(repaired.fit()["loss"]).all()
    assert repaired.step == 8


def test_a_learning_rate_that_diverges_leaves_the_steps_before(tmp_path):
    """A person can name an earlier step to go on from.

    The update of step 4 overshoots to numbers that are still finite.
    """
    with pytest.raises(DivergedError, match="the loss of step 5 is inf") as caught:
        diverging(tmp_path / "run", 1e30).fit()
    assert "step 4 is the last committed checkpoint" in caught.value.remedy

    repaired = diverging(tmp_path / "run", 0.01).load(tmp_path / "run", step=3)
    history = repaired.fit()
    assert history.first == 3
    assert np.isfinite(history["loss"]).all()
    assert (tmp_path / "run" / "set_aside" / "4").is_dir()

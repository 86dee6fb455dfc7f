"""The controller's benchmark tunes, compares and resumes, on a task of a second."""

import json
import math
from functools import partial

import numpy as np
import pytest

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import cli as bench
from tools.bench import controller as bench_controller
from tools.bench import controller_tasks


def blobs(data):
    """Three classes around three corners."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300).astype(np.int32)
    points = np.eye(3, dtype=np.float32)[labels] + random.normal(
        0, 0.5, (300, 3)
    ).astype(np.float32)
    train, validation, report = controller_tasks.three(Arrays(points, labels), 0.3, 0.3)
    return bench_controller.Task(
        controller_tasks.recipe_of(
            partial(MLP, (3, 8, 3)),
            train,
            validation,
            40,
            16,
        ),
        report,
    )


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(bench_controller, "TASKS", {"blobs": blobs})
    monkeypatch.setattr(bench_controller, "GRID", (1e-3, 1e-1))


def asked(folder, *more):
    return [
        "controller",
        "--contestants",
        "constant",
        "cosine",
        "--rates",
        "1",
        "30",
        "--seeds",
        "0",
        "1",
        "--json",
        str(folder / "results.json"),
        "--cache",
        str(folder / "runs.jsonl"),
        *more,
    ]


def test_it_tunes_compares_and_goes_on_from_what_it_kept(
    tiny, tmp_path, capsys, monkeypatch
):
    assert bench.main(asked(tmp_path)) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    (reference,) = results["references"]
    assert reference["rate"] == 1e-1
    assert len(reference["losses"]) == 2
    own = [
        c for c in results["cells"] if c["contestant"] == "cosine" and c["factor"] == 1
    ]
    assert [c["loss"] for c in own] == reference["losses"]
    assert all(c["steps"] <= 1 for c in own)
    assert all(c["paired"] == 1 for c in own)
    assert {c["rank"] for c in results["cells"]} <= {1, 1.5, 2}
    assert len(results["cells"]) == 8
    # two seeds of: a grid of 2, factor 30, 2 constants
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 10
    with monkeypatch.context() as patch:
        patch.setattr(
            bench_controller.Runner,
            "__call__",
            lambda *unused: pytest.fail("it runs again"),
        )
        assert bench.main(asked(tmp_path)) == 0
    assert capsys.readouterr().out == printed
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    # killed while it wrote
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:40])
    assert bench.main(asked(tmp_path)) == 0
    assert capsys.readouterr().out == printed


def test_a_change_of_the_program_makes_its_runs_anew(tiny, monkeypatch):
    runner = bench_controller.Runner(blobs(None), bench_controller.cosine)
    assert (
        runner.program
        == bench_controller.Runner(blobs(None), bench_controller.cosine).program
    )
    monkeypatch.setattr(bench_controller, "WARM_UP", 0.3)
    assert (
        runner.program
        != bench_controller.Runner(blobs(None), bench_controller.cosine).program
    )


def test_contestants_of_a_cell_share_their_start_and_their_batches():
    task = blobs(None)
    still = [
        bench_controller.Runner(task, bench_controller.CONTESTANTS[name])(0.0, 3)
        for name in ("constant", "cosine")
    ]
    assert still[0] == still[1]
    assert len(set(still[0].test)) == 1

    orders = bench_controller._orders(task.recipe, len(task.recipe.train), 3).reshape(
        -1
    )
    epoch = len(task.recipe.train)
    assert sorted(orders[:epoch]) == list(range(epoch)) != orders[:epoch].tolist()


def test_a_diverged_run_ranks_last_and_is_in_no_mean():
    cells = [
        {
            "task": "t",
            "factor": 1,
            "seed": 0,
            "contestant": name,
            "loss": loss,
            "ratio": loss,
            "paired": loss,
            "steps": 1.0,
        }
        for name, loss in (("a", 1.0), ("b", math.inf), ("c", 1.0))
    ]
    bench_controller._rank(cells)
    assert [c["rank"] for c in cells] == [1.5, 3, 1.5]
    rows = {r["contestant"]: r for r in bench_controller.summarize(cells)}
    assert rows["b"]["within"] == rows["b"]["within_by_seed"] == 0
    assert rows["a"]["within"] == rows["a"]["within_by_mean"] == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "minst"], "did you mean 'mnist'"),
        (["--contestants", "cosin"], "did you mean 'cosine'"),
        (["--rates", "0"], "--rates has 0"),
        (["--seeds", "-1"], "--seeds has -1"),
        (["--steps", "3"], "--steps is 3"),
        (["--tasks", "shakespeare", "--data", "no/such/folder"], "no/such/folder"),
    ],
)
def test_a_wrong_argument_is_said_without_a_traceback(arguments, says, capsys):
    assert bench.main(["controller", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "remedy:" in error
    assert "Traceback" not in error


def test_a_file_that_is_no_cache_is_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text("hello\nworld\n")
    assert bench.main(asked(tmp_path)) == 2
    assert "line 1" in capsys.readouterr().err
    assert (tmp_path / "runs.jsonl").read_text() == "hello\nworld\n"

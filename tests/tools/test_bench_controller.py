"""The controller's benchmark tunes, compares and judges, on tasks of a second."""

import json
import math
from functools import partial

import numpy as np
import optax
import pytest

from lepton_jax import controllers
from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import cli as bench
from tools.bench import controller as bench_controller
from tools.bench import controller_rivals, controller_tasks, history
from tools.bench.tasks import HALVES, SEEN, TASKS, UNSEEN, source

pytestmark = pytest.mark.usefixtures("quick_compilation")


def blobs(data, optimizer=None):
    """Three classes around three corners."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 300).astype(np.int32)
    points = np.eye(3, dtype=np.float32)[labels] + random.normal(
        0, 0.5, (300, 3)
    ).astype(np.float32)
    parts = controller_tasks.three(Arrays(points, labels), 0.3, 0.3)
    options = {"optimizer": optimizer} if optimizer else {}
    return controller_tasks.task_of(partial(MLP, (3, 8, 3)), parts, 40, 16, **options)


@pytest.fixture
def tiny(monkeypatch):
    halves = {"tuning": ("blobs",), "judging": ("hidden",)}
    monkeypatch.setattr(bench_controller, "TASKS", {"blobs": blobs, "hidden": blobs})
    monkeypatch.setattr(bench_controller, "HALVES", halves)
    monkeypatch.setattr(bench_controller, "source", lambda name: source("wine_softmax"))
    monkeypatch.setattr(controller_rivals, "COARSE", (-6, -3))
    monkeypatch.setattr(controller_rivals, "FARTHEST", 0)


def asked(folder, *more):
    return [
        "controller",
        "--contestants",
        "constant",
        "cosine",
        "--seeds",
        "0",
        "1",
        "--json",
        str(folder / "results.json"),
        "--cache",
        str(folder / "runs.jsonl"),
        *more,
    ]


def results_in(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_it_tunes_compares_and_goes_on_from_what_it_kept(
    tiny, tmp_path, capsys, monkeypatch
):
    assert bench.main(asked(tmp_path)) == 0
    printed = capsys.readouterr().out
    rows = {row["contestant"]: row for row in results_in(tmp_path)["rows"]}
    assert rows["cosine"]["ratios"] == [1, 1]
    assert rows["cosine"]["setting"] == 0.1
    assert {row["rank"] for row in rows.values()} <= {1, 1.5, 2}
    assert max(rows["cosine"]["steps"]) <= 1

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


def test_the_judging_half_shows_aggregates_alone(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(history, "ROOT", tmp_path)
    monkeypatch.setattr(bench_controller, "HISTORY", "judged.jsonl")
    names = ("cosine", "constant")
    monkeypatch.setattr(
        bench_controller,
        "CONTESTANTS",
        {name: bench_controller.CONTESTANTS[name] for name in names},
    )
    assert bench.main(asked(tmp_path, "--half", "judging")) == 0
    (line,) = (tmp_path / "judged.jsonl").read_text().splitlines()
    shown = capsys.readouterr().out + (tmp_path / "results.json").read_text() + line
    assert "hidden" not in shown
    assert set(results_in(tmp_path)) == {"summary"}
    best, _ = json.loads(line)["figures"]["contestants"]
    assert best["tasks"] == 1
    assert best["rank"] in (1, 1.5)


def test_a_search_goes_on_until_it_knows_both_sides_of_the_best_rate():
    asked_for = []

    def valley(rate):
        asked_for.append(rate)
        return abs(math.log10(rate) - 1.4)

    # between 10 and 100, outside of the grid that the search begins with
    assert controller_rivals.tuned("cosine", valley, valley) == pytest.approx(21.5443)
    assert max(asked_for) >= 100
    assert controller_rivals.tuned("prodigy", None, lambda c: abs(c - 0.3)) == 0.3


def test_a_search_may_meet_nothing_but_divergence():
    def diverged(rate):
        return math.inf

    assert controller_rivals.tuned("constant", diverged, diverged) > 0


def test_no_base_rate_changes_what_adaptive_does():
    runner = bench_controller.Runner(blobs(None), bench_controller.adaptive)
    low = runner(1e-3, 1)
    high = runner(30.0, 1)
    np.testing.assert_allclose(low.test, high.test, rtol=1e-3)
    assert low.test[-1] < low.test[0]


def test_contestants_of_a_task_share_their_start_and_their_batches():
    problem = bench_controller.Problem(blobs(None))
    still = [
        bench_controller.Runner(problem, controller_rivals.RIVALS[name])(0.0, 3)
        for name in ("constant", "cosine")
    ]
    assert still[0] == still[1]
    assert len(set(still[0].test)) == 1

    samples = len(problem.recipe.train)
    orders = bench_controller._orders(problem.recipe, samples, 3).reshape(-1)
    epoch = orders[:samples].tolist()
    assert sorted(epoch) == list(range(samples)) != epoch


def lost_at(loss, rollbacks):
    """A policy that asks for a rollback at one batch's loss."""

    def update(signals, state):
        asks = abs(signals["loss"] - loss) < 1e-6
        return {"rollback": asks.astype("float32")}, state

    limits = {"rollbacks": rollbacks, "rate": 0.1}
    return controllers.Policy(
        "lost", dict, update, watches=("loss",), moves=("rollback",), limits=limits
    )


def test_a_run_that_its_controller_sends_back_goes_on_with_the_data_that_follows():
    def run(*policies):
        maker = partial(bench_controller.controlled, policies=policies)
        return bench_controller.Runner(blobs(None), maker)(1e-2, 0)

    plain = run()
    back = run(lost_at(plain.train[20], 1))
    assert back.test[:20] == plain.test[:20]
    assert len(back.test) == controller_tasks.EVALUATIONS
    assert math.isfinite(back.test[-1])
    assert back.train[20] != plain.train[20]
    # one that may not go back has diverged
    assert math.isnan(run(lost_at(plain.train[20], 0)).test[-1])


def test_a_diverged_run_ranks_last_and_is_in_no_mean():
    rows = [
        {
            "contestant": name,
            "losses": [loss, 1.0],
            "steps": [1.0, 1.0],
            "noticed": name == "b",
            "refused": "",
        }
        for name, loss in (("a", 1.0), ("b", math.inf), ("c", 1.0))
    ]
    results = bench_controller.compared(rows, [1.0, 1.0])
    assert [row["rank"] for row in results] == [1.5, 3, 1.5]
    summary = {row["contestant"]: row for row in bench_controller.summarize(results)}
    assert summary["b"]["within"] == 0
    assert summary["b"]["noticed"] == summary["b"]["outside"] == 1
    assert summary["a"]["within"] == 1


def test_an_optimizer_that_is_refused_counts_as_noticed(tiny, monkeypatch):
    sgd = partial(blobs, optimizer=partial(optax.sgd, momentum=0.9))
    monkeypatch.setattr(bench_controller, "TASKS", {"blobs": sgd})
    policies = controllers.chain(controllers.learning_free())
    refused = {"adaptive": partial(bench_controller.controlled, policies=policies)}
    (row,) = bench_controller.measure(["blobs"], refused, seeds=[0])
    assert row["ratio"] == math.inf
    assert row["noticed"]
    assert "learning_free" in row["refused"]


def test_each_task_has_a_file_and_belongs_to_one_half():
    assert all(source(name).exists() for name in TASKS)
    assert {*HALVES["tuning"]} | {*HALVES["judging"]} == {*SEEN, *UNSEEN}
    assert {*HALVES["tuning"]}.isdisjoint(HALVES["judging"])
    assert {*SEEN} <= {*HALVES["tuning"]}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tasks", "minst"], "did you mean 'mnist'"),
        (["--contestants", "cosin"], "did you mean 'cosine'"),
        (["--rates", "0"], "--rates has 0"),
        (["--seeds", "-1"], "--seeds has -1"),
        (["--half", "judging", "--tasks", "mnist"], "one by one"),
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

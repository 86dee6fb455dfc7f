"""Faults are put where they belong, and judged against the clean run."""

import jax
import numpy as np
import pytest

from tests.tools.test_bench_controller import blobs
from tools.bench import cli as bench
from tools.bench import controller, history, judged_faults

STEPS = 40


@pytest.fixture
def problem():
    return controller.Problem(blobs(None))


def test_a_fault_that_is_none_leaves_a_run_as_it_is(problem):
    runner = controller.Runner(problem, controller.CONTESTANTS["constant"])
    clean = runner(1e-2, 0, judged_faults.clean_of(problem))
    np.testing.assert_allclose(clean.test, runner(1e-2, 0).test, rtol=1e-6)

    spoiled = runner(1e-2, 0, judged_faults.fault_of(problem, "nan", "middle", 0))
    np.testing.assert_allclose(spoiled.test[:20], clean.test[:20], rtol=1e-6)
    assert np.isnan(spoiled.test[20:]).all()


@pytest.mark.parametrize("place", judged_faults.PLACES)
def test_mixed_labels_are_those_of_the_steps_own_batches(problem, place):
    fault = judged_faults.fault_of(problem, "labels", place, 3)
    first, last = judged_faults.span_of(problem, "labels", place)
    assert np.flatnonzero(fault.batches >= 0).tolist() == list(range(first, last))
    assert (first < 20) == (place == "start")
    assert (last == STEPS) == (place != "start")

    orders = controller._orders(problem.recipe, len(problem.recipe.train), 3)
    rows = orders.reshape(STEPS, -1)[first:last]
    inputs, targets = jax.tree.map(lambda x: x[: len(rows)], fault.faulty)
    own = np.asarray(problem.train[1])[rows]
    np.testing.assert_array_equal(inputs, np.asarray(problem.train[0])[rows])
    np.testing.assert_array_equal(np.sort(targets), np.sort(own))
    assert (targets != own).any()


def test_a_judged_run_names_no_task_and_is_remembered(monkeypatch, tmp_path, capsys):
    tasks = {"hidden": blobs}
    monkeypatch.setattr(judged_faults, "TASKS", tasks)
    monkeypatch.setattr(controller, "TASKS", tasks)
    monkeypatch.setattr(judged_faults, "HALVES", {"judging": ("hidden",)})
    monkeypatch.setattr(judged_faults, "CHOSEN", 1)
    monkeypatch.setattr(judged_faults, "FAULTS", ("nan",))
    monkeypatch.setattr(judged_faults, "HISTORY", "judged.jsonl")
    monkeypatch.setattr(history, "ROOT", tmp_path)
    assert bench.main(["faults", "--half", "judging", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "3 cases" in printed
    (line,) = (tmp_path / "judged.jsonl").read_text().splitlines()
    assert "hidden" not in printed + line

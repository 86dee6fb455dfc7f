"""The regret benchmark enumerates what it says, and measures a small model soon."""

import json
from functools import partial

import optax
import pytest

import lepton_jax as lepton
from lepton_jax.hardware import topology
from lepton_jax.planner import trace
from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.search.pins import Pins
from lepton_jax.planner.search.problem import Problem
from tools.bench import cli as bench
from tools.bench import regret as bench_regret

TINY = bench_regret.Case(
    partial(lepton.models.MLP, (16, 64, 3)),
    partial(bench_regret.images, 32, 16, classes=3),
    ("layers/*",),
)


@pytest.fixture(scope="module")
def problem():
    batch = TINY.data()
    recipe = lepton.Recipe(
        model=TINY.model,
        loss=TINY.loss,
        optimizer=optax.adam(1e-3),
        batch_size=32,
    )
    return Problem(
        trace(recipe, *batch),
        topology("cpu:8"),
        "time",
        Pins(),
    )


def test_it_measures_a_model_and_writes_what_it_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "COMMANDS", (bench_regret,))
    monkeypatch.setattr(bench_regret, "CASES", {"tiny": TINY})
    file = tmp_path / "regret.json"
    cache = tmp_path / "cache.json"
    arguments = [
        "planner-regret",
        "--models",
        "tiny",
        "--limit",
        "2",
        "--sample",
        "1",
        "--rounds",
        "1",
        "--steps",
        "1",
        "--json",
        str(file),
        "--cache",
        str(cache),
    ]
    assert bench.main(arguments) == 0
    (result,) = json.loads(file.read_text())["results"]
    assert result["distinct"] < result["assignments"]
    assert result["compiled"] == len(result["candidates"]) <= 2 + result["drawn"]
    assert (
        result["distinct"]
        == result["bounded"] - result["drawn"] + result["compiled"] + result["cut"]
    )
    scores = [c["score"] for c in result["candidates"]]
    assert result["regret"] == result["chosen"]["score"] / min(scores) - 1 >= 0
    assert all(len(c["ms"]) == 1 for c in result["candidates"])
    assert capsys.readouterr().out.splitlines()[2].split()[:2] == [
        "tiny",
        str(result["assignments"]),
    ]
    # what is in the cache is not measured again
    monkeypatch.setattr(bench_regret, "measure", None)
    assert bench.main(arguments) == 0
    assert json.loads(file.read_text())["results"] == [result]


def test_axes_that_split_the_same_and_their_order_make_no_other_candidate(problem):
    batch = problem.names("none").batch
    hidden = next(k for k, g in enumerate(problem.names("none").groups) if g.size == 64)

    def signature(sizes, on_batch, on_hidden):
        masks = [0] * len(problem.names("none").groups)
        masks[batch], masks[hidden] = on_batch, on_hidden
        return bench_regret.signature(problem, Assignment(sizes, tuple(masks), 0))

    assert (
        signature((2, 4), 0b11, 0)
        == signature((8,), 1, 0)
        == signature((2, 2, 2), 0b111, 0)
    )
    assert signature((2, 4), 0b10, 0b01) == signature((4, 2), 0b01, 0b10)
    assert signature((2, 4), 0b10, 0b01) != signature((2, 4), 0b01, 0b10)


def test_the_space_holds_what_the_search_could_find(problem):
    total, distinct = bench_regret.space(problem, TINY.splits)
    names = problem.names("none")
    hidden = next(k for k, g in enumerate(names.groups) if g.size == 64)
    meshes = {tuple(sorted(size for size, _ in key)) for key in distinct}
    assert meshes == {(8,), (2, 4), (2, 2, 2)} and total > len(distinct)
    both = [a for a in distinct.values() if a.masks[names.batch] & a.masks[hidden]]
    assert not both  # samples share a mesh axis with experts and rows alone


def test_an_unknown_model_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(bench, "COMMANDS", (bench_regret,))
    assert bench.main(["planner-regret", "--models", "lstn"]) == 2
    assert "lstm" in capsys.readouterr().err

"""Families are split for good, programs are made again exactly, judges name none."""

import json
import os
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.planner.estimate import feeding
from lepton_jax.planner.rewrite import forms
from tools.bench import cli as bench
from tools.bench import memory, step_time
from tools.bench.families import (
    NAMES,
    Case,
    Draw,
    apart,
    command,
    figures,
    half,
    history,
    load,
    measuring,
    programs,
    shape,
    timing,
    workers,
)

TINY = Case(
    partial(lepton.models.MLP, (12, 8, 10)),
    shape(12, dtype=jnp.float32),
    shape(),
    precision="float32",
)


def test_the_split_never_moves():
    assert half("tuning") == (
        "dcn",
        "equilibrium",
        "fttransformer",
        "gemma",
        "gpt2",
        "hypernet",
        "lstm",
        "mamba",
        "mixer",
        "mixture",
        "resnet",
        "t5",
        "tcn",
        "two_tower",
        "vit",
        "wavenet",
    )
    assert set(half("judging")) == set(NAMES) - set(half("tuning"))


@pytest.mark.parametrize("family", NAMES)
def test_every_family_draws_another_case_for_each_number_and_the_same_for_one(family):
    case = load(family)
    drawn = [case(Draw(f"{family}/{number}")) for number in (0, 0, 1, 2, 3)]
    described = [
        str((one.inputs, one.targets, one.precision, one.fixed, _arguments(one.model)))
        for one in drawn
    ]
    assert described[0] == described[1]
    assert len(set(described)) > 2


def _arguments(model):
    return getattr(model, "args", None) or repr(model)


def test_a_batch_is_as_large_as_the_memory_that_it_is_to_fill():
    work = programs.forward_work(TINY)
    assert work.flops == 2 * (12 * 8 + 8 * 10)
    assert programs.batch_for(TINY, 1000 * work.linear) == 1000
    contrasted = programs.Work(linear=4, square=2)
    assert contrasted.linear * 10 + contrasted.square * 100 == 240


def test_programs_take_families_in_turn():
    assert programs.names(("a", "b"), 3) == [("a", 0), ("b", 0), ("a", 1)]


def _crashes(family, number):
    if number == 0:
        os.abort()
    if number == 1:
        raise ValueError("no such layer")
    return {"family": family, "number": number, "outcome": "compared"}


def test_a_compiler_that_crashes_loses_one_program():
    rows = list(workers.rows(_crashes, [("a", n) for n in range(3)], quiet=True))
    assert [row["outcome"] for row in rows] == ["failed", "failed", "compared"]
    assert rows[0]["why"] == "BrokenProcessPool"
    assert rows[1]["why"] == "ValueError: no such layer"


def test_an_error_of_a_worker_reaches_who_waits_for_its_rows(monkeypatch):
    monkeypatch.setattr(workers, "_pool", lambda quiet: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        next(workers.rows(_crashes, [("a", 1)]))


def _row(**changes):
    row = {
        "family": "vit",
        "number": 3,
        "topology": "v5e:2x2",
        "outcome": "compared",
        "error": 0.1,
        "within": True,
        "said": True,
        "fits": True,
    }
    return row | changes


def test_a_plan_that_is_said_to_fit_and_does_not_is_counted():
    rows = [
        _row(),
        _row(family="unet", error=-0.3, within=False),
        _row(outcome="refused", fits=False, within=False, error=-0.2),
        _row(said=False),
        {"family": "gan", "number": 0, "outcome": "no plan", "why": ""},
    ]
    found = figures.summary(rows)
    assert found["false_fits"] == found["withheld"] == found["not_planned"] == 1
    assert found["within_bound"] == 0.5
    assert found["families"] == 3
    assert (found["median_error"], found["p90_error"]) == (pytest.approx(0.15), 0.3)


def test_judging_tells_of_no_family(monkeypatch, tmp_path, capsys):
    rows = [_row(why=""), _row(family="unet", error=0.2)]
    file = tmp_path / "history.jsonl"
    monkeypatch.setattr(workers, "rows", lambda *given: iter(rows))
    monkeypatch.setattr(history, "MEMORY", file)
    monkeypatch.setattr(bench, "COMMANDS", (memory,))
    results = tmp_path / "results.json"
    arguments = ["planner-memory", "--half", "judging", "--json", str(results)]
    assert bench.main(arguments) == 0

    told = capsys.readouterr()
    texts = [told.out, told.err, file.read_text(), results.read_text()]
    assert not any(name in text for name in half("judging") for text in texts)
    (entry,) = map(json.loads, file.read_text().splitlines())
    assert entry["figures"]["programs"] == 2
    plain = [*arguments[:-1], "results.json"]
    assert entry["command"] == "python -m tools.bench " + " ".join(plain)

    assert bench.main([*arguments, "--no-history"]) == 0
    assert len(file.read_text().splitlines()) == 1
    assert bench.main([*arguments, "--families", "unet"]) == 2


def test_a_program_is_planned_compiled_and_then_known(monkeypatch, tmp_path):
    drawn = programs.Drawn("tiny", 0, "cpu:2", TINY)
    monkeypatch.setattr(measuring, "draw", lambda family, number: drawn)
    file = tmp_path / "cache.jsonl"
    settings = measuring.Settings(file=file)
    row = measuring.measure("tiny", 0, settings, measuring.Cache(file))
    assert row["outcome"] == "compared"
    assert row["error"] == row["peak"] / row["xla"] - 1
    assert row["fits"]

    monkeypatch.setattr(measuring.ahead, "compile_for", None)
    again = measuring.measure_cached("tiny", 0, settings)
    assert again["xla"] == row["xla"]
    assert memory._program_line(again).startswith("tiny:0")


def test_the_probe_and_the_plan_are_judged_by_one_compile(monkeypatch, tmp_path):
    drawn = programs.Drawn("tiny", 0, "cpu:2", TINY)
    monkeypatch.setattr(measuring, "draw", lambda family, number: drawn)
    # the probe is of one step a call
    monkeypatch.setattr(feeding, "MOST_STEPS_PER_CALL", 1)
    file = tmp_path / "cache.jsonl"
    late = measuring.Settings(probe=True, file=file, limit=0.01)
    patient = measuring.Settings(probe=True, file=file, limit=300)
    cache = measuring.Cache(file)
    rows = [measuring.measure("tiny", 0, x, cache) for x in (late, patient)]

    assert [row["outcome"] for row in rows] == ["late", "compared"]
    assert rows[1]["error"] == 0
    assert rows[1]["by plan"]["error"] != 0
    found = figures.summary(rows)
    assert found["late"] == found["compared"] == 1
    assert found["by_plan"]["median_error"] == abs(rows[1]["by plan"]["error"])
    assert "without the probe: median error" in figures.text(found)
    assert "not compiled in 0.01 s" in memory._program_line(rows[0])


def test_no_call_begins_when_the_time_is_over():
    calls = [("a", number) for number in range(3)]
    assert list(workers.rows(_crashes, calls, seconds=0)) == []


def test_a_step_is_timed_and_its_flop_are_xlas(monkeypatch, capsys):
    drawn = programs.Drawn("tiny", 0, "cpu:2", TINY)
    monkeypatch.setattr(timing, "draw_timed", lambda family, number: drawn)
    row = timing.measure("tiny", 0, 2, None)
    assert row["flop_error"] == pytest.approx(0, abs=0.01)
    assert row["ratio"] == row["predicted_ms"] / row["ms"]

    monkeypatch.setattr(workers, "rows", lambda *given: iter([row]))
    monkeypatch.setattr(bench, "COMMANDS", (step_time,))
    arguments = ["planner-time", "--half", "tuning", "--families", "vit:0"]
    assert bench.main(arguments) == 0
    assert "1 of 1 within 3 %" in capsys.readouterr().out
    assert bench.main(["planner-time"]) == 2


@pytest.mark.parametrize(
    "second, tau",
    [
        ([1, 2, 3, 4], 1),
        ([4, 3, 2, 1], -1),
        ([1, 2, 4, 3], 2 / 3),
        ([1, 1, 1, 1], None),
    ],
)
def test_kendalls_tau_is_its_definition(second, tau):
    found = timing.kendall_tau([1, 2, 3, 4], second)
    assert found == (tau if tau is None else pytest.approx(tau))


def test_a_program_is_named_with_its_number():
    class Options:
        half = "tuning"
        families = ("vit:3", "t5")
        programs = 2

    assert command.chosen(Options) == [("vit", 3), ("t5", 0), ("t5", 1)]


@pytest.mark.parametrize("family", apart.FAMILIES)
def test_programs_that_are_judged_apart_are_split_by_their_number(family):
    tuning = apart.names(family, "tuning", 30)
    judging = apart.names(family, "judging", 30)
    assert not set(tuning) & set(judging)
    assert {number % 2 for _, number in tuning} == {0}
    assert {number % 2 for _, number in judging} == {1}
    assert apart.names(family, "judging", 10, first=20) == judging[20:]


@pytest.mark.parametrize("number", range(0, 20, 4))
@pytest.mark.parametrize("family", apart.FAMILIES)
def test_a_program_that_is_judged_apart_is_drawn_again_as_it_was(family, number):
    first, again = (load(family)(Draw(f"a test/{number}")) for _ in range(2))
    assert str((first.inputs, first.fixed, first.on, _arguments(first.model))) == str(
        (again.inputs, again.fixed, again.on, _arguments(again.model))
    )
    made = nnx.eval_shape(lambda: first.model(rngs=nnx.Rngs(0)))
    assert jax.tree.leaves(nnx.state(made)), "its sizes go together"


@pytest.mark.parametrize("number", range(0, 40, 4))
def test_a_long_program_has_long_attention(number):
    drawn = load("long")(Draw(f"a test/{number}"))
    assert drawn.inputs.shape[1] >= forms.LEAST_LENGTH["tpu"]

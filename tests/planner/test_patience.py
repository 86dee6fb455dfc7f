"""How long planning may take, and what it says meanwhile."""

import functools
import json
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.cli import plan as tool
from lepton_jax.planner import patience, planning
from lepton_jax.planner.patience import Patience
from lepton_jax.planner.search.pins import Pins
from lepton_jax.planner.search.problem import Problem

TOKENS = jax.ShapeDtypeStruct((1, 128), jnp.int32)


def language(batch_size=64, **fields):
    model = functools.partial(
        models.TransformerLM,
        512,
        dim=256,
        layers=2,
        heads=8,
    )
    recipe = lepton.Recipe(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam(1e-3),
        batch_size=batch_size,
        **fields,
    )
    return lepton.trace(recipe, TOKENS, TOKENS)


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "h200:8", "cpu:8"])
def test_when_time_is_over_the_best_plan_so_far_is_taken_and_says_so(topology):
    trace = language()
    on = lepton.topology(topology)
    hasty = planning.plan(trace, on, time_limit=1e-9)
    calm = planning.plan(trace, on, time_limit=None)
    (note,) = [note for note in hasty.notes if "the search stopped" in note]

    assert "time_limit" in note
    assert hasty.peak < hasty.memory
    assert hasty.batch_axes
    assert not [note for note in calm.notes if "stopped" in note]
    assert calm.step_seconds <= hasty.step_seconds * 1.005 + 1e-4


def test_a_search_cut_short_does_not_claim_that_nothing_fits_without_saying_so():
    with pytest.raises(lepton.PlanError) as caught:
        planning.plan(
            language(4096),
            lepton.topology("v5e:1x1"),
            time_limit=1e-9,
            micro_batches=1,
            remat="none",
        )
    assert (
        "let the planner choose" in caught.value.remedy
        or "time_limit" in caught.value.remedy
    )


@pytest.mark.parametrize("limit", [0, -1.0])
def test_a_limit_that_is_none_is_an_error(limit):
    with pytest.raises(lepton.PlanError, match="time_limit"):
        planning.plan(
            language(),
            lepton.topology("cpu:1"),
            time_limit=limit,
        )


def test_what_takes_long_says_what_it_does_less_and_less_often(capsys, monkeypatch):
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.05)
    with Patience("planning for v5p:4x4x4") as clock:
        clock.detail = "mesh shape 3 of 18"
        time.sleep(1.0)
    out, err = capsys.readouterr()
    lines = err.splitlines()

    assert out == ""
    assert 2 <= len(lines) <= 5
    assert all(
        line.startswith("planning for v5p:4x4x4, ")
        and line.endswith("mesh shape 3 of 18")
        for line in lines
    )


def test_what_is_quick_says_nothing(capsys):
    with Patience("planning"):
        pass
    assert capsys.readouterr() == ("", "")


def test_only_the_planning_threads_own_computing_counts():
    with Patience("planning", 0.2) as clock:
        time.sleep(0.3)
        assert not clock.over()
        assert not clock.cut
        while not clock.over():
            pass
        assert clock.cut
        assert clock.spent >= 0.2


def test_the_command_line_tells_on_stderr_and_keeps_its_output_clean(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(patience, "SILENT_SECONDS", 0.01)
    arguments = [
        "recipes/digits_cnn.py",
        "--on",
        "v5e:2x2",
        "--time-limit",
        "30",
        "--json",
        str(tmp_path / "plan.json"),
    ]

    assert tool.main(arguments) == 0

    out, err = capsys.readouterr()

    assert "planning for v5e:2x2, " in err
    assert "planning for" not in out
    assert json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert (
        tool.main(["recipes/digits_cnn.py", "--on", "v5e:2x2", "--time-limit", "0"])
        == 2
    )
    assert "--time-limit" in capsys.readouterr().err


def test_layers_that_are_alike_are_sized_once():
    trace = language()
    problem = Problem(trace, lepton.topology("cpu:8"), "time", Pins())

    rows = len(problem.sizes("none").extents)

    assert rows < len(trace.gradient("none").values) / 2

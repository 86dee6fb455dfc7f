"""The journal holds the exact decisions; replayed, it repeats the run to the bit.

That also holds for a run that was killed and resumed.
"""

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.checkpoint.durable import Checkpoints, _storable
from lepton_jax.cli.settings import load
from lepton_jax.controller.journal import in_effect
from lepton_jax.controller.knobs import KNOBS
from lepton_jax.controller.replay import _table
from lepton_jax.monitor import read_events

RECIPE = Path(__file__).parents[1] / "recipes" / "controlled.py"
STEPS = 120
read_journal = lepton.controllers.read_journal


def recipe(**settings):
    return load(RECIPE)(**settings)


def series(lines, knob, base):
    """Return each step's value of a knob by the journal."""
    steps, values = _table(knob, in_effect(lines))
    table = dict(zip(steps.tolist(), values.tolist(), strict=True))
    if KNOBS[knob].combine == "any":
        values = [table.get(step, 0.0) for step in range(1, STEPS + 1)]
        return np.array(values, np.float32)
    values = [base]
    for step in range(1, STEPS + 1):
        values.append(table.get(step, values[-1]))
    return np.array(values[1:], np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("controlled") / "run"
    trainer = lepton.Trainer(recipe(), devices=1, run_dir=folder)
    return trainer, trainer.fit(), read_journal(folder)


def assert_same_state(left, right, parts=("params", "variables", "optimizer")):
    for part in parts:
        a = _storable(getattr(left, part))
        b = _storable(getattr(right, part))
        assert a.keys() == b.keys()
        for path in a:
            np.testing.assert_array_equal(a[path], b[path], err_msg=f"{part}/{path}")


def test_the_journal_holds_every_value_that_the_knobs_had(run):
    trainer, history, lines = run
    moved = lines[0]["moved"]

    assert {
        "learning_rate",
        "skip",
        "anchor",
        "restore",
        "accumulate",
        "averaging_decay",
        "optimizer",
        "dropout",
    } == set(moved)

    for knob in moved:
        base = trainer.program.controller.base.get(knob, 0.0)
        np.testing.assert_array_equal(
            series(lines, knob, base), history[knob], err_msg=knob
        )
        assert len(np.unique(history[knob])) > 1, (
            f"{knob} never moved: nothing is shown"
        )

    assert history.compilations == 1


def test_a_line_says_from_to_and_the_signals_that_fired(run):
    _, history, lines = run
    skips = [line for line in lines if line.get("knob") == "skip"]

    assert skips

    for line in skips:
        at = line.get("last", line["step"]) - 1
        assert line["policy"] == "spikes"
        assert line["contribution"] == line["to"] == 1
        assert line["signals"] == {
            "gradient_norm": history["gradient_norm"][at],
            "loss": history["loss"][at],
        }
    grown = [line for line in lines if line.get("knob") == "accumulate"]

    assert [(line["step"], line["from"], line["to"]) for line in grown] == [
        (1, 1, 1),
        (41, 1, 2),
        (81, 2, 3),
    ]
    assert grown[1]["signals"]["step"] == 40
    assert grown[1]["signals"]["progress"] == np.float32(41 / 120)

    warming = [line for line in lines if line.get("policy") == "warm"]

    assert len(warming) < 20
    assert sum(len(line.get("values", [0])) for line in warming) == 30


def test_replay_is_the_run_to_the_bit(run, tmp_path):
    trainer, history, lines = run
    replay = lepton.controllers.replay(trainer.run_dir)
    again = lepton.Trainer(
        recipe().with_(controller=replay), devices=1, run_dir=tmp_path / "again"
    )
    same = again.fit()

    np.testing.assert_array_equal(same["loss"], history["loss"])
    assert_same_state(again.state, trainer.state)
    jax.tree.map(
        np.testing.assert_array_equal,
        again.state.controller.average,
        trainer.state.controller.average,
    )
    assert same.evaluations == history.evaluations

    for knob in lines[0]["moved"]:  # and the journal of a replay is again one to replay
        base = trainer.program.controller.base.get(knob, 0.0)
        np.testing.assert_array_equal(
            series(read_journal(tmp_path / "again"), knob, base),
            series(lines, knob, base),
        )


def test_a_schedule_is_journaled_and_a_plain_run_writes_no_journal(blobs, tmp_path):
    fields = {
        "model": partial(lepton.models.MLP, (12, 16, 3)),
        "loss": lepton.losses.cross_entropy,
        "train": blobs,
        "batch_size": 25,
        "devices": 1,
        "steps": 30,
    }
    rate = optax.warmup_cosine_decay_schedule(0.0, 0.1, 10, 20)
    trainer = lepton.Trainer(
        optimizer=optax.sgd,
        learning_rate=rate,
        run_dir=tmp_path / "scheduled",
        **fields,
    )
    history = trainer.fit()
    lines = read_journal(tmp_path / "scheduled")

    assert {line["policy"] for line in lines[1:]} == {"schedule"}

    values = {}
    for line in lines[1:]:
        values |= dict(enumerate(line.get("values", [line["to"]]), line["step"]))

    np.testing.assert_array_equal(
        [values[s] for s in sorted(values)], history["learning_rate"][: len(values)]
    )

    again = lepton.Trainer(
        optimizer=optax.sgd,
        learning_rate=0.0,
        controller=lepton.controllers.replay(lines),
        **fields,
    )

    np.testing.assert_array_equal(again.fit()["loss"], history["loss"])

    lepton.Trainer(
        optimizer=optax.sgd, learning_rate=0.1, run_dir=tmp_path / "plain", **fields
    ).fit()

    assert not (tmp_path / "plain" / "controller.jsonl").exists()

    with pytest.raises(lepton.DataError, match=r"controller\.jsonl"):
        lepton.controllers.replay(tmp_path / "plain")


@pytest.mark.parametrize("moment", [pytest.param(15, marks=pytest.mark.slow), 85])
def test_killed_in_the_middle_of_an_action_and_resumed_is_bitwise_the_same(
    moment, run, launch, tmp_path
):
    """Kill a run in its warm-up, and while three batches are accumulated.

    The journal is that of one run as well.
    """
    trainer, history, lines = run
    folder = tmp_path / "run"
    killed = launch(RECIPE, "--run-dir", folder, "--devices", 1)
    deadline = time.monotonic() + 150
    while f'"kind":"save","step":{moment // 10 * 10},' not in _text(
        folder / "events.jsonl"
    ):
        assert killed.poll() is None, killed.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    committed = Checkpoints(folder / "checkpoints").steps()

    assert committed[-1:] != [STEPS], "the kill came too late to prove anything"

    out, err = launch("--resume", folder, "--devices", 1, "--json").communicate(
        timeout=200
    )

    assert json.loads(out.splitlines()[-1])["steps"] == STEPS, err

    resumed = lepton.Trainer(recipe(), devices=1).load(folder)

    assert_same_state(
        resumed.state, trainer.state, ("params", "variables", "optimizer", "controller")
    )

    found = read_journal(folder)
    for knob in lines[0]["moved"]:
        base = trainer.program.controller.base.get(knob, 0.0)
        np.testing.assert_array_equal(
            series(found, knob, base), history[knob], err_msg=knob
        )
    steps = [
        line["step"]
        for line in found
        if line["kind"] in ("decision", "motion") and line["knob"] == "restore"
    ]

    assert steps == [line["step"] for line in lines if line.get("knob") == "restore"], (
        "a decision stands twice, or is lost"
    )
    assert [e["step"] for e in read_events(folder) if e["kind"] == "start"][1:] == [
        committed[-1] if committed else 0
    ]


def _text(path):
    return path.read_text() if path.exists() else ""


def test_lines_that_a_rollback_undid_are_not_in_effect():
    lines = [
        {"kind": "decision", "step": 5, "knob": "skip"},
        {"kind": "motion", "step": 8, "last": 12, "values": [1, 2, 3, 4, 5], "to": 5},
        {"kind": "live", "step": 11, "request": "set"},
        {"kind": "rollback", "step": 12, "to": 9, "position": {}},
        {"kind": "decision", "step": 10, "knob": "skip"},
        {"kind": "rollback", "step": 14, "to": 9, "position": {}},
        {"kind": "decision", "step": 11, "knob": "skip"},
    ]
    kept = {"kind": "motion", "step": 8, "last": 9, "values": [1, 2], "to": 2}

    assert in_effect(lines) == [lines[0], kept, lines[3], lines[5], lines[6]]

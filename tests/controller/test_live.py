"""A person's requests to a run.

They are done between two steps, in their order, answered and journaled, or refused with
a reason.
"""

import json
import os
import threading
import time
from functools import partial

import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.hosts import mailbox
from lepton_jax.hosts.mailbox import Mailbox, ask
from lepton_jax.monitor import read_events

pytestmark = pytest.mark.usefixtures("quick_compilation")

FOREVER = 10_000_000


def make(blobs, folder, **fields):
    fields = {
        "optimizer": optax.adamw,
        "learning_rate": 0.01,
        "batch_size": 25,
        "devices": 1,
        "save_every": FOREVER,
        "evaluate_every": FOREVER,
        "steps": FOREVER,
        "test": blobs,
    } | fields
    return lepton.Trainer(
        model=lambda rngs: lepton.models.MLP((12, 16, 3), rngs=rngs),
        loss=lepton.losses.cross_entropy,
        train=blobs,
        run_dir=folder,
        **fields,
    )


def conversation(trainer, *requests):
    """Fit while another thread asks, and return the history and the answers.

    The thread waits for each answer before it asks again.
    """
    answers = []

    def talk():
        card = trainer.run_dir / "control" / "run.json"
        # the run makes it, locks it, and then writes who it is
        while not card.exists() or not card.stat().st_size:
            time.sleep(0.02)
        for request in (*requests, {"do": "stop"}):
            answers.append(
                ask(
                    trainer.run_dir,
                    request,
                    timeout=120,
                )
            )

    thread = threading.Thread(target=talk)
    thread.start()
    history = trainer.fit()
    thread.join()
    return history, answers


def test_requests_are_done_in_order_answered_and_journaled(blobs, tmp_path):
    trainer = make(blobs, tmp_path / "run")
    history, answers = conversation(
        trainer,
        {"do": "status"},
        {"do": "set", "settings": {"learning_rate": "3e-4"}},
        {"do": "save"},
        {"do": "set", "settings": {"learning_rate": "0.02"}},
        {"do": "evaluate"},
        {"do": "save"},
    )
    status, first, saved, second, evaluated, _, stopped = answers
    assert all(answer["ok"] for answer in answers), answers
    rates = history["learning_rate"]
    np.testing.assert_array_equal(rates[: first["step"]], np.float32(0.01))
    np.testing.assert_array_equal(
        rates[first["step"] : second["step"]], np.float32(3e-4)
    )
    np.testing.assert_array_equal(rates[second["step"] :], np.float32(0.02))
    assert history.steps == stopped["step"] == trainer.step
    assert history.status == "interrupted"
    assert {saved["step"], history.steps} <= set(
        Checkpoints(tmp_path / "run" / "checkpoints").steps()
    )
    assert dict(history.evaluations)[evaluated["step"]] == evaluated["metrics"]
    assert status["until"] == FOREVER
    assert set(status["record"]) <= {
        "loss",
        "learning_rate",
    }
    lines = lepton.controllers.read_journal(tmp_path / "run")
    asked = [
        (line["request"], line["step"]) for line in lines if line["kind"] == "live"
    ]
    requests = ["set", "save", "set", "evaluate", "save", "stop"]
    assert asked == [
        (request, answer["step"])
        for request, answer in zip(requests, answers[1:], strict=True)
    ]
    effects = [line for line in lines if line["kind"] == "decision"]
    assert [(e["step"], e["to"]) for e in effects] == [
        (answer["step"] + 1, np.float32(rate))
        for answer, rate in ((first, 3e-4), (second, 0.02))
    ]
    assert all(
        "@" in line["who"] and line["pid"] == os.getpid()
        for line in [*effects, *lines]
        if line["kind"] != "start"
    )
    assert read_events(tmp_path / "run")[-1]["reason"].startswith(
        f"stopped at step {trainer.step} by "
    )
    assert not (tmp_path / "run" / "control").exists()
    assert history.compilations == 1


def test_a_paused_run_stands_still_and_still_obeys(blobs, tmp_path):
    trainer = make(blobs, tmp_path / "run")
    _, answers = conversation(
        trainer,
        {"do": "pause"},
        {"do": "status"},
        {"do": "set", "settings": {"learning_rate": "0.5"}},
        {"do": "save"},
        {"do": "status"},
        {"do": "resume"},
        {"do": "status"},
    )
    paused, first, _, saved, second, resumed, after, _ = answers
    assert {a["step"] for a in (paused, first, saved, second, resumed)} == {
        paused["step"]
    }
    assert first["paused"]
    assert not after["paused"]
    assert trainer.step > paused["step"]
    again = make(blobs, None).load(
        tmp_path / "run",
        step=paused["step"],
    )
    assert again.state.controller.base["learning_rate"] == np.float32(0.5), (
        "the save was asked for after the change"
    )


def test_what_cannot_be_done_is_refused_and_changes_nothing(blobs, tmp_path):
    controller = lepton.controllers.Policy(
        "ahead",
        lambda: (),
        lambda signals, state: ({"accumulate": 2.0}, state),
        moves=("accumulate", "optimizer", "averaging_decay"),
    )
    trainer = make(
        blobs,
        tmp_path / "run",
        controller=controller,
        test=None,
        optimizer=lepton.controllers.switchable(optax.sgd, optax.adamw),
    )
    bad = [
        ({"learning_rat": "1"}, "did you mean 'learning_rate'"),
        ({"learning_rate": "-1"}, "can't be '-1'"),
        ({"learning_rate": "fast"}, "can't be 'fast'"),
        ({"clip_norm": "1"}, "not one of this run's knobs"),
        ({"optimizer": "2"}, "there are 2"),
        ({"accumulate": "1.5"}, "can't be '1.5'"),
        ({"skip": "1"}, "no knob 'skip'"),
        ({"learning_rate": "0.5", "averaging_decay": "2"}, "averaging_decay can't be"),
        ({}, "nothing is given"),
    ]
    requests = [{"do": "set", "settings": settings} for settings, _ in bad]
    history, answers = conversation(
        trainer,
        *requests,
        {"do": "fly"},
        {"do": "evaluate"},
        {"do": "set", "settings": {"accumulate": "4"}},
    )
    for answer, (_, text) in zip(answers, bad, strict=False):
        assert not answer["ok"] and text in answer["text"] and answer["remedy"], answer
    assert "a run can't 'fly'" in answers[-4]["text"]
    assert "nothing to evaluate on" in answers[-3]["text"]
    assert answers[-2]["text"].endswith("accumulate is 4, as far as ahead let it")
    assert set(history["learning_rate"]) == {np.float32(0.01)}
    assert set(history["accumulate"]) == {2}
    kinds = [line["kind"] for line in lepton.controllers.read_journal(tmp_path / "run")]
    assert kinds.count("live") == 2, "refused requests are events, not decisions"
    assert (
        sum(
            e["kind"] == "control" and not e["ok"]
            for e in read_events(tmp_path / "run")
        )
        == len(bad) + 2
    )


def test_a_live_change_replays_and_one_behind_the_checkpoint_is_told(blobs, tmp_path):
    trainer = make(blobs, tmp_path / "run")
    history, _ = conversation(
        trainer,
        {"do": "set", "settings": {"learning_rate": "3e-3"}},
        {"do": "save"},
        {"do": "set", "settings": {"learning_rate": "1e-3"}},
    )
    replay = lepton.controllers.replay(tmp_path / "run")
    same = make(blobs, None, controller=replay, steps=history.steps).fit()
    np.testing.assert_array_equal(same["loss"], history["loss"])
    first = Checkpoints(tmp_path / "run" / "checkpoints").steps()[0]
    # as if it had been killed before the last one
    Checkpoints(tmp_path / "run" / "checkpoints").set_aside(first)
    again = make(blobs, tmp_path / "run", steps=first + 5).resume()
    np.testing.assert_array_equal(again.fit()["learning_rate"], np.float32(3e-3))
    (warning,) = [
        e
        for e in read_events(tmp_path / "run")
        if e["kind"] == "warning"
        and "must be asked again" in e["text"]
        and "set" in e["text"]
    ]
    assert "0.001" in warning["text"]
    lines = lepton.controllers.read_journal(tmp_path / "run")
    assert [
        line["settings"]["learning_rate"]
        for line in lines
        if line.get("request") == "set"
    ] == [3e-3]


def test_a_second_process_may_not_work_in_the_folder_and_the_dead_do_not_answer(
    blobs, tmp_path
):
    (tmp_path / "run").mkdir()
    with pytest.raises(lepton.SettingError, match="the run is not at work"):
        ask(tmp_path / "run", {"do": "status"})
    with pytest.raises(lepton.SettingError, match="no such run folder"):
        ask(tmp_path / "walk", {"do": "status"})
    held = Mailbox(tmp_path / "run")
    with pytest.raises(lepton.SettingError, match=f"process {os.getpid()} on "):
        make(blobs, tmp_path / "run", steps=2).fit()
    with pytest.raises(lepton.SettingError, match="withdrawn"):
        ask(
            tmp_path / "run",
            {"do": "status"},
            timeout=0.2,
        )
    assert not list((tmp_path / "run" / "control").glob("*.request"))
    thread = threading.Timer(
        0.5,
        held.close,
        ["finished"],
    )
    thread.start()
    assert ask(tmp_path / "run", {"do": "save"}, timeout=20) == {
        "ok": False,
        "text": "the run has ended: finished",
    }
    thread.join()
    (tmp_path / "run" / "control").mkdir(exist_ok=True)
    (tmp_path / "run" / "control" / "run.json").write_text(
        json.dumps({"pid": 1, "host": mailbox.platform.node()})
    )
    # killed: the file is there, its lock is not
    with pytest.raises(lepton.SettingError, match=r"process 1 on .* has gone"):
        ask(tmp_path / "run", {"do": "status"})
    make(blobs, tmp_path / "run", steps=2).fit()


def test_requests_that_came_while_it_compiled_and_rubbish_beside_them(
    blobs, tmp_path, monkeypatch
):
    monkeypatch.setattr(mailbox, "POLL_SECONDS", 0.0)
    control = tmp_path / "run" / "control"
    late = time.time() + 60
    control.mkdir(parents=True)
    for index, request in enumerate(
        [
            {
                "do": "set",
                "settings": {"learning_rate": "0.5"},
                "until": late,
            },
            {"do": "stop", "until": time.time() - 1},
            {
                "do": "set",
                "settings": {"learning_rate": "0.25"},
                "until": late,
            },
            ["stop"],
        ]
    ):
        (control / f"{index}.request").write_text(json.dumps(request))
    (control / "9.request").write_text("{not json")
    history = make(blobs, tmp_path / "run", steps=4, steps_per_call=1).fit()
    assert history["learning_rate"].tolist() == [
        np.float32(0.01),
        0.25,
        0.25,
        0.25,
    ]
    assert history.status == "finished"
    assert not list(control.glob("*.request"))
    assert len(list(control.glob("*.answer"))) == 2


def test_the_seat_for_servers_asks_for_the_token(blobs, tmp_path):
    from lepton_jax.cli.control import apply

    held = Mailbox(tmp_path / "run")
    token = json.loads((tmp_path / "run" / "control" / "run.json").read_text())["token"]
    assert (tmp_path / "run" / "control" / "run.json").stat().st_mode & 0o077 == 0
    with pytest.raises(lepton.SettingError, match="token"):
        apply(
            tmp_path / "run",
            {"do": "status"},
            token="0" * 32,
            timeout=0.2,
        )
    with pytest.raises(lepton.SettingError, match="withdrawn"):
        apply(
            tmp_path / "run",
            {"do": "status"},
            token=token,
            timeout=0.2,
        )
    held.close("finished")


def test_it_looks_at_the_folder_four_times_a_second_at_most(
    blobs, tmp_path, monkeypatch
):
    looks = []
    claimed = Mailbox._claimed
    monkeypatch.setattr(
        Mailbox,
        "_claimed",
        lambda self: looks.append(time.monotonic()) or claimed(self),
    )
    history = make(
        blobs,
        tmp_path / "run",
        steps=4000,
        optimizer=partial(optax.sgd),
    ).fit()
    assert len(looks) <= 4 * history.seconds + 3

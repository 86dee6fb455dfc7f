"""Stops and rollbacks: when, from which checkpoint, with which data, how often."""

import json
import math
import time
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

import lepton_jax as lepton
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.controller import Policy, guard, read_journal, replay
from lepton_jax.hosts import mailbox
from lepton_jax.monitor import read_events

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Sink:
    """Calls a function with each event."""

    def __init__(self, function):
        self.event = function

    def close(self):
        pass


def make(blobs, folder=None, **fields):
    fields = {
        "optimizer": optax.adam,
        "learning_rate": 0.01,
        "batch_size": 25,
        "devices": 1,
        "steps": 60,
        "save_every": 10,
        "log_every": 5,
    } | fields
    return lepton.Trainer(
        model=lambda rngs: lepton.models.MLP((12, 16, 3), rngs=rngs),
        loss=lepton.losses.cross_entropy,
        train=blobs,
        run_dir=folder,
        **fields,
    )


def asking(knob, steps, **limits):
    """A policy that asks for something in these steps, each time that it comes by."""
    return Policy(
        "asking",
        lambda: (),
        lambda signals, state: (
            {knob: jnp.isin(signals["step"] + 1, jnp.array(steps, jnp.float32))},
            state,
        ),
        ("step", "loss"),
        (knob,),
        limits,
    )


def of(folder, kind):
    return [event for event in read_events(folder) if event["kind"] == kind]


def spoiled(blobs, first, last):
    """Four times the samples; the inputs of steps first + 1 to last are no numbers."""
    inputs, targets = (np.tile(x, (4, *[1] * (x.ndim - 1))) for x in blobs)
    inputs[first * 25 : last * 25] = np.nan
    return inputs, targets


def positions(folder):
    checkpoints = Checkpoints(folder / "checkpoints")
    return {
        step: checkpoints._record(step)[0]["position"]["samples"]
        for step in checkpoints.steps()
    }


def assert_same(left, right):
    for a, b in zip(
        *(jax.tree.leaves((t.state.params, t.state.optimizer)) for t in (left, right)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


# ---- stops ----


@pytest.mark.parametrize("per_call", [1, 8])
def test_a_policy_stops_the_run_at_exactly_its_step(per_call, blobs, tmp_path):
    fields = {
        "test": blobs,
        "evaluate_every": 1000,
        "save_every": 1000,
        "log_every": 1000,
        "steps": 2000,
        "steps_per_call": per_call,
    }
    stopped = make(
        blobs,
        tmp_path / "run",
        controller=asking("stop", (37,)),
        **fields,
    )
    history = stopped.fit()
    assert (stopped.step, history.steps, history.status, int(stopped.state.step)) == (
        37,
        37,
        "finished",
        37,
    )
    plain = make(blobs, **fields | {"steps": 37})
    np.testing.assert_array_equal(plain.fit()["loss"], history["loss"])
    assert_same(stopped, plain)
    assert (
        history.reason
        == f"stopped by asking at step 37 because loss is {history['loss'][-1]:.6g}"
    )
    assert of(tmp_path / "run", "end")[0]["reason"] == history.reason
    assert "stopped by asking" in str(history)
    assert positions(tmp_path / "run") == {37: 37 * 25}
    assert history.evaluations[-1][0] == 37
    again = make(
        blobs,
        tmp_path / "run",
        controller=asking("stop", (37,)),
        **fields,
    ).resume()
    assert again.fit().steps == 0, "a stopped run stays where it is"
    assert again.fit(steps=3).steps == 3, "unless it is asked for more"
    whole = make(
        blobs,
        controller=asking("stop", ()),
        **fields | {"steps": 40},
    )
    whole.fit()
    assert_same(again, whole)


def test_policies_see_what_the_host_measures(blobs, tmp_path):
    seen = (
        "evaluation_loss",
        "evaluations",
        "progress",
        "seconds",
        "data_wait",
        "price",
    )
    look = Policy(
        "look",
        lambda: (),
        lambda signals, state: (
            {
                "stop": (
                    (signals["evaluation_loss"] < 0.5) & (signals["evaluations"] >= 2)
                )
            },
            state,
        ),
        seen,
        ("stop",),
    )
    trainer = make(
        blobs,
        tmp_path / "run",
        controller=look,
        test=blobs,
        evaluate_every=7,
        steps=700,
        learning_rate=0.02,
    )
    history = trainer.fit()
    losses = dict(history.evaluations)
    stopped = (
        min(step for step in losses if losses[step]["loss"] < 0.5 and step > 7) + 1
    )
    assert history.steps == stopped
    assert f"evaluation_loss is {losses[stopped - 1]['loss']:.6g}" in history.reason
    known = np.array([step - 1 for step in range(1, stopped + 1)]) // 7
    np.testing.assert_array_equal(history["evaluations"], known)
    np.testing.assert_array_equal(
        history["evaluation_loss"],
        np.float32([losses[7 * n]["loss"] if n else np.nan for n in known]),
    )
    assert 0 < history["seconds"][-1] < history.seconds
    assert (np.diff(history["seconds"]) >= 0).all()
    assert (history["price"] == 0).all()
    assert (history["data_wait"] < 1).all()
    ended = lepton.controllers.until(seconds=0.5)
    soon = make(
        blobs,
        controller=ended,
        steps=10**6,
        save_every=None,
        evaluate_every=10**6,
    ).fit()
    assert soon.status == "finished"
    assert soon.steps < 10**6
    assert "seconds is" in soon.reason


# ---- rollbacks ----


def test_each_rollback_goes_further_back_and_they_are_bounded(blobs, tmp_path):
    folder = tmp_path / "run"
    trainer = make(
        blobs,
        folder,
        keep=10,
        controller=asking(
            "rollback",
            (33,),
            rollbacks=3,
            rate=0.5,
        ),
    )
    with pytest.raises(
        lepton.DivergedError,
        match=r"asking gave up at step 33: loss is .* after 3 rollbacks: at step 33 .* "
        r"back to step 30, .* back to step 20, .* back to step 30, learning rate times"
        r" 0\.125",
    ):
        trainer.fit()
    assert [
        (e["step"], e["to"], e["count"], e["rate"]) for e in of(folder, "rollback")
    ] == [
        (33, 30, 1, 0.5),
        (33, 20, 2, 0.25),
        (33, 30, 3, 0.125),
    ]
    # behind the data of steps 1 to 33, of 31 to 33, and of 21 to 30
    assert positions(folder) == {0: 0, 10: 250, 20: 500, 30: (33 + 3 + 10) * 25}
    assert [p.name for p in sorted((folder / "set_aside").iterdir())] == ["30"]
    assert of(folder, "end")[0]["status"] == "diverged"


def test_the_rate_is_lowered_for_a_while_then_for_good(blobs, tmp_path):
    trainer = make(
        blobs,
        tmp_path / "run",
        steps=50,
        controller=(
            asking(
                "rollback",
                (38,),
                rollbacks=2,
                rate=0.5,
            ),
        ),
        learning_rate=optax.constant_schedule(0.01),
    )
    with pytest.raises(lepton.DivergedError):
        trainer.fit()
    assert [(e["to"], e["rate"]) for e in of(tmp_path / "run", "rollback")] == [
        (30, 0.5),
        (20, 0.25),
    ]
    after = [{}]
    for event in read_events(tmp_path / "run"):
        if event["kind"] == "steps":
            after[-1] |= dict(
                enumerate(event["records"]["learning_rate"], event["first"])
            )
        after += [{}] if event["kind"] == "rollback" else []
    first, second = ([values[step] for step in sorted(values)] for values in after[1:])
    # 8 steps back: two to grow again
    np.testing.assert_allclose(
        first,
        [0.005, 0.0075, *[0.01] * 6],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        second,
        [
            0.0025,
            0.003125,
            0.00375,
            0.004375,
            *[0.005] * 14,
        ],
        rtol=1e-6,
    )


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_rolls_back_the_same_way_again_and_a_kill_forgets_nothing(
    killed, blobs, tmp_path
):
    data = spoiled(blobs, 33, 35)
    fields = {
        "shuffle": False,
        "controller": Policy(
            "bounds",
            lambda: (),
            lambda signals, state: ({}, state),
            limits={"rollbacks": 2, "rate": 0.5},
        ),
    }
    whole = make(data, tmp_path / "whole", **fields)
    expected = whole.fit()
    assert expected.steps == 60
    assert [e["to"] for e in of(tmp_path / "whole", "rollback")] == [30, 20]
    assert np.isfinite(expected["loss"]).all()
    assert positions(tmp_path / "whole")[60] == (60 + 4 + 11) * 25

    def kill(event):
        if killed and event["kind"] == "steps" and of(tmp_path / "run", "rollback"):
            raise KeyboardInterrupt

    part = make(
        data,
        tmp_path / "run",
        sinks=[Sink(kill)],
        **fields,
    )
    for _ in range(5):
        try:
            part.fit()
            break
        # right after a rollback, before anything newer is saved
        except KeyboardInterrupt:
            part = make(data, tmp_path / "run", **fields).resume()
            assert part._record.rollbacks["count"] == len(
                of(tmp_path / "run", "rollback")
            )
    assert_same(part, whole)
    assert [(e["step"], e["to"]) for e in of(tmp_path / "run", "rollback")] == [
        (34, 30),
        (31, 20),
    ]
    assert read_journal(tmp_path / "run")[-1] == read_journal(tmp_path / "whole")[-1]
    assert part.run_dir.joinpath("rollback.json").exists()
    np.testing.assert_array_equal(
        part.state.controller.rate, whole.state.controller.rate
    )


def test_a_run_that_went_back_replays_to_the_bit(blobs, tmp_path):
    data = spoiled(blobs, 33, 35)
    policy = Policy(
        "finite",
        lambda: (),
        lambda signals, state: ({"rollback": ~jnp.isfinite(signals["loss"])}, state),
        ("loss", "gradient_norm"),
        ("rollback", "clip_norm"),
        {"rollbacks": 2, "rate": 0.5},
    )
    fields = {
        "steps_per_call": 4,
        "shuffle": False,
        "controller": policy,
        "learning_rate": optax.linear_schedule(0.02, 0.0, 60),
    }
    trainer = make(data, tmp_path / "run", **fields)
    history = trainer.fit()
    assert [(e["step"], e["to"]) for e in of(tmp_path / "run", "rollback")] == [
        (34, 30),
        (31, 20),
    ]
    again = make(data, **fields | {"controller": replay(tmp_path / "run")})
    same = again.fit()
    for name in ("loss", "learning_rate"):
        np.testing.assert_array_equal(same[name], history[name])
    assert_same(again, trainer)


def test_without_a_run_folder_there_is_nothing_to_go_back_to(blobs):
    with pytest.raises(
        lepton.DivergedError, match="asking gave up at step 5"
    ) as caught:
        make(blobs, controller=asking("rollback", (5,), rollbacks=2)).fit()
    assert "needs a run_dir" in caught.value.remedy


def test_history_and_report_leave_out_what_was_undone(blobs, tmp_path):
    seen = []
    policy = Policy(
        "bounds",
        lambda: (),
        lambda signals, state: ({}, state),
        limits={"rollbacks": 1},
    )
    trainer = make(
        spoiled(blobs, 33, 34),
        tmp_path / "run",
        shuffle=False,
        controller=policy,
        test=blobs,
        evaluate_every=16,
        sinks=[Sink(lambda e: seen.append(e["kind"]))],
    )
    history = trainer.fit()
    assert seen.count("rollback") == 1
    assert history.steps == 60
    assert history.last == 60
    assert [step for step, _ in history.evaluations] == [16, 32, 48, 60]
    assert history.samples == (60 + 4) * 25
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rolled back" in page


# ---- faults, on a real task ----

BATCH = 50
STEPS = 500
AT = 200


@cache
def digits(fault):
    """Batches of digits in a fixed order, the fault from step AT on: (train, test)."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x = (x[order] / 16).astype(np.float32)
    y = y[order].astype(np.int32)
    rows = np.concatenate(
        [np.random.default_rng(epoch).permutation(1400) for epoch in range(20)]
    )[: BATCH * (STEPS + 50)]
    inputs = x[rows]
    targets = y[rows]
    rng = np.random.default_rng(1)
    if fault == "nan":
        inputs[BATCH * AT : BATCH * (AT + 1)] = np.nan
    if fault == "burst":
        span = slice(BATCH * AT, BATCH * (AT + 20))
        inputs[span], targets[span] = (
            50 * rng.normal(size=inputs[span].shape),
            rng.integers(0, 10, BATCH * 20),
        )
    if fault == "labels":
        wrong = rng.random(len(targets)) < 0.3
        wrong[: BATCH * AT] = False
        targets = np.where(wrong, rng.integers(0, 10, len(targets)), targets).astype(
            np.int32
        )
    return (inputs, targets), (x[1400:], y[1400:])


@cache
def final(fault, guarded, folder):
    """(evaluation loss at the end, rollbacks) of a run; None where it diverged."""
    folder = folder / f"{fault}{guarded}"

    def ask(event):  # a person sets a rate at which everything diverges
        if fault == "rate" and event["kind"] == "steps" and event["last"] == AT:
            request = {
                "do": "set",
                "settings": {"learning_rate": "30"},
                "until": time.time() + 99,
            }
            (folder / "control" / "1.request").write_text(json.dumps(request))

    train, test = digits(fault)
    trainer = lepton.Trainer(
        model=lambda rngs: lepton.models.MLP(
            (64, 64, 10),
            rngs=rngs,
        ),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=optax.cosine_decay_schedule(3e-3, STEPS),
        train=train,
        test=test,
        batch_size=BATCH,
        steps=STEPS,
        shuffle=False,
        devices=1,
        # any rate is followed, so that it is a rollback that helps
        controller=guard(jump=math.inf) if guarded else (),
        run_dir=folder,
        save_every=40,
        log_every=10,
        evaluate_every=STEPS,
        sinks=[Sink(ask)],
    )
    try:
        return trainer.fit().metrics["loss"], len(of(folder, "rollback"))
    except lepton.DivergedError:
        return None, len(of(folder, "rollback"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.mark.parametrize(
    "fault",
    [
        "nan",
        pytest.param("burst", marks=pytest.mark.slow),
        pytest.param("rate", marks=pytest.mark.slow),
    ],
)
def test_with_the_guard_a_fault_costs_less_than_one_per_cent(
    fault, folder, monkeypatch
):
    monkeypatch.setattr(mailbox, "POLL_SECONDS", 0.0)
    clean, _ = final("none", True, folder)
    assert clean == final("none", False, folder)[0], (
        "where nothing happens the guard does nothing"
    )
    guarded, rollbacks = final(fault, True, folder)
    plain, _ = final(fault, False, folder)
    assert abs(guarded / clean - 1) < 0.01
    assert plain is None or plain > 1.1 * clean
    assert rollbacks == (fault == "rate"), (
        "a checkpoint from after the rate was set is no good"
    )


def test_labels_that_become_worse_for_good_are_no_spike(folder):
    guarded, rollbacks = final("labels", True, folder)
    plain, _ = final("labels", False, folder)
    # the first of them are unlike those before and held back, which does no harm
    assert guarded / plain < 1.01
    assert rollbacks == 0

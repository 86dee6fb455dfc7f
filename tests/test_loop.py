"""The loop's contract: when it measures, saves, compiles and waits."""

import json
import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.monitor import read_events
from lepton_jax.train.cadence import Cadence
from lepton_jax.train.run_record import RunRecord

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Events:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.seen = []

    def event(self, event):
        self.seen.append(event)

    def close(self):
        pass

    def of(self, *kinds):
        return [e for e in self.seen if e["kind"] in kinds]


def net(rngs):
    return lepton.models.MLP((12, 16, 3), rngs=rngs)


def make(blobs, **fields):
    sink = Events()
    fields = {
        "optimizer": optax.sgd(0.1),
        "batch_size": 25,
        "metrics": {"accuracy": lepton.metrics.accuracy},
        "devices": 1,
        "sinks": [sink],
    } | fields
    return (
        lepton.Trainer(
            model=net,
            loss=lepton.losses.cross_entropy,
            train=blobs,
            **fields,
        ),
        sink,
    )


def test_a_record_is_measured_before_its_update(blobs):
    trainer, _ = make(
        blobs,
        shuffle=False,
        steps_per_call=4,
    )
    before = trainer.evaluate((blobs[0][:25], blobs[1][:25]))
    history = trainer.fit(steps=3)
    assert history["loss"][0] == pytest.approx(before.loss, rel=1e-6)
    assert history["accuracy"][0] == pytest.approx(before.accuracy)


def test_order_of_reading_evaluating_and_saving(blobs, tmp_path):
    trainer, sink = make(
        blobs,
        test=blobs,
        run_dir=tmp_path / "run",
        evaluate_every=10,
        save_every=5,
        log_every=7,
        steps_per_call=4,
    )
    trainer.fit(steps=23)
    order = [
        (e["kind"], e.get("last", e.get("step")))
        for e in sink.of("steps", "evaluation", "save")
    ]
    # a look at the records in between reports what the devices have finished by then,
    # and never waits
    order = [
        (kind, step)
        for kind, step in order
        if kind != "steps" or step in (5, 10, 15, 20, 23)
    ]
    assert order == [
        ("steps", 5),
        ("save", 5),
        ("steps", 10),
        ("evaluation", 10),
        ("save", 10),
        ("steps", 15),
        ("save", 15),
        ("steps", 20),
        ("evaluation", 20),
        ("save", 20),
        ("steps", 23),
        ("evaluation", 23),
        ("save", 23),
    ]
    windows = sink.of("steps")
    assert [w["first"] for w in windows] == [1, *(w["last"] + 1 for w in windows[:-1])]
    assert all(len(w["records"]["loss"]) == w["last"] - w["first"] + 1 for w in windows)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [15, 20, 23]


def test_a_checkpoint_holds_the_position_of_the_next_sample(blobs, tmp_path):
    trainer, _ = make(
        blobs,
        run_dir=tmp_path / "run",
        save_every=5,
        steps_per_call=4,
    )
    trainer.fit(steps=10)
    for step in (5, 10):
        record = Checkpoints(tmp_path / "run" / "checkpoints")._record(step)[0]
        assert record["position"] == {
            "samples": step * 25,
            "grain": None,
            "seed": 0,
            "of": 600,
        }


def test_epochs_end_at_the_first_step_past_them(blobs):
    inputs, targets = blobs
    trainer, sink = make(
        (inputs[:90], targets[:90]),
        test=(inputs[:10], targets[:10]),
    )
    trainer.fit(epochs=3)  # 90 / 25 = 3.6 steps an epoch
    assert [e["step"] for e in sink.of("evaluation")] == [4, 8, 11]


def test_every_sample_is_consumed_once_an_epoch(blobs):
    consumed = []
    inputs = np.arange(90, dtype=np.float32)[:, None].repeat(12, 1)

    def spy(outputs, targets):
        jax.debug.callback(lambda t: consumed.extend(t.tolist()), targets)
        return (
            optax.losses.squared_error(outputs[:, 0], targets.astype(jnp.float32))
            * 1e-6
        )

    trainer = lepton.Trainer(
        model=net,
        loss=spy,
        optimizer=optax.sgd(0.0),
        batch_size=25,
        steps_per_call=4,
        devices=1,
    )
    trainer.fit((inputs, np.arange(90)), epochs=2)
    jax.effects_barrier()
    assert sorted(consumed[:90]) == list(range(90)) == sorted(consumed[90:180])
    assert consumed[:90] != consumed[90:180] != list(range(90))
    # eight batches of 25: the last is filled up from the third epoch
    assert len(consumed) == 200


def test_one_compilation_whatever_the_cadence(blobs):
    trainer, sink = make(
        blobs,
        test=(blobs[0][:77], blobs[1][:77]),
        evaluate_every=9,
        log_every=4,
        steps_per_call=8,
    )
    trainer.fit(steps=31)
    trainer.fit(steps=5)
    assert [(e["program"], e["count"]) for e in sink.of("compile")] == [
        ("init", 1),
        ("train", 1),
        ("evaluate", 1),
    ]


def test_a_second_compilation_says_what_changed(blobs):
    trainer, _ = make(grain.MapDataset.source(list(zip(*blobs, strict=True))))
    trainer.fit(steps=2)
    program = trainer.program
    inputs, targets = (jnp.asarray(x[:16]) for x in blobs)
    block = (
        jax.tree.map(lambda x: x[None], (inputs, targets))
        if program.plan.steps_per_call > 1
        else (inputs, targets)
    )
    program.train(trainer.state, block, 0, 1)
    last = program.compilations[-1]
    assert (last.program, last.count) == ("train", 2)
    assert "25, 12" in last.changed
    assert "16, 12" in last.changed
    assert "int32" in last.changed


@pytest.mark.parametrize("samples", [1, 24, 25, 26, 77])
def test_evaluation_counts_each_sample_once(samples, blobs):
    inputs, targets = (x[:samples] for x in blobs)
    trainer, _ = make(blobs)
    trainer.fit(steps=2)
    found = trainer.evaluate((inputs, targets))
    logits = trainer.predict(inputs, decode=lambda outputs: outputs)
    expected = optax.softmax_cross_entropy_with_integer_labels(
        jnp.asarray(logits), targets
    )
    assert logits.shape == (samples, 3)
    assert found.loss == pytest.approx(float(expected.mean()), rel=1e-5)
    assert found.accuracy == pytest.approx((logits.argmax(1) == targets).mean())
    np.testing.assert_array_equal(trainer.predict(inputs), logits.argmax(1))


def test_a_mean_loss_is_evaluated_like_the_losses_it_is_the_mean_of(blobs):
    inputs, targets = (x[:31] for x in blobs)

    def mean(outputs, labels):
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels)
        return losses.mean()

    trainer = lepton.Trainer(
        model=net,
        loss=mean,
        optimizer=optax.sgd(0.1),
        batch_size=25,
        devices=1,
    )
    per_sample, _ = make(blobs)
    np.testing.assert_array_equal(
        trainer.fit(blobs, steps=5)["loss"], per_sample.fit(steps=5)["loss"]
    )
    assert trainer.evaluate((inputs, targets)).loss == pytest.approx(
        per_sample.evaluate((inputs, targets)).loss,
        rel=1e-5,
    )


def test_a_row_of_padding_that_is_nan_does_not_count():
    outputs = jnp.array([[1.0], [jnp.nan]])
    targets = jnp.array([[0.0], [0.0]])
    total, weight = lepton.losses.weighted_sum(
        optax.squared_error,
        outputs,
        targets,
        jnp.array([True, False]),
    )
    assert (float(total), float(weight)) == (1.0, 1.0)


def test_grain_data_sets_train_like_arrays_and_resume(blobs, tmp_path):
    pairs = list(zip(*blobs, strict=True))
    source = grain.MapDataset.source(pairs)
    of_arrays, _ = make(blobs, shuffle=False)
    of_grain, _ = make(source, shuffle=False)
    expected = of_arrays.fit(steps=12)["loss"]
    np.testing.assert_array_equal(of_grain.fit(steps=12)["loss"], expected)
    endless = source.repeat().to_iter_dataset()
    streamed, _ = make(
        endless,
        shuffle=False,
        steps=12,
        run_dir=tmp_path / "run",
        save_every=5,
    )
    np.testing.assert_array_equal(streamed.fit()["loss"], expected)
    again, _ = make(
        endless,
        shuffle=False,
        steps=12,
    )
    np.testing.assert_array_equal(
        again.load(tmp_path / "run", step=5).fit()["loss"], expected[5:]
    )


def test_events_are_on_disk_before_their_checkpoint(blobs, tmp_path, monkeypatch):
    seen = []
    save = Checkpoints.save

    def spy(self, step, *rest):
        events = read_events(tmp_path / "run" / "events.jsonl")
        seen.append(
            (
                step,
                max(
                    (e["last"] for e in events if e["kind"] == "steps"),
                    default=0,
                ),
            )
        )
        return save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", spy)
    make(blobs, run_dir=tmp_path / "run", save_every=4)[0].fit(steps=8)
    assert seen == [(4, 4), (8, 8)]


def test_policies_see_the_signals_and_their_state_is_saved(blobs, tmp_path):
    smoothed = lepton.controllers.Policy(
        "smoothed",
        lambda: jnp.float32(0),
        lambda signals, mean: ({}, 0.9 * mean + 0.1 * signals["loss"]),
        ("loss",),
    )
    trainer, _ = make(
        blobs,
        controller=(smoothed,),
        run_dir=tmp_path / "run",
        steps=20,
    )
    history = trainer.fit()
    expected = np.float32(0)
    for loss in history["loss"]:
        expected = np.float32(0.9) * expected + np.float32(0.1) * loss
    assert float(trainer.state.controller.policies[0]) == pytest.approx(
        float(expected), rel=1e-5
    )
    plain, _ = make(blobs)
    np.testing.assert_array_equal(plain.fit(steps=20)["loss"], history["loss"])
    again, _ = make(blobs, controller=(smoothed,))
    assert (
        again.load(tmp_path / "run").state.controller.policies
        == trainer.state.controller.policies
    )


def test_fit_again_goes_on(blobs):
    whole, _ = make(blobs, batch_size=30)
    parts, _ = make(blobs, batch_size=30)
    expected = whole.fit(epochs=2)["loss"]
    np.testing.assert_array_equal(
        np.concatenate([parts.fit(epochs=1)["loss"], parts.fit(epochs=1)["loss"]]),
        expected,
    )
    assert parts.step == 40


def test_other_batch_sizes_keep_the_state(blobs):
    trainer, _ = make(blobs)
    trainer.fit(steps=40)
    before = trainer.evaluate(blobs)
    trainer.fit(steps=1, batch_size=50)
    after = trainer.evaluate(blobs)
    assert trainer.step == 41
    assert abs(after.loss - before.loss) < 0.1
    assert after.loss != before.loss


def test_history_and_evaluation_show_themselves(blobs):
    trainer, _ = make(
        blobs,
        test=blobs,
        evaluate_every=5,
    )
    history = trainer.fit(steps=10)
    lines = str(history).splitlines()
    assert lines[0].split() == [
        "step",
        "train",
        "loss",
        "test",
        "loss",
        "test",
        "accuracy",
    ]
    assert [line.split()[0] for line in lines[1:3]] == [
        "5",
        "10",
    ]
    assert "finished: 10 steps" in lines[3]
    assert "<table>" in history._repr_html_()
    assert history.metrics["loss"] == history.evaluations[-1][1]["loss"]


def test_rnn_carries_and_sown_values_leave_the_state_as_it_is(blobs):
    class Sows(nnx.Module):
        def __init__(self, rngs):
            self.last = nnx.Linear(12, 3, rngs=rngs)
            self.count = nnx.Variable(jnp.int32(0))

        def __call__(self, x):
            self.sow(
                nnx.Intermediate,
                "seen",
                x.mean(),
            )
            self.count[...] = self.count[...] + 1
            return self.last(x)

    trainer = lepton.Trainer(
        model=Sows,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        batch_size=25,
        devices=1,
    )
    trainer.fit(blobs, steps=7)
    assert int(trainer.state.variables["count"]) == 7
    assert list(trainer.state.variables) == ["count"]


def test_the_run_folder_holds_what_the_design_says(blobs, tmp_path):
    trainer, _ = make(
        blobs,
        test=blobs,
        run_dir=tmp_path / "run",
        epochs=1,
    )
    trainer.fit()
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "recipe.json",
        "plan.json",
        "events.jsonl",
        "checkpoints",
        "report.html",
    }
    assert (
        json.loads((tmp_path / "run" / "recipe.json").read_text())["fields"][
            "batch_size"
        ]
        == 25
    )
    assert (
        lepton.Plan.from_json((tmp_path / "run" / "plan.json").read_text())
        == trainer.program.plan
    )


def test_a_resumed_run_must_find_its_own_data(blobs, tmp_path):
    make(blobs, run_dir=tmp_path / "run", steps=10)[0].fit()
    for change, fragment in (
        ({"seed": 1}, "the seed of the shuffling was 0 and is 1"),
        (
            {"train": (blobs[0][:500], blobs[1][:500])},
            "the number of samples was 600 and is 500",
        ),
    ):
        trainer, _ = make(
            blobs,
            run_dir=tmp_path / "run",
            steps=20,
        )
        trainer.recipe = trainer.recipe.with_(**change)
        with pytest.raises(lepton.CheckpointError, match=fragment):
            trainer.resume().fit()
    loaded, _ = make(blobs, steps=20)
    history = loaded.load(tmp_path / "run").fit(
        (blobs[0][:500], blobs[1][:500]),
        steps=2,
    )
    assert history.steps == 2 and loaded._record.position.samples == 50, (
        "other data begins at its first sample"
    )


def test_only_a_checkpoint_of_an_evaluated_step_competes_for_the_best(blobs, tmp_path):
    trainer, sink = make(
        blobs,
        test=blobs,
        run_dir=tmp_path / "run",
        evaluate_every=20,
        save_every=5,
        best="-loss",
        keep=1,
    )
    trainer.fit(steps=55)
    losses = {e["step"]: e["metrics"]["loss"] for e in sink.of("evaluation")}
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == sorted(
        {min(losses, key=losses.get), 55}
    )


def test_a_run_that_diverges_leaves_a_report_and_its_last_good_step(blobs, tmp_path):
    trainer, sink = make(
        blobs,
        optimizer=optax.sgd(optax.piecewise_constant_schedule(0.1, {12: 1e30})),
        run_dir=tmp_path / "run",
        save_every=5,
    )
    with pytest.raises(lepton.DivergedError, match="step 1") as caught:
        trainer.fit(steps=40)
    assert "step 10 is the last committed checkpoint" in caught.value.remedy
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [5, 10]
    assert sink.of("end")[0]["status"] == "diverged"
    assert sink.of("end")[0]["seconds"] > 0
    assert "diverged" in (tmp_path / "run" / "report.html").read_text()


class FailingLate:
    """Test samples of which some can't be read."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index > 40:
            raise RuntimeError("the disk is gone")
        return np.ones(12, np.float32), np.int32(1)


def test_an_evaluation_that_fails_costs_no_training(blobs, tmp_path):
    def make(test):
        return lepton.Trainer(
            model=lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs),
            loss=lepton.losses.cross_entropy,
            optimizer=optax.adam(1e-2),
            train=blobs,
            test=test,
            batch_size=30,
            steps=20,
            evaluate_every=10,
            devices=1,
            run_dir=tmp_path / "run",
        )

    expected = make(None).fit()["loss"]
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(lepton.DataError, match="the disk is gone"):
        make(grain.MapDataset.source(FailingLate())).fit()
    resumed = make(None).resume()
    assert resumed.step == 10
    np.testing.assert_array_equal(resumed.fit()["loss"], expected[10:])


class FailingInEvaluation(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x, *, train: bool):
        return self.layer(x) if train else self.layer(x[:, :3])


@pytest.mark.parametrize("what", ["model", "metric", "decode"])
def test_what_fails_outside_of_training_fails_before_the_first_step(
    what, blobs, tmp_path
):
    def metric(outputs, targets):
        return outputs[:, 7] if outputs.shape[0] != 30 else outputs[:, 9:].max(-1)

    changes = {
        "model": {"model": FailingInEvaluation},
        "metric": {"metrics": {"odd": metric}},
        "decode": {"decode": lambda outputs: outputs @ outputs},
    }[what]
    fields = {
        "model": lambda rngs: lepton.models.MLP((12, 8, 3), rngs=rngs),
        "loss": lepton.losses.cross_entropy,
        "optimizer": optax.sgd(0.1),
        "train": blobs,
        "test": blobs,
        "batch_size": 30,
        "steps": 20,
        "devices": 1,
        "run_dir": tmp_path / "run",
    }
    trainer = lepton.Trainer(**fields | changes)
    with pytest.raises(lepton.ModelError, match=r"test_loop\.py"):
        trainer.fit()
    assert trainer.step == 0
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_cadence_by_steps_and_by_epochs():
    fields = {
        "model": net,
        "loss": lepton.losses.cross_entropy,
        "optimizer": optax.sgd(0.1),
        "batch_size": 25,
    }
    by_steps = lepton.Recipe(**fields, evaluate_every=4, save_every=6)
    cadence = Cadence(by_steps, epoch=60, until=10)
    steps = range(1, 11)
    stops = [0]
    while stops[-1] < 10:
        stops.append(cadence.next_stop(stops[-1], 25 * stops[-1]))

    assert [step for step in steps if cadence.evaluates(step, 25 * step)] == [4, 8]
    assert [step for step in steps if cadence.saves(step, 25 * step)] == [6]
    assert stops == [0, 4, 6, 8, 10]

    by_epochs = Cadence(lepton.Recipe(**fields), epoch=60, until=10)
    ends = [step for step in steps if by_epochs.evaluates(step, 25 * step)]
    assert ends == [3, 5, 8, 10], "after the first step at or past an epoch's end"


def test_a_record_is_read_as_it_was_written_and_older_ones_lack_some():
    position = {"samples": 50, "grain": None, "seed": 0, "of": 600}
    content = {
        "position": position,
        "plan": "{}",
        "journal": 3,
        "rollbacks": {"count": 0, "used": [], "tried": []},
        "stopped": None,
        "given": {"values": {}, "policies": [], "schedule": None},
    }
    assert json.dumps(RunRecord.from_json(content).to_json()) == json.dumps(content)

    older = RunRecord.from_json({"position": {"samples": 50, "grain": None}})
    assert older.position.samples == 50
    assert older.position.order == {}
    assert older.journal is None
    assert older.given is None

"""A run that is resumed, or a model that is loaded, by a recipe that says otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_inputs import RECIPE, write

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.checkpoint.durable import Checkpoints
from lepton_jax.cli import launch as cli
from lepton_jax.data.arrays import ArraysByPosition
from lepton_jax.monitor import read_events
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")


def net(rngs):
    return lepton.models.MLP((12, 8, 3), rngs=rngs)


def trainer(
    blobs,
    run_dir=None,
    **changes,
) -> lepton.Trainer:
    fields = {
        "model": net,
        "loss": lepton.losses.cross_entropy,
        "optimizer": optax.sgd,
        "learning_rate": 0.1,
        "train": blobs,
        "batch_size": 30,
        "steps": 4,
        "save_every": 4,
    }
    return lepton.Trainer(
        devices=1,
        run_dir=run_dir,
        **fields | changes,
    )


def equal(left, right) -> bool:
    pairs = zip(
        jax.tree.leaves(left),
        jax.tree.leaves(right),
        strict=True,
    )
    return all(np.array_equal(a, b) for a, b in pairs)


def leaves(tree) -> dict:
    return {path: np.asarray(leaf) for path, leaf in by_path(tree).items()}


def test_a_resumed_run_trains_at_the_rate_that_is_given_now(blobs, tmp_path):
    trainer(blobs, tmp_path / "run").fit()
    with pytest.warns(UserWarning, match="learning_rate is 0.001, as the recipe says"):
        resumed = trainer(
            blobs, tmp_path / "run", steps=8, learning_rate=0.001
        ).resume()
    history = resumed.fit()
    np.testing.assert_array_equal(history["learning_rate"], np.float32([0.001] * 4))

    # the same as going on by hand at that rate
    by_hand = trainer(
        blobs,
        steps=8,
        learning_rate=lambda n: jnp.where(n < 4, 0.1, 0.001),
    )
    by_hand.fit()
    assert equal(resumed.state.params, by_hand.state.params)


def test_the_run_folder_says_what_was_changed(blobs, tmp_path):
    trainer(blobs, tmp_path / "run").fit()
    with pytest.warns(UserWarning):
        resumed = trainer(blobs, tmp_path / "run", steps=8, learning_rate=0.5).resume()
    resumed.fit()
    lines = controllers.read_journal(tmp_path / "run")
    given = [line for line in lines if line["kind"] == "recipe"]
    assert given == [{"kind": "recipe", "step": 4, "settings": {"learning_rate": 0.5}}]
    (decision,) = [line for line in lines if line.get("knob") == "learning_rate"]
    assert decision["policy"] == "recipe"
    assert decision["step"] == 5
    assert (decision["from"], decision["to"]) == (np.float32(0.1), 0.5)
    texts = [e["text"] for e in read_events(tmp_path / "run") if e["kind"] == "warning"]
    assert "learning_rate is 0.5, as the recipe says; the checkpoint had 0.1" in texts


def test_another_schedule_is_journaled_too(blobs, tmp_path):
    trainer(
        blobs,
        tmp_path / "run",
        learning_rate=optax.linear_schedule(0.1, 0, 8),
    ).fit()
    now = optax.linear_schedule(0.8, 0, 8)
    with pytest.warns(UserWarning, match="schedule is another than the checkpoint's"):
        resumed = trainer(blobs, tmp_path / "run", steps=8, learning_rate=now).resume()
    resumed.fit()
    lines = controllers.read_journal(tmp_path / "run")
    (given,) = [line for line in lines if line["kind"] == "recipe"]
    assert given["step"] == 4
    assert np.isnan(given["settings"]["learning_rate"])
    moved = [line for line in lines if line.get("knob") == "learning_rate"]
    assert moved
    assert {line["policy"] for line in moved} == {"schedule"}


def test_an_unchanged_recipe_changes_nothing_and_says_nothing(blobs, tmp_path, recwarn):
    whole = trainer(blobs, steps=8)
    expected = whole.fit()["loss"]
    trainer(blobs, tmp_path / "run").fit()
    resumed = trainer(blobs, tmp_path / "run", steps=8).resume()
    np.testing.assert_array_equal(resumed.fit()["loss"], expected[4:])
    assert equal(resumed.state.params, whole.state.params)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    assert not (tmp_path / "run" / "controller.jsonl").exists()


@pytest.mark.parametrize(
    ("then", "now", "rates"),
    [
        (
            optax.linear_schedule(0.1, 0.0, 8),
            0.01,
            [0.01] * 4,
        ),
        (
            0.1,
            optax.linear_schedule(0.08, 0.0, 8),
            [0.04, 0.03, 0.02, 0.01],
        ),
        (
            optax.linear_schedule(0.1, 0.0, 8),
            optax.linear_schedule(0.8, 0.0, 8),
            [0.4, 0.3, 0.2, 0.1],
        ),
    ],
    ids=["schedule-to-number", "number-to-schedule", "schedule-to-schedule"],
)
def test_a_loaded_model_follows_the_rate_of_the_recipe(
    blobs, tmp_path, then, now, rates
):
    first = trainer(blobs, learning_rate=then)
    first.fit()
    saved = first.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match=r"learning_rate|learning rate"):
        loaded = trainer(blobs, learning_rate=now).load(saved)
    history = loaded.fit(steps=4)
    np.testing.assert_allclose(
        history["learning_rate"],
        rates,
        rtol=1e-5,
    )
    assert np.isfinite(history["loss"]).all()


def test_what_was_set_live_stays_until_the_recipe_says_otherwise(blobs, tmp_path):
    run = tmp_path / "run"
    first = trainer(blobs, run)
    first.fit()
    first.state = controllers.set_base(first.state, learning_rate=0.03)
    first.fit(steps=4)

    same = trainer(blobs, run, steps=12).resume()
    assert float(same.state.controller.base["learning_rate"]) == np.float32(0.03)

    recipe = trainer(blobs, steps=12).recipe
    asked = lepton.Trainer(
        recipe,
        devices=1,
        run_dir=run,
        learning_rate=0.1,
    )
    with pytest.warns(UserWarning, match="learning_rate is 0.1"):
        asked.resume()
    assert float(asked.state.controller.base["learning_rate"]) == np.float32(0.1)

    other = trainer(
        blobs,
        run,
        steps=12,
        learning_rate=0.2,
    )
    with pytest.warns(UserWarning, match="learning_rate is 0.2"):
        other.resume()
    assert float(other.state.controller.base["learning_rate"]) == np.float32(0.2)


@pytest.mark.parametrize(
    ("then", "now"),
    [
        (5.0, 0.01),
        (None, 0.01),
        (0.01, None),
    ],
)
def test_another_clip_norm_is_in_effect(blobs, tmp_path, then, now):
    trainer(blobs, tmp_path / "run", clip_norm=then).fit()
    with pytest.warns(UserWarning, match="clip_norm"):
        resumed = trainer(blobs, tmp_path / "run", steps=5, clip_norm=now).resume()
    before = leaves(resumed.state.params)
    resumed.fit()
    after = leaves(resumed.state.params)
    moved = np.sqrt(sum(((after[p] - before[p]) ** 2).sum() for p in before))
    if now is None:
        assert moved > 0.0011
    else:
        # a step of plain SGD is the rate times the clipped gradient
        np.testing.assert_allclose(
            moved,
            0.1 * now,
            rtol=1e-3,
        )


def test_a_clip_norm_that_an_older_checkpoint_does_not_tell(blobs, tmp_path):
    first = trainer(blobs, clip_norm=5.0)
    first.fit()
    forgotten = {
        "position": first._record.position.to_json(),
        "plan": first.program.plan.to_json(),
    }
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    checkpoints.save(4, first.state, forgotten)
    checkpoints.close()
    with pytest.warns(UserWarning, match="clip_norm is 0.5"):
        loaded = trainer(blobs, clip_norm=0.5).load(tmp_path / "run")
    assert float(loaded.state.controller.base["clip_norm"]) == 0.5
    assert float(loaded.state.controller.base["learning_rate"]) == np.float32(0.1)


def test_injected_hyperparameters_are_the_recipes(blobs, tmp_path):
    def make(rate):
        return optax.inject_hyperparams(optax.sgd)(learning_rate=rate)

    first = trainer(
        blobs,
        optimizer=make(0.1),
        learning_rate=None,
    )
    first.fit()
    saved = first.save(tmp_path / "saved")
    with pytest.warns(
        UserWarning, match="hyperparams/learning_rate is 0.0, as|is 0, as"
    ):
        loaded = trainer(blobs, optimizer=make(0.0), learning_rate=None).load(saved)
    before = leaves(loaded.state.params)
    loaded.fit(steps=2)
    assert equal(before, leaves(loaded.state.params))


# ---- another optimizer, other policies ----


def test_another_optimizer_begins_anew_and_says_so(blobs, tmp_path):
    first = trainer(
        blobs,
        optimizer=optax.adam,
        learning_rate=1e-2,
    )
    first.fit()
    saved = first.save(tmp_path / "saved")
    fine = trainer(
        blobs,
        optimizer=lambda r: optax.sgd(r, momentum=0.9),
        learning_rate=1e-2,
    )
    with pytest.warns(UserWarning, match=r"begins anew: optimizer/0 \(trace\)"):
        fine.load(saved)
    assert equal(fine.state.params, first.state.params)
    assert all((x == 0).all() for x in leaves(fine.state.optimizer).values())
    assert fine.step == 4

    # by hand: the loaded parameters, a fresh momentum
    batch = next(iter(fine_batches(fine)))
    gradient = fine.program._gradients(fine.state, batch)[0]
    expected = jax.tree.map(
        lambda p, g: p - 1e-2 * g,
        fine.state.params,
        gradient,
    )
    expected = leaves(expected)
    fine.fit(steps=1)
    for path, value in leaves(fine.state.params).items():
        np.testing.assert_allclose(
            value,
            expected[path],
            rtol=1e-5,
            atol=1e-7,
        )


def fine_batches(trainer):
    data = trainer.recipe.train
    start = trainer._record.position.samples
    order = ArraysByPosition(
        data,
        trainer.recipe.seed,
        trainer.recipe.shuffle,
    )
    yield order.rows(start, start + trainer.recipe.batch_size)


def test_moments_that_stand_elsewhere_in_the_chain_are_kept(blobs, tmp_path):
    first = trainer(
        blobs,
        optimizer=optax.adam,
        learning_rate=1e-2,
    )
    first.fit()
    saved = first.save(tmp_path / "saved")

    def clipped(rate):
        return optax.chain(optax.clip(1.0), optax.adam(rate))

    fine = trainer(blobs, optimizer=clipped, learning_rate=1e-2).load(saved)
    mine = leaves(fine.state.optimizer)
    theirs = leaves(first.state.optimizer)
    assert mine.keys() == {f"1/{path}" for path in theirs}
    for path, value in theirs.items():
        np.testing.assert_array_equal(mine[f"1/{path}"], value)


@pytest.mark.parametrize("name", ["average", "adaptive", "plateau", "float16"])
def test_a_loaded_model_gets_a_controller(blobs, tmp_path, name):
    first = trainer(
        blobs,
        optimizer=optax.adam,
        learning_rate=1e-2,
    )
    first.fit()
    saved = first.save(tmp_path / "saved")
    changes = {
        "average": {"controller": controllers.averaging()},
        "adaptive": {"controller": controllers.adaptive()},
        "plateau": {"controller": controllers.plateau()},
        "float16": {"precision": "float16"},
    }[name]
    fine = trainer(
        blobs,
        optimizer=optax.adam,
        learning_rate=1e-2,
        **changes,
    )
    with pytest.warns(UserWarning, match="begins anew"):
        fine.load(saved)
    assert equal(fine.state.optimizer, first.state.optimizer)
    assert int(fine.state.controller.updates) == 4
    if name == "average":
        # the average begins with the loaded parameters, not with those of the seed
        assert equal(fine.state.controller.average[0], first.state.params)
    history = fine.fit(steps=6)
    assert np.isfinite(history["loss"]).all()


def test_policies_are_known_by_name_and_not_by_place(blobs, tmp_path):
    def watched(*policies):
        return trainer(blobs, controller=policies, steps=8)

    first = watched(controllers.plateau(), controllers.warmup(4))
    first.fit()
    saved = first.save(tmp_path / "saved")
    with pytest.warns(UserWarning, match="policy clip_by_history"):
        fine = watched(controllers.clip_by_history(), controllers.plateau()).load(saved)
    kept = leaves(fine.state.controller.policies[1])
    assert kept
    assert equal(kept, leaves(first.state.controller.policies[0]))


def test_a_changed_model_is_an_error_still(blobs, tmp_path):
    first = trainer(blobs)
    first.fit()
    saved = first.save(tmp_path / "saved")
    wider = trainer(
        blobs,
        model=lambda rngs: lepton.models.MLP((12, 9, 3), rngs=rngs),
    )
    with pytest.raises(lepton.CheckpointError, match="params/layers/0/kernel"):
        wider.load(saved)


def test_a_rollback_after_a_changed_rate_keeps_the_changed_rate(blobs, tmp_path):
    inputs, targets = blobs
    poisoned = inputs.copy()
    policies = controllers.guard(rollbacks=2)
    run = tmp_path / "run"
    trainer(blobs, run, controller=policies, optimizer=optax.sgd).fit()
    poisoned[:] = inputs
    order = ArraysByPosition(
        lepton.data.Arrays(inputs, targets),
        0,
        True,
    )
    poisoned[order.indices(30 * 6, 30 * 7)] = np.nan
    with pytest.warns(UserWarning, match="learning_rate is 0.01"):
        again = trainer(
            (poisoned, targets),
            run,
            controller=policies,
            learning_rate=0.01,
            steps=12,
            save_every=50,
        ).resume()
    again.fit()
    assert float(again.state.controller.base["learning_rate"]) == np.float32(0.01)


# ---- the command line ----


def test_resume_with_another_learning_rate_on_the_command_line(tmp_path, capsys):
    file = write(tmp_path / "r.py", RECIPE)
    run = str(tmp_path / "run")
    one = ["--devices", "1"]
    assert cli.main([str(file), "--run-dir", run, *one]) == 0
    capsys.readouterr()
    more = [
        "--resume",
        run,
        "--steps",
        "5",
        "--learning-rate",
        "0.001",
        *one,
    ]
    assert cli.main(more) == 0
    printed = capsys.readouterr().err
    assert (
        "learning_rate is 0.001, as the recipe says; the checkpoint had 0.1" in printed
    )
    rates = []
    for event in read_events(tmp_path / "run"):
        if event["kind"] == "steps":
            rates += event["records"]["learning_rate"]
    np.testing.assert_array_equal(
        np.float32(rates), np.float32([0.1] * 3 + [0.001] * 2)
    )


# ---- the whole budget, in pieces ----


def test_pieces_of_a_whole_budget_are_the_whole_run_to_the_bit(blobs):
    def run():
        return trainer(
            blobs,
            controller=controllers.adaptive(),
            optimizer=optax.adamw,
            steps=None,
            epochs=8,
            save_every=None,
        )

    whole = run()
    expected = whole.fit()["loss"]
    pieces = run()
    found = [pieces.fit(epochs=1)["loss"] for _ in range(8)]
    np.testing.assert_array_equal(np.concatenate(found), expected)
    assert equal(pieces.state.params, whole.state.params)


def test_pieces_without_a_whole_budget_are_warned_of(blobs, recwarn):
    pieces = trainer(
        blobs,
        controller=controllers.decay(),
        steps=None,
    )
    pieces.fit(epochs=1)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]
    with pytest.warns(UserWarning, match="took step .* for the end of the run"):
        pieces.fit(epochs=1)


def test_pieces_under_policies_that_know_no_end_are_not(blobs, recwarn):
    pieces = trainer(
        blobs,
        controller=controllers.plateau(),
        steps=None,
    )
    for _ in range(3):
        pieces.fit(epochs=1)
    assert not [w for w in recwarn if issubclass(w.category, UserWarning)]


def test_a_fit_after_the_end_is_a_budget_of_its_own(blobs, tmp_path, recwarn):
    policy = controllers.decay(1.0, "linear")
    run = trainer(blobs, controller=policy, steps=None, run_dir=tmp_path / "run")
    first = run.fit(steps=10)["learning_rate"]
    with pytest.warns(UserWarning, match="begins anew with a budget of steps 11 to 20"):
        second = run.fit(steps=10)["learning_rate"]

    np.testing.assert_allclose(second, first, rtol=1e-6)
    starts = [x for x in controllers.read_journal(run.run_dir) if x["kind"] == "start"]
    assert [line["budget"] for line in starts] == [[0, 10], [10, 20]]
    events = [
        e for e in lepton.monitor.read_events(run.run_dir) if e["kind"] == "budget"
    ]
    assert [(e["begun"], e["end"]) for e in events] == [(0, 10), (10, 20)]


def test_a_model_from_elsewhere_is_trained_over_a_budget_of_its_own(blobs, tmp_path):
    policy = controllers.decay(1.0, "linear")
    first = trainer(blobs, controller=policy, steps=None)
    expected = first.fit(steps=10)["learning_rate"]
    first.save(tmp_path / "model")
    tuned = trainer(blobs, controller=policy, steps=None).load(tmp_path / "model")

    with pytest.warns(UserWarning, match="steps 11 to 15"):
        rates = tuned.fit(steps=5)["learning_rate"]
    np.testing.assert_allclose(rates, expected[::2], rtol=1e-6)

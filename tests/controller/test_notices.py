"""What a run says against itself: by its policies, and at its end by its curves."""

import io
from functools import partial

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.controller import Notice, Policy, read_journal, replay
from lepton_jax.monitor import Progress
from lepton_jax.train.notices import found_at_the_end

pytestmark = pytest.mark.usefixtures("quick_compilation")

SENTENCES = (
    Notice("the rate is at its bound", "give another model"),
    Notice("labels are wrong", "look at the labels"),
)


def saying(numbers):
    """Return a policy that says a sentence, by its number, in a step."""

    def update(signals, state):
        number = jnp.float32(0)
        for step, value in numbers.items():
            number = jnp.where(signals["step"] == step, value, number)
        return {"notice": number}, state

    return Policy(
        "saying",
        lambda: (),
        update,
        ("step", "loss"),
        ("notice",),
        notices=SENTENCES,
    )


def trained(blobs, policy, folder=None, sinks=(), **fields):
    trainer = lepton.Trainer(
        model=partial(lepton.models.MLP, (12, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        train=blobs,
        shuffle=False,
        devices=1,
        controller=policy,
        run_dir=folder,
        sinks=sinks,
        **{"learning_rate": 1e-2, "steps": 8} | fields,
    )
    return trainer.fit()


def test_a_policy_says_each_sentence_once_and_it_is_told_everywhere(blobs, tmp_path):
    screen = io.StringIO()
    policy = saying({2: 1.0, 3: 1.0, 5: 2.0})
    history = trained(blobs, policy, tmp_path / "run", (Progress(screen),))

    assert [(n.step, n.what) for n in history.notices] == [
        (3, "the rate is at its bound"),
        (6, "labels are wrong"),
    ]
    assert history.notices[0].signals == {"loss": history["loss"][2]}
    assert "! labels are wrong; look at the labels" in str(history)
    closing = screen.getvalue().partition("status")[2] or screen.getvalue()
    assert "give another model" in closing
    lines = [
        line for line in read_journal(tmp_path / "run") if line.get("knob") == "notice"
    ]
    assert [line["what"] for line in lines] == [s.what for s in SENTENCES]
    assert "look at the labels" in (tmp_path / "run" / "report.html").read_text()

    again = trained(blobs, replay(tmp_path / "run"))
    np.testing.assert_array_equal(again["loss"], history["loss"])


def test_without_a_screen_it_is_a_warning(blobs):
    with pytest.warns(UserWarning, match="labels are wrong; look at the labels"):
        trained(blobs, saying({1: 2.0}))


def test_a_policy_that_has_nothing_to_say_is_refused(blobs):
    dumb = saying({})._replace(notices=())
    with pytest.raises(lepton.RecipeError, match="nothing to say"):
        trained(blobs, dumb)


def test_a_run_that_did_not_learn_says_so_and_one_that_did_says_nothing(blobs):
    with pytest.warns(UserWarning, match="has not learned"):
        history = trained(blobs, controllers.guard(), steps=60, learning_rate=0.0)
    assert history.notices[0].policy == "run"
    assert not trained(blobs, controllers.guard(), steps=200).notices
    assert not trained(blobs, (), steps=60, learning_rate=0.0).notices, "off is off"
    averaged = trained(
        blobs, lepton.controllers.averaging(), steps=60, learning_rate=0.0
    )
    assert not averaged.notices, "who only averages promises nothing"


# ---- the curves alone ----


def said(losses, blank=None, evaluations=()):
    records = {"loss": np.asarray(losses, np.float32)}
    if blank is not None:
        records["loss_blank"] = np.full(len(losses), blank, np.float32)
    pairs = [(step, {"loss": x}) for step, x in enumerate(evaluations, 1)]
    found = found_at_the_end(len(losses), records, pairs, True)
    return [noticed.what.partition(":")[0] for noticed in found]


def test_a_curve_that_still_falls_fast_is_told_from_one_that_has_settled():
    share = np.arange(200) / 200
    noise = 0.05 * np.random.default_rng(0).normal(size=200)
    assert said(2 - share + noise)[0].startswith("the training loss was still falling")
    assert said(2 * np.exp(-3 * share) + noise) == []
    assert said(2 / np.sqrt(1 + 9 * share) + noise) == []


def test_a_loss_above_that_of_zeros_is_not_learned_wherever_it_began():
    falling = 50 * np.exp(-np.arange(200) / 10) + 2.4
    assert said(falling, blank=2.3) == ["the model has not learned"]
    assert said(falling, blank=20.0) == []


def test_an_evaluation_far_above_its_best_is_overfitting():
    losses = 2 * np.exp(-np.arange(200) / 20)
    assert said(losses, evaluations=(1.0, 0.5, 0.6, 0.8)) == ["the model overfits"]
    assert said(losses, evaluations=(1.0, 0.5, 0.49, 0.51)) == []

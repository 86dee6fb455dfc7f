"""A run that begins with another model's weights, and with a head of its own."""

import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax import controllers, optimizers
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")


ROOT = Path(__file__).resolve().parents[1]


class Net(nnx.Module):
    def __init__(self, classes, head="head", *, rngs):
        self.body = nnx.Linear(12, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.name = head
        setattr(self, head, nnx.Linear(8, classes, rngs=rngs))

    def __call__(self, x):
        return getattr(self, self.name)(nnx.relu(self.norm(self.body(x))))


def make(blobs, classes=3, head="head", **fields):
    inputs, targets = blobs
    defaults = {
        "model": partial(Net, classes, head),
        "loss": lepton.losses.cross_entropy,
        "optimizer": optax.adam,
        "learning_rate": 0.01,
        "train": (inputs, targets % classes),
        "batch_size": 24,
        "steps": 5,
    }
    return lepton.Trainer(devices=1, **defaults | fields)


@pytest.fixture(scope="module")
def saved(blobs, tmp_path_factory):
    trainer = make(blobs)
    trainer.fit()
    folder = tmp_path_factory.mktemp("fine") / "three"
    trainer.save(folder)
    return trainer, folder


def weights(state):
    return jax.device_get(by_path({"p": state.params, "v": state.variables}))


def initial(trainer):
    trainer.predict(np.zeros((1, 12), np.float32))
    return trainer.state


def loaded(trainer, folder, fresh):
    with pytest.warns(UserWarning) as said:
        trainer.load(folder, fresh=fresh)
    return trainer, str(said[0].message)


def test_a_head_of_another_size_begins_anew_and_all_else_is_taken_over(blobs, saved):
    before, folder = saved
    trainer, said = loaded(make(blobs, 2), folder, ["head/*"])

    assert "begins anew: head/bias, head/kernel" in said
    assert "left behind: head/bias, head/kernel" in said
    then = weights(before.state)
    now = weights(trainer.state)
    first = weights(initial(make(blobs, 2)))
    for path, x in now.items():
        expected = first if path.startswith("p/head") else then
        np.testing.assert_array_equal(x, expected[path], path)


def test_the_run_begins_at_its_first_step_with_new_state(blobs, saved):
    _, folder = saved
    trainer, _ = loaded(make(blobs, 2), folder, ["head/*"])
    assert trainer.step == 0 and int(trainer.state.step) == 0
    moments = by_path(trainer.state.optimizer)
    assert not any(np.any(x) for x in moments.values())
    assert trainer.fit().steps == 5


def test_a_head_of_the_same_size_begins_anew_too(blobs, saved):
    before, folder = saved
    trainer, _ = loaded(make(blobs, seed=5), folder, "head/*")
    kernel = trainer.state.params["head"]["kernel"]
    assert not np.array_equal(kernel, before.state.params["head"]["kernel"])


def test_without_patterns_all_weights_are_taken_over(blobs, saved):
    before, folder = saved
    trainer = make(blobs).load(folder, fresh=[])
    for path, x in weights(trainer.state).items():
        np.testing.assert_array_equal(x, weights(before.state)[path])
    assert trainer.step == 0


def test_a_head_of_another_name_is_named_in_both_ways(blobs, saved):
    _, folder = saved
    renamed = make(blobs, 2, head="top")
    with pytest.raises(lepton.CheckpointError, match="surplus in the checkpoint"):
        renamed.load(folder, fresh=["top/*"])
    _, said = loaded(make(blobs, 2, head="top"), folder, ["top/*", "head/*"])
    assert "begins anew: top/bias" in said and "left behind: head/bias" in said


def test_what_does_not_fit_and_what_is_not_there_are_errors(blobs, saved):
    _, folder = saved
    with pytest.raises(lepton.CheckpointError, match=r"did you mean 'head/\*'"):
        make(blobs, 2).load(folder, fresh=["haed/*"])
    with pytest.raises(lepton.CheckpointError, match="head/kernel: the checkpoint has"):
        make(blobs, 2).load(folder, fresh=["body/*"])


@pytest.mark.parametrize("place", ["saved", "run"])
def test_what_was_served_is_what_a_run_begins_with(blobs, tmp_path, place):
    fields = {"controller": controllers.averaging(0.9), "run_dir": tmp_path / "run"}
    trainer = make(blobs, **fields)
    trainer.fit()
    trainer.save(tmp_path / "saved")
    again = make(blobs, controller=controllers.averaging(0.9))
    again.load(tmp_path / place, fresh=[])
    served, _ = controllers.select_weights(trainer.state)
    for path, x in by_path(served).items():
        np.testing.assert_array_equal(x, by_path(again.state.params)[path])
        average = again.state.controller.average[0]
        np.testing.assert_array_equal(x, by_path(average)[path])


def test_a_frozen_body_and_a_fresh_head(blobs, saved):
    before, folder = saved
    parts = optimizers.by_part({"head/*": optax.adam}, default="frozen")
    trainer, _ = loaded(make(blobs, 2, optimizer=parts), folder, ["head/*"])
    first = trainer.state.params["head"]["kernel"].copy()
    trainer.fit()
    now = trainer.state.params
    kernel = before.state.params["body"]["kernel"]
    np.testing.assert_array_equal(now["body"]["kernel"], kernel)
    assert not np.array_equal(now["head"]["kernel"], first)


def blocks(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_pages_example_of_fine_tuning_runs_as_written(blobs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs, targets = blobs
    recipe = make(blobs, metrics={"accuracy": lepton.metrics.accuracy}).recipe
    first = lepton.Trainer(recipe)
    first.fit()
    first.save("saved")
    data = (inputs[:96], targets[:96] % 2)
    names = {"lepton": lepton, "optax": optax, "recipe": recipe, "Net": Net}
    names |= {"train": data, "test": data}
    block = next(text for text in blocks("runs.md") if "fresh=" in text)
    with pytest.warns(UserWarning):
        exec(compile(block, "docs/runs.md", "exec"), names)
    assert names["whole"].predict(inputs).max() <= 1
    assert {x.name for x in tmp_path.iterdir()} == {"saved", "head"}

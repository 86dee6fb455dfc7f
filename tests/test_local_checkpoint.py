"""Fast checkpoints on the hosts' own disks.

They are exact, read only where they are whole, and never replace the durable ones.
"""

import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax.monitor import read_events

pytestmark = pytest.mark.usefixtures("quick_compilation")


def make(blobs, run, near, **fields):
    fields = {
        "model": lambda rngs: lepton.models.MLP(
            (12, 16, 3),
            dropout=0.2,
            rngs=rngs,
        ),
        "steps": 40,
        "save_every": 15,
        "steps_per_call": 1,
        "local_every": 0.0,
    } | fields
    return lepton.Trainer(
        optimizer=optax.adam,
        learning_rate=0.01,
        loss=lepton.losses.cross_entropy,
        train=blobs,
        run_dir=run,
        batch_size=24,
        local_dir=near,
        shuffle=True,
        **fields,
    )


def save_every_step(trainer):
    """Leave no local checkpoint out, however slow the disk is."""
    local = trainer._local
    save = local.save

    def save_after_the_one_before(*args):
        if local._writer is not None:
            local._writer.join()
        return save(*args)

    local.save = save_after_the_one_before


def files(near):
    return sorted(
        near.rglob("*.state"),
        key=lambda path: int(path.stem),
    )


@pytest.fixture(scope="module")
def lost(blobs, tmp_path_factory):
    """A run of 40 steps: the durable checkpoint is of step 30, two local are later."""
    folder = tmp_path_factory.mktemp("lost")
    trainer = make(blobs, folder / "run", folder / "near")
    save_every_step(trainer)
    trainer.fit()
    trainer._local.wait()
    shutil.rmtree(folder / "run" / "checkpoints" / "40")
    return folder


@pytest.fixture
def stopped(lost, tmp_path):
    """Its folders, the second one a copy."""
    shutil.copytree(lost / "near", tmp_path / "near")
    return lost / "run", tmp_path / "near"


def test_a_run_goes_on_from_the_newest_local_step_to_the_same_bits(stopped, blobs):
    run, near = stopped
    newest = int(files(near)[-1].stem)
    assert 30 < newest <= 40
    assert len(files(near)) == 2
    again = make(blobs, run, near, steps=44, save_every=100).resume()
    assert again.step == newest
    again.fit()
    shutil.rmtree(run / "checkpoints" / "44")
    plain = make(blobs, None, None, steps=44)
    plain.fit()
    for a, b in zip(
        jax.tree.leaves(again.state.params),
        jax.tree.leaves(plain.state.params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "a bit":
        data[-5] ^= 1
    path.write_bytes(
        {"a bit": data, "torn": data[:-9], "header": b"{" + data[3:], "empty": b""}[how]
    )


@pytest.mark.parametrize("how", ["a bit", "torn", "header", "empty"])
def test_what_is_damaged_is_passed_over(stopped, blobs, how):
    run, near = stopped
    older, newest = files(near)
    damage(newest, how)
    assert make(blobs, run, near).resume().step == int(older.stem)
    damage(older, how)
    before = len(read_events(run))
    assert make(blobs, run, near).resume().step == 30
    told = [event["kind"] for event in read_events(run)[before:]]
    # the others are no checkpoints at all
    assert told == (["damaged", "damaged"] if how == "a bit" else [])


def test_of_another_layout_or_of_another_run_nothing_is_taken(stopped, blobs, tmp_path):
    run, near = stopped
    other = make(
        blobs,
        run,
        near,
        model=lambda rngs: lepton.models.MLP((12, 24, 3), rngs=rngs),
    )
    with pytest.raises(lepton.CheckpointError, match="leaves differ"):
        other.resume()
    shutil.copytree(run, tmp_path / "elsewhere")
    assert make(blobs, tmp_path / "elsewhere", near).resume().step == 30


def test_a_full_disk_is_told_and_the_run_goes_on(blobs, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        "lepton_jax.checkpoint.local.os",
        SimpleNamespace(**vars(os) | {"replace": refuse}),
    )
    trainer = make(
        blobs,
        tmp_path / "run",
        tmp_path / "near",
        save_every=40,
    )
    save_every_step(trainer)
    assert trainer.fit().steps == 40
    texts = [
        event["text"]
        for event in read_events(tmp_path / "run")
        if event["kind"] == "warning"
    ]
    assert texts
    assert all("No space left on device" in text for text in texts)
    assert not files(tmp_path / "near")


def test_steps_that_a_run_has_left_are_deleted(stopped, blobs):
    run, near = stopped
    make(blobs, run, near, local_every=1e9).load(run, step=30).fit(steps=1)
    shutil.rmtree(run / "checkpoints" / "31")
    assert files(near) == []

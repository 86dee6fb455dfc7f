"""A run that begins anew: from the anchor, with the data that follows."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.controller import Policy, read_journal, replay

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 12
AT = 4  # the step, from 1, in which the run begins anew
ROWS = 16


def restarting(at=AT):
    """Return a policy that lets the run begin anew, and counts its own steps."""

    def update(signals, done):
        return {"restart": done + 1 == at}, done + 1

    return Policy(
        "restarting", lambda: jnp.int32(0), update, ("step", "progress"), ("restart",)
    )


def others():
    return (
        controllers.learning_free(),
        controllers.decay(0.5),
        controllers.averaging(share=0.2),
    )


def trained(blobs, *policies, steps=STEPS, first=0, folder=None, **fields):
    samples = tuple(part[first * ROWS : (first + steps) * ROWS] for part in blobs)
    trainer = lepton.Trainer(
        model=partial(lepton.models.MLP, (12, 8, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=1e-2,
        train=samples,
        batch_size=ROWS,
        shuffle=False,
        devices=1,
        steps=steps,
        controller=policies,
        run_dir=folder,
        **fields,
    )
    return trainer, trainer.fit()


def same(left, right):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), left, right)


def test_a_run_that_begins_anew_is_the_shorter_run_of_the_remaining_data(blobs):
    trainer, history = trained(blobs, restarting(), *others())
    fresh, expected = trained(
        blobs, restarting(0), *others(), steps=STEPS - AT, first=AT
    )

    np.testing.assert_allclose(history["loss"][AT:], expected["loss"], rtol=2e-5)
    np.testing.assert_allclose(
        history["learning_rate"][AT:], expected["learning_rate"], rtol=2e-5
    )
    same(trainer.state.params, fresh.state.params)
    same(trainer.state.optimizer, fresh.state.optimizer)
    same(trainer.state.controller.average, fresh.state.controller.average)


def test_accumulated_batches_are_forgotten(blobs):
    many = Policy(
        "many",
        lambda: (),
        lambda signals, s: ({"accumulate": 3.0}, s),
        (),
        ("accumulate",),
    )
    trainer, _ = trained(blobs, restarting(), many)
    fresh, _ = trained(blobs, restarting(0), many, steps=STEPS - AT, first=AT)

    same(trainer.state.params, fresh.state.params)


def test_the_journal_names_it_and_replays_it_to_the_bit(blobs, tmp_path):
    trainer, _ = trained(blobs, restarting(), *others(), folder=tmp_path / "run")
    lines = read_journal(tmp_path / "run")
    again, _ = trained(blobs, replay(tmp_path / "run"))

    (line,) = (line for line in lines if line.get("knob") == "restart")
    assert line["step"] == AT
    assert line["signals"] == {"step": AT - 1, "progress": np.float32(AT / STEPS)}
    decays = [line for line in lines if line.get("policy") == "decay"]
    assert decays[-1]["signals"] == {"step": STEPS - AT - 1, "progress": 1.0}
    jax.tree.map(
        np.testing.assert_array_equal, trainer.state.params, again.state.params
    )


def test_a_checkpoint_after_it_goes_on_to_the_bit(blobs, tmp_path):
    whole, _ = trained(blobs, restarting(), *others())
    part, _ = trained(
        blobs, restarting(), *others(), folder=tmp_path / "run", save_every=AT + 2
    )
    part.load(tmp_path / "run", step=AT + 2)
    part.fit()

    jax.tree.map(np.testing.assert_array_equal, whole.state.params, part.state.params)

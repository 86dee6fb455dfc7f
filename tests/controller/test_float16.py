"""float16 on a model whose gradients overflow trains to the losses of float32."""

import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax import controllers

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Steep(nnx.Module):
    """A model with activations of about a hundred.

    At the first loss scale the gradients of its last kernel are beyond float16.
    """

    def __init__(self, rngs):
        small = nnx.initializers.normal(1e-3)
        self.first = nnx.Linear(12, 32, rngs=rngs)
        self.last = nnx.Linear(32, 3, kernel_init=small, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(100 * x)))


def fit(blobs, folder, precision):
    trainer = lepton.Trainer(
        model=Steep,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adam,
        learning_rate=1e-4,
        batch_size=50,
        devices=1,
        precision=precision,
        run_dir=folder,
    )
    return trainer.fit(blobs, steps=300, test=blobs)


@pytest.mark.slow
def test_an_overflow_prone_model_trains_to_the_float32_loss(blobs, tmp_path):
    full = fit(blobs, tmp_path / "full", "float32")
    low = fit(blobs, tmp_path / "low", "float16")
    expected = full.evaluations[-1][1]["loss"]

    assert abs(low.evaluations[-1][1]["loss"] - expected) < 0.01 * expected

    scale = low["loss_scale"]

    assert low["skip"].sum() >= 2
    assert scale[-1] < 2**15
    assert np.isfinite(scale).all()

    moves = [
        line
        for line in controllers.read_journal(tmp_path / "low")
        if line.get("policy") == "loss_scaling"
    ]
    halved = [line for line in moves if line["knob"] == "loss_scale"]

    assert halved
    assert halved[0]["from"] == 2**15
    assert halved[0]["signals"]["finite"] == 0
    assert not (tmp_path / "full" / "controller.jsonl").exists()

"""A model that averages over views of its input, in evaluation alone."""

from functools import partial

import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.models import averaged_views, mirrored, unchanged

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
PICTURES = RNG.normal(size=(24, 5, 5)).astype(np.float32)
LABELS = RNG.integers(0, 3, 24).astype(np.int32)
VIEWS = (unchanged, mirrored)


class Net(nnx.Module):
    """Batch statistics, and sides that differ."""

    def __init__(self, classes, *, rngs):
        self.norm = nnx.BatchNorm(25, rngs=rngs)
        self.last = nnx.Linear(25, classes, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(x.reshape(len(x), -1)))


def make(model, **fields):
    return lepton.Trainer(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.1),
        train=(PICTURES, LABELS),
        batch_size=8,
        steps=4,
        devices=1,
        **fields,
    )


def logits(trainer, x):
    return trainer.predict(x, decode=lambda outputs: outputs)


def test_training_is_that_of_the_plain_model_to_the_bit_and_evaluation_averages():
    plain = make(partial(Net, 3))
    viewed = make(partial(averaged_views, partial(Net, 3), VIEWS))
    losses = plain.fit()["loss"]
    np.testing.assert_array_equal(viewed.fit()["loss"], losses)

    expected = (logits(plain, PICTURES) + logits(plain, PICTURES[:, :, ::-1])) / 2
    np.testing.assert_allclose(logits(viewed, PICTURES), expected, atol=1e-5)


def test_weights_of_a_plain_model_fit_and_what_is_saved_can_be_opened(tmp_path):
    plain = make(partial(lepton.models.MLP, (25, 3)))
    plain.fit()
    plain.save(tmp_path / "plain")
    model = partial(
        averaged_views,
        partial(lepton.models.MLP, (25, 3)),
        VIEWS,
        average="probabilities",
    )
    viewed = make(model).load(tmp_path / "plain")

    def shares(x):
        exponents = np.exp(logits(plain, x))
        return exponents / exponents.sum(1, keepdims=True)

    expected = (shares(PICTURES) + shares(PICTURES[:, :, ::-1])) / 2
    np.testing.assert_allclose(np.exp(logits(viewed, PICTURES)), expected, atol=1e-5)
    viewed.save(tmp_path / "viewed")
    opened = lepton.Trainer.open(tmp_path / "viewed", devices=1)
    np.testing.assert_array_equal(logits(opened, PICTURES), logits(viewed, PICTURES))


def test_no_views_and_unknown_averages_are_errors():
    with pytest.raises(ValueError, match="0 views"):
        averaged_views(partial(Net, 3), (), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="median"):
        averaged_views(partial(Net, 3), VIEWS, average="median", rngs=nnx.Rngs(0))

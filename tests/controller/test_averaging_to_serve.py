"""An exponential average of the parameters is what a plain user evaluates and saves."""

from functools import partial

import jax
import numpy as np
import optax
import pytest

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.models import MLP
from lepton_jax.trees import by_path

pytestmark = pytest.mark.usefixtures("quick_compilation")

DECAY = 0.8
STEPS = 12


def make(blobs, **fields):
    defaults = {"controller": controllers.averaging(DECAY)}
    return lepton.Trainer(
        model=partial(MLP, (12, 3)),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd(0.3),
        metrics={"accuracy": lepton.metrics.accuracy},
        train=blobs,
        test=blobs,
        batch_size=600,
        steps=STEPS,
        evaluate_every=4,
        shuffle=False,
        devices=1,
        **defaults | fields,
    )


def by_hand(trainer, blobs):
    """Return the average of plain gradient descent's parameters, step by step."""
    inputs, targets = blobs
    first = trainer.program.init(0).params

    def loss(params):
        layer = (
            params["layers"]["0"] if "0" in params["layers"] else params["layers"][0]
        )
        outputs = inputs @ layer["kernel"] + layer["bias"]
        return lepton.losses.cross_entropy(outputs, targets).mean()

    params = average = first
    averages = []
    for n in range(STEPS):
        gradient = jax.grad(loss)(params)
        params = jax.tree.map(lambda p, g: p - 0.3 * g, params, gradient)
        d = min(DECAY, (1 + n) / (10 + n))
        average = jax.tree.map(lambda a, p, d=d: d * a + (1 - d) * p, average, params)
        averages.append(average)
    return averages, loss


def test_the_average_is_evaluated_predicted_with_and_saved(blobs, tmp_path):
    trainer = make(blobs)
    history = trainer.fit()
    averages, loss = by_hand(trainer, blobs)

    for step, metrics in history.evaluations:
        expected = float(loss(averages[step - 1]))
        assert metrics["loss"] == pytest.approx(expected, rel=1e-4), step
    assert trainer.evaluate().loss == history.evaluations[-1][1]["loss"]
    trained = float(loss(trainer.state.params))
    assert trained != pytest.approx(trainer.evaluate().loss, rel=1e-3)

    trainer.save(tmp_path / "saved")
    opened = lepton.Trainer.open(tmp_path / "saved", devices=1)
    for path, x in by_path(averages[-1]).items():
        np.testing.assert_allclose(by_path(opened.state.params)[path], x, rtol=1e-4)
    inputs, _ = blobs
    np.testing.assert_array_equal(opened.predict(inputs), trainer.predict(inputs))

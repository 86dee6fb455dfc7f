"""A wait for data is time in which the devices stand still."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton

ROWS = 16
STEPS = 30


class Slow(nnx.Module):
    """A model whose step takes some 20 ms."""

    def __init__(self, rngs):
        self.out = nnx.Linear(256, 3, rngs=rngs)

    def __call__(self, x):
        wide = jnp.tile(x, (32, 1))
        square = wide.T @ wide / wide.shape[0]
        mixed = jax.lax.fori_loop(0, 40, lambda _, a: jnp.tanh(a @ square), square)
        return self.out(x + 1e-6 * mixed[:1])


class Quick(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(256, 3, rngs=rngs)

    def __call__(self, x):
        return self.out(x)


def share(model, seconds):
    """Return the share of time that waits, where reading a sample takes so long."""
    random = np.random.default_rng(0)
    inputs = random.normal(size=(320, 256)).astype(np.float32)
    targets = random.integers(0, 3, 320).astype(np.int32)

    def read(pixels, label):
        time.sleep(seconds)
        return pixels, label

    trainer = lepton.Trainer(
        model=model,
        loss=lepton.losses.cross_entropy,
        optimizer=optax.sgd,
        learning_rate=1e-3,
        steps_per_call=1,
        train=lepton.data.Source((inputs, targets)).map(read),
    )
    trainer.fit(steps=5, batch_size=ROWS)
    return trainer.fit(steps=STEPS, batch_size=ROWS).data_wait_share


@pytest.mark.parametrize(
    ("model", "seconds", "least", "most"),
    [(Quick, 0.01, 0.5, 1.0), (Slow, 0.0, 0.0, 0.2)],
)
def test_only_a_device_that_stands_still_waits(model, seconds, least, most):
    assert least <= share(model, seconds) <= most

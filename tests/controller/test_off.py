"""Off is off: without policies that fire, training is plain Optax to the bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import lepton_jax as lepton
from lepton_jax.controller.knobs import neutral

STEPS = 200
BATCH = 24
OPTIMIZERS = {
    "sgd": optax.sgd,
    "momentum": partial(optax.sgd, momentum=0.9),
    "adamw": optax.adamw,
    "lion": optax.lion,
    "adafactor": partial(optax.adafactor, min_dim_size_to_factor=16),
    "muon": optax.contrib.muon,
}
RATES = {
    "sgd": 0.1,
    "momentum": 0.03,
    "adamw": 3e-3,
    "lion": 1e-3,
    "adafactor": 1e-2,
    "muon": 1e-2,
}


class Net(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.first = nnx.Linear(12, 32, rngs=rngs)
        self.last = nnx.Linear(32, 3, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.first(x))))


def never(
    knobs, watches=("loss_mean", "gradient_norm", "cosine", "noise_scale", "finite")
):
    """A policy that may move knobs, reads signals, and leaves everything alone."""
    return lepton.controllers.Policy(
        "never",
        lambda: jnp.int32(0),
        lambda signals, n: (
            {k: jnp.where(signals["finite"] >= 0, neutral(k), 2.0) for k in knobs},
            n + 1,
        ),
        watches,
        tuple(knobs),
    )


def model(name):
    """Return the model, with dropout for one of the optimizers alone.

    Its random numbers take most of the time to compile.
    """
    return partial(Net, rate=0.2) if name == "adamw" else Net


def fit(blobs, name, controller):
    optimizer = OPTIMIZERS[name]
    rate = RATES[name]
    trainer = lepton.Trainer(
        model=model(name),
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=rate,
        batch_size=BATCH,
        shuffle=False,
        devices=1,
        controller=controller,
    )
    losses = trainer.fit(blobs, steps=STEPS)["loss"]
    return losses, trainer.state


@pytest.fixture(scope="module")
def plain():
    """Return losses and parameters of Flax and Optax alone, by optimizer."""
    runs = {}

    def run(name, blobs):
        if name not in runs:
            optimizer = OPTIMIZERS[name](RATES[name])
            runs[name] = by_hand(model(name), optimizer, blobs)
        return runs[name]

    return run


def by_hand(make, optimizer, blobs):
    module = make(nnx.Rngs(jax.random.key(0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    state = optimizer.init(params)

    def loss_of(params, rest, x, y):
        module = nnx.merge(graph, params, rest, copy=True)
        module.train()
        losses = optax.softmax_cross_entropy_with_integer_labels(module(x), y)
        return losses.mean(), nnx.state(module, nnx.Not(nnx.Param))

    @jax.jit
    def step(params, rest, state, x, y):
        (loss, rest), gradients = jax.value_and_grad(loss_of, has_aux=True)(
            params, rest, x, y
        )
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), rest, state, loss

    inputs, targets = (
        np.tile(a, (20, *[1] * (a.ndim - 1)))[: STEPS * BATCH] for a in blobs
    )
    losses = []
    for at in range(0, STEPS * BATCH, BATCH):
        params, rest, state, loss = step(
            params, rest, state, inputs[at : at + BATCH], targets[at : at + BATCH]
        )
        losses.append(loss)
    return np.array(losses), nnx.to_pure_dict(params)


QUICK = ("adamw", "muon")


@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
def test_policies_that_never_fire_are_plain_optax_to_the_bit(name, blobs, plain):
    losses, params = plain(name, blobs)
    common = [
        "learning_rate",
        "clip_norm",
        "averaging_decay",
        "skip",
        "anchor",
        "restore",
        "stop",
        "rollback",
        "loss_limit",
        "loss_mark",
    ]
    own = {
        "adamw": ["weight_decay", "b1", "b2", "dropout"],
        "lion": ["weight_decay", "b1", "b2"],
        "momentum": ["momentum"],
    }.get(name, [])
    for controller in ((), (never(common + own),), (never(["accumulate", "skip"]),)):
        found, state = fit(blobs, name, controller)
        np.testing.assert_array_equal(found, losses)
        jax.tree.map(np.testing.assert_array_equal, state.params, params)

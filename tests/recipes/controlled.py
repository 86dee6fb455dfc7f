"""Policies that are in the middle of something at any step.

They are a warm-up, a growing batch, spikes skipped, and a plateau.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax.controller import Policy

SPIKES = (90, 91, 170)  # samples whose inputs are a thousand times too large


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(12, 32, rngs=rngs)
        self.last = nnx.Linear(32, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def warm(steps: int) -> Policy:
    """Warm up linearly, by a count of its own."""
    return Policy(
        "warm",
        lambda: jnp.int32(0),
        lambda signals, n: (
            {"learning_rate": jnp.minimum((n + 1) / steps, 1.0)},
            n + 1,
        ),
        moves=("learning_rate",),
    )


def spikes(limit: float) -> Policy:
    """Skip steps whose gradient is too steep."""
    return Policy(
        "spikes",
        lambda: (),
        lambda signals, state: ({"skip": signals["gradient_norm"] > limit}, state),
        ("gradient_norm", "loss"),
        ("skip",),
    )


def flat(patience: int) -> Policy:
    """Halve the rate whenever the loss has not fallen for some steps.

    The best parameters are remembered.
    """

    def update(signals, state):
        best, since, factor = state
        better = signals["loss_mean"] < best
        since = jnp.where(better, 0, since + 1)
        halve = since >= patience
        factor = jnp.where(halve, factor / 2, factor)
        state = (
            jnp.where(better, signals["loss_mean"], best),
            jnp.where(halve, 0, since),
            factor,
        )
        return {
            "learning_rate": factor,
            "anchor": better & (signals["step"] % 7 == 0),
            "restore": halve,
        }, state

    return Policy(
        "flat",
        lambda: (
            jnp.float32(jnp.inf),
            jnp.int32(0),
            jnp.float32(1),
        ),
        update,
        ("loss_mean", "step", "cosine"),
        ("learning_rate", "anchor", "restore"),
    )


def grow(every: int) -> Policy:
    """Add a batch to each update every `every` steps.

    Also average, and take another optimizer late in the run.
    """
    return Policy(
        "grow",
        lambda: (),
        lambda signals, state: (
            {
                "accumulate": 1 + signals["step"] // every,
                "averaging_decay": jnp.minimum(0.9, signals["step"] / 100),
                "optimizer": signals["progress"] > 0.7,
                "dropout": jnp.where(
                    signals["step"] > 30,
                    0.5,
                    1.0,
                ),
            },
            state,
        ),
        ("step", "progress", "noise_scale"),
        ("accumulate", "averaging_decay", "optimizer", "dropout"),
    )


def recipe(
    steps: int = 120,
    save_every: int = 10,
) -> lepton.Recipe:
    """A small net on made-up data."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 12)).astype(np.float32)
    targets = (inputs @ rng.normal(size=(12, 3))).argmax(1).astype(np.int32)
    inputs[list(SPIKES)] *= 1000
    optimizer = lepton.controllers.switchable(
        optax.adamw, lambda rate: optax.sgd(10 * rate, momentum=0.9)
    )
    return lepton.Recipe(
        model=Net,
        loss=lepton.losses.cross_entropy,
        optimizer=optimizer,
        learning_rate=1e-2,
        train=(inputs, targets),
        test=(inputs[:123], targets[:123]),
        steps=steps,
        batch_size=24,
        save_every=save_every,
        evaluate_every=25,
        log_every=5,
        seed=3,
        controller=(
            warm(30),
            spikes(5.0),
            flat(15),
            grow(40),
        ),
    )

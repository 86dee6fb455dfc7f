"""Everything at once that a resumed run must get right.

That is shuffling, dropout, batch norm, accumulation, and an odd batch size.
"""

from __future__ import annotations

import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton


class Net(nnx.Module):
    def __init__(
        self,
        width: int,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.Linear(12, width, rngs=rngs)
        self.last = nnx.Linear(width, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(nnx.relu(self.norm(self.first(x)))))


def recipe(
    width: int = 64,
    steps: int = 400,
    save_every: int = 20,
    steps_per_call: int | None = None,
) -> lepton.Recipe:
    """A small net on made-up data."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(500, 12)).astype(np.float32)
    targets = (inputs @ rng.normal(size=(12, 3))).argmax(1).astype(np.int32)
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    return lepton.Recipe(
        model=lambda rngs: Net(width, rngs),
        loss=lepton.losses.cross_entropy,
        optimizer=optax.adamw,
        learning_rate=schedule,
        metrics={"accuracy": lepton.metrics.accuracy},
        train=(inputs, targets),
        test=(inputs[:123], targets[:123]),
        steps=steps,
        batch_size=24,
        micro_batches=2,
        clip_norm=1.0,
        save_every=save_every,
        evaluate_every=50,
        steps_per_call=steps_per_call,
        log_every=5,
        seed=3,
    )

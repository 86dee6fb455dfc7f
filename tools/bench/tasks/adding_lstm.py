"""The adding problem (Hochreiter & Schmidhuber 1997): an LSTM.

The target is the sum of the two marked numbers of a sequence. Noise with a standard
deviation of 0.2 is added to it, so that the loss stays above 0.04.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

LENGTH = 12
SAMPLES = 8000
NOISE = 0.2


class Adder(nnx.Module):
    """An LSTM, and a number from its last state."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.rnn = nnx.RNN(nnx.OptimizedLSTMCell(2, hidden, rngs=rngs))
        self.out = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, 2) to (batch,)."""
        return self.out(self.rnn(x)[:, -1])[:, 0]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(1)
    numbers = random.random((SAMPLES, LENGTH)).astype(np.float32)
    places = random.random((SAMPLES, LENGTH)).argsort(1)[:, :2]
    marks = np.zeros_like(numbers)
    np.put_along_axis(marks, places, 1, 1)
    noise = NOISE * random.normal(size=SAMPLES)
    targets = ((numbers * marks).sum(1) + noise).astype(np.float32)
    samples = Arrays(np.stack([numbers, marks], -1), targets)
    return tasks.task_of(
        partial(Adder, 24),
        tasks.three(samples, 0.1, 0.2),
        600,
        32,
        loss=losses.squared_error,
    )

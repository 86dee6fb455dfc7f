"""Copying: a GRU reads four symbols and a sign, and repeats the symbols.

A tenth of the symbols to repeat are drawn anew, so that the loss stays above 0.
"""

from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

SYMBOLS = 6
LENGTH = 4  # symbols to copy
SAMPLES = 6000


class Copier(nnx.Module):
    """An embedding, a GRU, and logits at the places where it repeats."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(SYMBOLS + 1, 16, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(16, hidden, rngs=rngs))
        self.out = nnx.Linear(hidden, SYMBOLS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map int32 (batch, 8) to logits (batch, 4, symbols)."""
        return self.out(self.rnn(self.embed(tokens))[:, -LENGTH:])


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(10)
    symbols = random.integers(0, SYMBOLS, (SAMPLES, LENGTH)).astype(np.int32)
    signs = np.full_like(symbols, SYMBOLS)
    tokens = np.concatenate([symbols, signs], 1)
    samples = Arrays(tokens, tasks.relabeled(symbols, 0.1))
    parts = tasks.three(samples, 0.1, 0.15)
    return tasks.task_of(partial(Copier, 40), parts, 600, 32)

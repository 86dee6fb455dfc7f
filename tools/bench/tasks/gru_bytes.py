"""Characters of Shakespeare's plays, in their order: a GRU."""

from functools import partial
from pathlib import Path

import jax
from flax import nnx

from tools.bench import controller_tasks as tasks


class Reader(nnx.Module):
    """An embedding, a GRU, and logits of the next character."""

    def __init__(self, hidden: int, *, rngs: nnx.Rngs):
        self.embed = nnx.Embed(65, 24, rngs=rngs)
        self.rnn = nnx.RNN(nnx.GRUCell(24, hidden, rngs=rngs))
        self.out = nnx.Linear(hidden, 65, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map int32 (batch, length) to logits (batch, length, 65)."""
        return self.out(self.rnn(self.embed(tokens)))


def task(data: Path) -> tasks.Task:
    """Return the task."""
    samples = tasks.next_tokens(tasks.plays(data), 16)
    train, validation, report = tasks.in_order(samples, 0.05, 0.05)
    parts = (train, tasks.first(validation, 300), tasks.first(report, 500))
    return tasks.task_of(partial(Reader, 40), parts, 480, 16)

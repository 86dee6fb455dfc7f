"""A table of logits of the next character, all 0 at the start."""

from functools import partial
from pathlib import Path

from flax import nnx

from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    samples = tasks.next_tokens(tasks.plays(data), 16)
    train, validation, report = tasks.in_order(samples, 0.05, 0.05)
    model = partial(nnx.Embed, 65, 65, embedding_init=nnx.initializers.zeros)
    parts = (train, tasks.first(validation, 1000), tasks.first(report, 2000))
    return tasks.task_of(model, parts, 400, 32)

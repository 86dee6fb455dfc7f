"""Characters of Shakespeare's plays, in their order: a two-layer transformer."""

from functools import partial
from pathlib import Path

from lepton_jax.models import TransformerLM
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    samples = tasks.next_tokens(tasks.plays(data), 32)
    train, validation, report = tasks.in_order(samples, 0.05, 0.05)
    model = partial(
        TransformerLM,
        65,
        dim=32,
        layers=2,
        heads=2,
        hidden=96,
    )
    parts = (train, tasks.first(validation, 150), tasks.first(report, 300))
    return tasks.task_of(model, parts, 480, 16, optimizer=tasks.adamw(0.95))

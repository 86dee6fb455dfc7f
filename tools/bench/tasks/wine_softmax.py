"""Wine, a tenth of the labels drawn anew: softmax regression from 0."""

from functools import partial
from pathlib import Path

from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks


def task(data: Path) -> tasks.Task:
    """Return the task."""
    inputs, labels = tasks.sklearn("wine")
    samples = Arrays(tasks.standardized(inputs), tasks.relabeled(labels, 0.1))
    parts = tasks.three(samples, 0.25, 0.35)
    return tasks.task_of(partial(tasks.ZeroLinear, 13, 3), parts, 320, 16)

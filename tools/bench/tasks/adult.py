"""UCI Adult: bins and embeddings through an MLP with dropout."""

import csv
import tempfile
from functools import partial
from pathlib import Path

import lepton_jax as lepton
from lepton_jax.models import TabularMLP
from tools.bench import controller_tasks as tasks

COLUMNS = (
    "age",
    "work",
    "weight",
    "education",
    "years",
    "marital",
    "occupation",
    "relation",
    "race",
    "sex",
    "gain",
    "loss",
    "hours",
    "country",
    "income",
)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    with tempfile.TemporaryDirectory() as folder:
        tables = {part: _table(data, part, folder) for part in ("data", "test")}
        train, validation = lepton.data.table_split(
            tables["data"], "income", 0.1, tasks.SPLIT_SEED
        )
        report = lepton.data.table(tables["test"], "income", schema=train.schema).arrays
    model = partial(
        TabularMLP,
        2,
        edges=train.schema.edges,
        sizes=train.schema.sizes,
        hidden=(64, 32),
        dropout=0.2,
    )
    report = report.split(0.2, tasks.SPLIT_SEED)[1]
    parts = (train.arrays, tasks.first(validation.arrays, 1000), report)
    return tasks.task_of(model, parts, 600, 128)


def _table(
    data: Path,
    part: str,
    folder: str,
) -> Path:
    """Write a part of Adult as a CSV file with a header, without its odd lines."""
    file = Path(folder, f"{part}.csv")
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for line in tasks.lines_of(data / "adult" / f"adult.{part}.gz"):
            cells = [cell.strip().rstrip(".") for cell in line.split(",")]
            if len(cells) == len(COLUMNS):
                writer.writerow(cells)
    return file

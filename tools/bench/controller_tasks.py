"""The tasks of `tools.bench controller`: small models on real data.

The samples of each are split into training, validation and test.
"""

from __future__ import annotations

import csv
import gzip
import itertools
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.errors import DataError

EVALUATIONS = 40  # of a run
SPLIT_SEED = 0


class Task(NamedTuple):
    """A recipe and the test samples.

    Attributes:
      recipe: its `test` is the validation set.
      report: the samples whose loss is reported.
    """

    recipe: lepton.Recipe
    report: Arrays


def digits(data: Path) -> Task:
    """scikit-learn's 8x8 digits: a small CNN with dropout; needs no folder."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "scikit-learn, which holds the digits, is not installed",
            where="tools.bench controller",
            remedy="pip install -e '.[recipes]', or leave the task out with --tasks",
        ) from error
    images, labels = load_digits(return_X_y=True)
    train, validation, report = three(
        Arrays(images.reshape(-1, 8, 8, 1).astype("uint8"), labels),
        0.2,
        0.35,
    )
    model = partial(
        lepton.models.CNN,
        10,
        size=(8, 8, 1),
        widths=(8, 16, 16),
        dense=32,
        dropout=0.3,
    )
    return Task(
        recipe_of(model, train, validation, 320, 128, preprocess=_sixteenths), report
    )


def mnist(data: Path) -> Task:
    """MNIST: 784-128-10."""
    train, test = lepton.data.idx(data / "mnist")
    train, validation = train.split(1 / 30, SPLIT_SEED)
    report, _ = test.split(0.6, SPLIT_SEED)
    return Task(
        recipe_of(
            partial(lepton.models.MLP, (784, 128, 10)),
            train,
            validation,
            1200,
            128,
            preprocess=_pixels,
        ),
        report,
    )


def adult(data: Path) -> Task:
    """UCI Adult: bins and embeddings through an MLP with dropout."""
    with tempfile.TemporaryDirectory() as folder:
        tables = {part: _adult_table(data, part, folder) for part in ("data", "test")}
        train, validation = lepton.data.table_split(
            tables["data"], "income", 0.1, SPLIT_SEED
        )
        report = lepton.data.table(tables["test"], "income", schema=train.schema).arrays
    model = partial(
        lepton.models.TabularMLP,
        2,
        edges=train.schema.edges,
        sizes=train.schema.sizes,
        hidden=(64, 32),
        dropout=0.2,
    )
    return Task(
        recipe_of(
            model,
            train.arrays,
            validation.arrays,
            800,
            128,
        ),
        report.split(0.4, SPLIT_SEED)[1],
    )


ADULT_COLUMNS = (
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


def _adult_table(
    data: Path,
    part: str,
    folder: str,
) -> Path:
    """Write a part of Adult as a CSV file with a header, without its odd lines."""
    file = Path(folder, f"{part}.csv")
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(ADULT_COLUMNS)
        for line in _lines(data / "adult" / f"adult.{part}.gz"):
            cells = [cell.strip().rstrip(".") for cell in line.split(",")]
            if len(cells) == len(ADULT_COLUMNS):
                writer.writerow(cells)
    return file


def shakespeare(data: Path) -> Task:
    """Characters of Shakespeare's plays, in their order: a two-layer transformer."""
    text = _text(data / "tinyshakespeare" / "input.txt")
    characters = np.frombuffer(text.encode("utf-8"), np.uint8)
    tokens = _numbered(characters)
    length = 32
    count = (len(tokens) - 1) // length
    end = count * length
    inputs = tokens[:end].reshape(count, length)
    targets = tokens[1 : end + 1].reshape(count, length)

    cuts = [round(count * share) for share in (0.0, 0.9, 0.95, 1.0)]
    train, validation, report = (
        Arrays(inputs[first:last], targets[first:last])
        for first, last in itertools.pairwise(cuts)
    )
    model = partial(
        lepton.models.TransformerLM,
        int(tokens.max()) + 1,
        dim=32,
        layers=2,
        heads=2,
        hidden=96,
    )
    return Task(
        recipe_of(
            model,
            train,
            first(validation, 500),
            600,
            16,
            b2=0.95,
        ),
        first(report, 1000),
    )


def movielens(data: Path) -> Task:
    """MovieLens ratings: two towers."""
    lines = _lines(data / "movielens_latest_small" / "ratings.csv")
    next(lines)
    cells = [line.split(",") for line in lines]
    users = _numbered([int(cell[0]) for cell in cells])
    items = _numbered([int(cell[1]) for cell in cells])
    stars = np.asarray([float(cell[2]) for cell in cells], np.float32)
    samples = Arrays({"user": users, "item": items}, stars)
    train, validation, report = three(samples, 0.1, 0.1)
    model = partial(
        lepton.models.TwoTower,
        int(users.max()) + 1,
        int(items.max()) + 1,
        dim=16,
        hidden=(32,),
        width=16,
        center=float(train.targets.mean()),
    )
    return Task(
        recipe_of(model, train, validation, 600, 256, loss=losses.squared_error), report
    )


TASKS: dict[str, Callable[[Path], Task]] = {
    "digits": digits,
    "mnist": mnist,
    "adult": adult,
    "shakespeare": shakespeare,
    "movielens": movielens,
}


def _numbered(values: Any) -> np.ndarray:
    """Return each value's place among the different ones, int32."""
    return np.unique(values, return_inverse=True)[1].astype(np.int32)


def recipe_of(
    model: Any,
    train: Arrays,
    validation: Arrays,
    steps: int,
    batch_size: int,
    loss: Any = losses.cross_entropy,
    b2: float = 0.999,
    preprocess: Any = None,
) -> lepton.Recipe:
    """Return a task's recipe: AdamW, evaluated `EVALUATIONS` times."""
    return lepton.Recipe(
        model=model,
        loss=loss,
        optimizer=partial(
            optax.adamw,
            b2=b2,
            weight_decay=0.01,
        ),
        learning_rate=1e-3,
        train=train,
        test=validation,
        steps=steps,
        batch_size=batch_size,
        preprocess=preprocess,
        evaluate_every=steps // EVALUATIONS,
    )


def _sixteenths(pixels: Any) -> Any:
    return pixels.astype("float32") / 16


def _pixels(pixels: Any) -> Any:
    # mean and standard deviation of the training images
    return (pixels.astype("float32") / 255 - 0.1307) / 0.3081


def three(
    samples: Arrays, validation: float, report: float
) -> tuple[Arrays, Arrays, Arrays]:
    """Split samples into training, validation and test; shares are of all of them."""
    rest, tested = samples.split(report, SPLIT_SEED)
    train, validated = rest.split(validation / (1 - report), SPLIT_SEED)
    return train, validated, tested


def first(samples: Arrays, count: int) -> Arrays:
    """Return the first samples."""
    return Arrays(*samples.take(np.arange(min(count, len(samples)))))


def _lines(path: Path) -> Iterator[str]:
    return iter(_text(path).splitlines())


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the file can't be read: {error.strerror}",
            where=path,
            remedy=(
                "give the folder that holds the data "
                "sets with --data, or leave the task out with --tasks"
            ),
        ) from error
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    return content.decode("utf-8")

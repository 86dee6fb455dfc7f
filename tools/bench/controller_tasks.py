"""What the tasks of `tools.bench controller` are made of.

A task is a file in tools/bench/tasks with a function `task(data)`, where `data` is the
folder of the data sets. Its samples are split into training, validation and test. The
loss of a test set must not go to 0, since losses are compared by their ratio: where the
data has no noise of its own, it is added.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax import losses
from lepton_jax.data import Arrays
from lepton_jax.errors import DataError

EVALUATIONS = 40  # of a run
SPLIT_SEED = 0
PIXEL_MEAN = 0.1307  # of MNIST's training images
PIXEL_DEVIATION = 0.3081  # of them
DIGIT_RANGE = 16  # largest value of a pixel of scikit-learn's digits


class Task(NamedTuple):
    """A recipe and the test samples.

    Attributes:
      recipe: its `test` is the validation set.
      report: the samples whose loss is reported.
    """

    recipe: lepton.Recipe
    report: Arrays


def recipe_of(
    model: Any,
    train: Arrays,
    validation: Arrays,
    steps: int,
    batch_size: int,
    **options: Any,
) -> lepton.Recipe:
    """Return a task's recipe, evaluated `EVALUATIONS` times.

    Args:
      model: as in `Recipe`.
      train: training samples.
      validation: validation samples.
      steps: of a run; a multiple of `EVALUATIONS`.
      batch_size: samples a step.
      **options: others of `Recipe`. Unless it is among them the loss is a
        cross-entropy, and the optimizer, a function of the learning rate, AdamW.
    """
    usual = {"loss": losses.cross_entropy, "optimizer": adamw()}
    return lepton.Recipe(
        model=model,
        learning_rate=1e-3,
        train=train,
        test=validation,
        steps=steps,
        batch_size=batch_size,
        evaluate_every=steps // EVALUATIONS,
        **(usual | options),
    )


def adamw(b2: float = 0.999) -> Any:
    """Return AdamW as a function of the learning rate."""
    return partial(optax.adamw, b2=b2, weight_decay=0.01)


def task_of(
    model: Any,
    parts: Sequence[Arrays],
    steps: int,
    batch_size: int,
    **options: Any,
) -> Task:
    """Return a task of training, validation and test samples; see `recipe_of`."""
    train, validation, report = parts
    return Task(
        recipe_of(model, train, validation, steps, batch_size, **options), report
    )


def three(
    samples: Arrays, validation: float, report: float
) -> tuple[Arrays, Arrays, Arrays]:
    """Split samples into training, validation and test; shares are of all of them."""
    rest, tested = samples.split(report, SPLIT_SEED)
    train, validated = rest.split(validation / (1 - report), SPLIT_SEED)
    return train, validated, tested


def in_order(
    samples: Arrays, validation: float, report: float
) -> tuple[Arrays, Arrays, Arrays]:
    """Do as `three`, without mixing: text that is read later is tested on."""
    count = len(samples)
    cuts = [0, round(count * (1 - validation - report)), round(count * (1 - report))]
    train, validated, tested = (
        Arrays(*samples.take(rows)) for rows in np.split(np.arange(count), cuts[1:])
    )
    return train, validated, tested


def first(samples: Arrays, count: int) -> Arrays:
    """Return the first samples."""
    return Arrays(*samples.take(np.arange(min(count, len(samples)))))


# ---- models ----


class ZeroLinear(nnx.Module):
    """A linear layer whose parameters begin at 0.

    Args:
      features: numbers of a sample.
      outputs: numbers that are returned; None: one, without a dim of its own.
      rngs: not used.
    """

    def __init__(self, features: int, outputs: int | None = None, *, rngs: nnx.Rngs):
        self.scalar = outputs is None
        self.linear = nnx.Linear(
            features,
            outputs or 1,
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, features) to (batch, outputs), or (batch,)."""
        outputs = self.linear(x)
        return outputs[:, 0] if self.scalar else outputs


def scaled(model: Any, factor: float) -> Any:
    """Return a factory of a module whose initial parameters are multiplied."""

    def build(rngs: nnx.Rngs) -> nnx.Module:
        module = model(rngs=rngs)
        params = nnx.state(module, nnx.Param)
        nnx.update(module, jax.tree.map(lambda x: x * factor, params))
        return module

    return build


def trained(recipe: lepton.Recipe) -> Any:
    """Return the parameters after a run, for a task that fine-tunes them."""
    recipe = recipe.with_(evaluate_every=recipe.steps)
    trainer = lepton.Trainer(recipe, devices=1)
    trainer.fit()
    assert trainer.state is not None
    return jax.tree.map(np.asarray, trainer.state.params)


def restored(model: Any, params: Any) -> Any:
    """Return a factory of a module that begins with given parameters.

    Args:
      model: its own factory.
      params: a nested dict; what is not in it is initialized.
    """

    def build(rngs: nnx.Rngs) -> nnx.Module:
        module = model(rngs=rngs)
        state = nnx.state(module, nnx.Param)
        nnx.replace_by_pure_dict(state, params)
        nnx.update(module, state)
        return module

    return build


def multiplied(loss: Any, factor: float) -> Any:
    """Return a loss times a factor."""

    def product(outputs: Any, targets: Any) -> Any:
        return factor * loss(outputs, targets)

    return product


# ---- data ----


def sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs and targets of a data set that scikit-learn holds.

    Args:
      name: such as "digits", for `load_digits`.

    Raises:
      DataError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise DataError(
            f"scikit-learn, which holds {name}, is not installed",
            where="tools.bench controller",
            remedy="pip install -e '.[recipes]', or leave the task out with --tasks",
        ) from error
    inputs, targets = getattr(datasets, f"load_{name}")(return_X_y=True)
    return inputs.astype(np.float32), targets


def digit_images() -> Arrays:
    """The 1,797 digits of scikit-learn: (8, 8, 1) pixels from 0 to 1, int labels."""
    pixels, labels = sklearn("digits")
    images = pixels.reshape(-1, 8, 8, 1) / DIGIT_RANGE
    return Arrays(images, labels.astype(np.int32))


def standardized(inputs: np.ndarray) -> np.ndarray:
    """Return columns with mean 0 and standard deviation 1."""
    deviation = inputs.std(0) + np.float32(1e-6)  # of a constant column
    return (inputs - inputs.mean(0)) / deviation


def relabeled(labels: np.ndarray, share: float, seed: int = 0) -> np.ndarray:
    """Return labels of which a share is drawn anew, all classes equally likely."""
    random = np.random.default_rng(seed)
    drawn = random.integers(0, labels.max() + 1, labels.shape)
    return np.where(random.random(labels.shape) < share, drawn, labels).astype(np.int32)


@cache
def small_mnist(data: Path) -> tuple[Arrays, Arrays, Arrays]:
    """MNIST's images halved in each direction: (14, 14, 1) pixels from 0 to 1."""
    train, test = lepton.data.idx(data / "mnist")
    train = _halved(train)
    train, validation = train.split(2000 / len(train), SPLIT_SEED)
    report, _ = _halved(test).split(0.6, SPLIT_SEED)
    return train, validation, report


def _halved(samples: Arrays) -> Arrays:
    pixels = np.asarray(samples.inputs, np.float32).reshape(-1, 14, 2, 14, 2)
    images = pixels.mean((2, 4))[..., None] / np.float32(255)
    return Arrays(images, np.asarray(samples.targets, np.int32))


def flat(images: jax.Array) -> jax.Array:
    """Return each image's pixels in one dim."""
    return images.reshape(images.shape[0], -1)


def mnist_pixels(pixels: jax.Array) -> jax.Array:
    """Return MNIST's pixels, uint8, with mean 0 and standard deviation 1."""
    return (pixels.astype("float32") / 255 - PIXEL_MEAN) / PIXEL_DEVIATION


def plays(data: Path) -> np.ndarray:
    """Characters of tinyshakespeare, 65 different ones, as int32 numbers from 0."""
    text = text_of(data / "tinyshakespeare" / "input.txt")
    return numbered(np.frombuffer(text.encode("utf-8"), np.uint8))


def next_tokens(tokens: np.ndarray, length: int) -> Arrays:
    """Cut a text into samples; the targets are each token's next one."""
    count = (len(tokens) - 1) // length
    end = count * length
    inputs = tokens[:end].reshape(count, length)
    return Arrays(inputs, tokens[1 : end + 1].reshape(count, length))


def ratings(data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MovieLens: users and items, numbered from 0, and stars, float32."""
    lines = lines_of(data / "movielens_latest_small" / "ratings.csv")
    next(lines)
    cells = [line.split(",") for line in lines]
    users = numbered([int(cell[0]) for cell in cells])
    items = numbered([int(cell[1]) for cell in cells])
    return users, items, np.asarray([float(cell[2]) for cell in cells], np.float32)


def numbered(values: Any) -> np.ndarray:
    """Return each value's place among the different ones, int32."""
    return np.unique(values, return_inverse=True)[1].astype(np.int32)


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a text file, gzipped or not."""
    return iter(text_of(path).splitlines())


def text_of(path: Path) -> str:
    """Return a text file's content, gzipped or not."""
    return bytes_of(path).decode("utf-8")


def bytes_of(path: Path) -> bytes:
    """Return a file's content, unpacked if it is gzipped.

    Raises:
      DataError: it can't be read.
    """
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
    return gzip.decompress(content) if path.suffix == ".gz" else content

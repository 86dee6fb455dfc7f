"""Test rows with the network's outputs: what baselines and the report look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from lepton_jax import losses
from lepton_jax.baselines import Comparison, Samples, Task
from lepton_jax.data import Arrays, host_rows, one_pass
from lepton_jax.errors import DataError
from lepton_jax.recipe import Recipe
from lepton_jax.step.state import State
from lepton_jax.train.program import Program

# Rows that are looked at; assumptions: an interval of an accuracy is below 0.4 % with
# so many test rows, and a cheap method has learned what it can from so many others.
MOST_TEST_ROWS = 100_000
MOST_TRAINING_ROWS = 1_000_000
MOST_READ_ROWS = 20_000  # of a data set that is read from files for this; assumption
MOST_BYTES = 2**30  # of these rows, and of the network's outputs; assumption

REGRESSION = (
    losses.squared_error,
    losses.scaled_squared_error,
    losses.huber,
    losses.poisson,
)


@dataclass(frozen=True)
class Judged:
    """Test rows, and what the network gives for them.

    Attributes:
      samples: the test rows.
      outputs: a tree of arrays, rows first; None: the model's outputs have no rows.
    """

    samples: Samples
    outputs: Any


class Examined(NamedTuple):
    """Result of a look at a network.

    Attributes:
      judged: the test rows, with its outputs.
      comparisons: with each baseline.
    """

    judged: Judged
    comparisons: list[Comparison]


def task_of(program: Program, targets: Any) -> tuple[Task, int]:
    """Return the kind of a recipe's task, and the count of its classes.

    Args:
      program: the recipe, traced.
      targets: of some rows.
    """
    outputs = _merged(program)
    is_plain = hasattr(outputs, "shape") and isinstance(
        targets,
        np.ndarray,
    )
    if not is_plain:
        return "other", 0
    is_whole = targets.dtype.kind in "iu"
    if is_whole and targets.ndim == 1 and outputs.ndim == 2:
        return "classes", int(outputs.shape[1])
    if outputs.shape[1:] != targets.shape[1:]:
        return "other", 0
    recipe = program.recipe
    if _plain(recipe.loss) not in REGRESSION and _says_yes_or_no(targets):
        return "binary", 0
    is_decoded = recipe.decode is not None
    return ("other" if is_decoded else "quantities"), 0


def _plain(loss: Any) -> Any:
    """Return a loss without its settings, and of an ensemble that of a member."""
    while isinstance(loss, partial):
        is_of_members = loss.func is losses.of_members
        loss = loss.keywords["loss"] if is_of_members else loss.func
    return loss


def _merged(program: Program) -> Any:
    """Return the shape of the outputs outside of training, where members are merged."""
    outputs = program.trace.outputs
    loss = program.recipe.loss
    if (
        not isinstance(
            loss,
            partial,
        )
        or loss.func is not losses.of_members
    ):
        return outputs
    shape = (outputs.shape[0], *outputs.shape[2:])
    return jax.ShapeDtypeStruct(shape, outputs.dtype)


def samples_of(
    program: Program,
    data: Any,
    most: int,
    most_bytes: int = MOST_BYTES,
) -> Samples:
    """Return some rows of a data set, with what is known of them.

    Args:
      program: the recipe, traced.
      data: of the recipe.
      most: rows at most.
      most_bytes: of these rows.
    """
    if not isinstance(data, Arrays):
        most = min(most, MOST_READ_ROWS)
    rows = host_rows(data, most, most_bytes)
    task, classes = task_of(program, rows.targets)
    raw_rows = getattr(program.recipe.preparation, "raw_rows", None)
    read_raw = None
    if raw_rows is not None and isinstance(data, Arrays):
        read_raw = partial(_raw_rows, raw_rows, data, rows.numbers)
    total = len(rows_of(rows.inputs)) if rows.total is None else rows.total
    return Samples(
        rows.inputs,
        rows.targets,
        total,
        task,
        classes,
        read_raw,
    )


def judged(program: Program, state: State, test: Any) -> Judged:
    """Return test rows with the network's outputs. All hosts call it.

    Args:
      program: of the recipe.
      state: with the parameters.
      test: the test data.

    Raises:
      ModelError: the outputs have no dim for rows.
    """
    samples = rows_to_judge(program, test)
    return Judged(
        samples,
        outputs_of(program, state, samples.inputs),
    )


def rows_to_judge(program: Program, test: Any) -> Samples:
    """Return test rows, as many as have outputs that fit into memory."""
    per_row = sum(
        leaf.size
        * leaf.dtype.itemsize
        // max(
            1,
            len(leaf),
        )
        for leaf in jax.tree.leaves(program.trace.outputs)
        if leaf.shape
    )
    most = min(
        MOST_TEST_ROWS,
        max(1, MOST_BYTES // max(1, per_row)),
    )
    return samples_of(program, test, most)


def is_worth_it(program: Program, samples: Samples) -> bool:
    """Whether there is something to say of test rows: a baseline, or a known task."""
    return samples.task != "other" or program.recipe.baseline is not None


def outputs_of(program: Program, state: State, inputs: Any) -> Any:
    """Return the network's outputs of rows, as NumPy arrays."""
    data = Arrays(inputs)
    size = program.recipe.batch_size
    prediction = program.prediction(_as_they_are)
    prediction.check(len(data))
    fill = len(data) % size == 0 or prediction.meeting is None
    parts = []
    rows = []
    for (batch, _), count in one_pass(
        data,
        size,
        program.sharding_of,
        fill,
    ):
        parts.append(
            program.predict(
                state,
                batch,
                _as_they_are,
            )
        )
        rows.append(count)
    return prediction.joined(parts, rows)


def rows_of(tree: Any) -> np.ndarray:
    """Return the first array of a tree, whose length is the count of rows."""
    return np.asarray(jax.tree.leaves(tree)[0])


def class_names(recipe: Recipe, classes: int) -> list[str]:
    """Return the classes as the preparation names them, or as numbers."""
    words = getattr(recipe.preparation, "words", ())
    if len(words) == classes:
        return [str(word) for word in words]
    return [str(number) for number in range(classes)]


def _raw_rows(
    read: Callable[..., Any],
    data: Arrays,
    numbers: np.ndarray | None,
    wanted: np.ndarray | None,
) -> Any:
    """Read raw rows of some of the samples of an `Arrays`.

    Args:
      read: `Serving.raw_rows`.
      data: the `Arrays`.
      numbers: of the samples in it; None: they are all of them.
      wanted: numbers of the wanted ones among these; None: all.
    """
    if numbers is not None:
        wanted = numbers if wanted is None else numbers[wanted]
    rows = read(data, wanted)
    if rows is None:
        raise DataError(
            "the raw rows of these samples are not known",
            where="Samples.raw",
            remedy="give the recipe what Serving.split returned, prepared in this run",
        )
    return rows


def _as_they_are(outputs: Any) -> Any:
    return outputs


def _says_yes_or_no(targets: np.ndarray) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())

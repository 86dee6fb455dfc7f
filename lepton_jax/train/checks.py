"""Checks of data against the program that is to compute with it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from lepton_jax.data import Arrays, check_limits, epoch_samples, sample
from lepton_jax.errors import DataError
from lepton_jax.train.program import Program
from lepton_jax.trees import by_path

TRAINING_DATA = "training data"
TEST_DATA = "test data"
INPUTS = "inputs"  # alone: there are no targets
ROWS_SHOWN = 5  # rows that a message names


def check_data(
    program: Program,
    data: Any,
    what: str,
) -> None:
    """Check that data has the shapes and dtypes that the program is traced for.

    Labels must be within its classes.

    Args:
      program: traced and planned.
      data: to compute with.
      what: one of TRAINING_DATA, TEST_DATA, INPUTS.

    Raises:
      DataError: it does not fit.
    """
    if what == TEST_DATA and epoch_samples(data) is None:
        raise DataError(
            "a data set that is read in order has no end to evaluate up to",
            where=what,
            remedy="give arrays or a grain.MapDataset",
        )
    inputs, targets = sample(data)
    _compare("inputs", program.trace.inputs, inputs, what)
    if what != INPUTS:
        _compare("targets", program.trace.targets, targets, what)
    if isinstance(data, Arrays):
        targets = None if what == INPUTS else data.targets
        check_limits(
            program.limits,
            (data.inputs, targets),
            what,
            str,
        )
    if what == TEST_DATA:
        program.evaluation.check(epoch_samples(data) or 0)


def check_hidden(
    rows: np.ndarray,
    total: int,
) -> None:
    """Check that no prediction was made of outputs that are not numbers.

    Args:
      rows: positions of the inputs whose prediction hides a NaN.
      total: inputs in all.

    Raises:
      DataError: there are such rows.
    """
    if not len(rows):
        return
    shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
    if len(rows) > ROWS_SHOWN:
        shown += ", ..."
    raise DataError(
        f"the model's outputs hold NaN for {len(rows)} of {total} inputs, and what "
        "predict returns would not show it",
        where=f"inputs, rows {shown}",
        remedy=(
            "look at those inputs, and at the model's parameters; to get the outputs "
            "as they are, call predict(inputs, decode=lambda outputs: outputs)"
        ),
    )


def _compare(
    name: str,
    traced: Any,
    given: Any,
    what: str,
) -> None:
    expected = _kinds(traced)
    actual = _kinds(given)
    if actual != expected:
        raise DataError(
            f"{name} of a sample: {_listed(actual)}; the model was traced for"
            f" {_listed(expected)}",
            where=what,
            remedy=("give data of the shapes and dtypes that the model is trained on"),
        )


def _kinds(batch: Any) -> dict[str, str]:
    """Return dtype and shape of a sample's arrays, by path: "float32[28, 28]"."""
    return {
        path: f"{jax.dtypes.canonicalize_dtype(leaf.dtype)}{list(leaf.shape[1:])}"
        for path, leaf in by_path(batch).items()
    }


def _listed(kinds: dict[str, str]) -> str:
    parts = [f"{path} {kind}".strip() for path, kind in kinds.items()]
    return ", ".join(parts) or "absent"

"""Raw rows where arrays may be given, and the preparation that goes with a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.errors import CheckpointError, DataError

FOLDER = "preparation"  # in the folder of a run or of a saved model
TABLES = ("pandas", "polars", "pyarrow")  # libraries whose tables are raw rows
SINGLE = (str, bytes, int, float, bool, type(None))
REMEDY = (
    "train on prepared data (docs/data.md) and set Recipe.preparation; or give arrays,"
    " as the model takes them"
)


def save_preparation(preparation: Any, folder: Path) -> None:
    """Write the preparation of a model's inputs into the model's folder.

    Raises:
      CheckpointError: it can't be written.
    """
    if preparation is None:
        return
    try:
        preparation.save(folder / FOLDER)
    except (DataError, OSError) as error:
        raise CheckpointError(
            f"the preparation of the inputs can't be saved: {error}",
            where=folder,
            remedy="name another folder, or make this one writable",
        ) from error


def load_preparation(folder: Path) -> Any:
    """Return the preparation in a model's folder; None: there is none.

    Raises:
      DataError: it can't be read.
    """
    if not (folder / FOLDER).is_dir():
        return None
    # only here: reading raw rows needs libraries that a model without them does not
    from lepton_jax.data.prepare.serving import Serving

    return Serving.load(folder / FOLDER)


def are_raw(
    data: Any,
    names: Sequence[str] | None,
    prepared: bool = True,
) -> bool:
    """Whether data is raw rows, and not the arrays that the model takes.

    Args:
      data: what somebody gave.
      names: the model's arguments; None: it takes one array.
      prepared: whether the model knows how raw rows are prepared. If not, a dict of
        arrays is taken for the model's arguments, whatever their names.
    """
    if isinstance(
        data,
        str | os.PathLike,
    ) or _is_table(data):
        return True
    if isinstance(data, list | tuple):
        are_dicts = bool(data) and all(isinstance(row, Mapping) for row in data)
        return are_dicts and not _is_pair_of_arrays(data)
    if not isinstance(data, Mapping) or not data:
        return False
    if all(_is_single(value) for value in data.values()):
        return True
    return prepared and (names is None or set(data) != set(names))


def _is_pair_of_arrays(data: Any) -> bool:
    """Whether this is (inputs, targets), both dicts of arrays, and no pair of rows."""
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    values = [value for part in data for value in part.values()]
    return not any(_is_single(value) for value in values)


def prepared_inputs(preparation: Any, rows: Any) -> Any:
    """Return the model's inputs of raw rows.

    Raises:
      DataError: the model has no preparation, or the rows do not fit it.
    """
    return _needed(preparation).arrays(rows)


def prepared_samples(preparation: Any, rows: Any) -> Arrays:
    """Return inputs and targets of raw rows.

    Raises:
      DataError: the model has no preparation, or the rows do not fit it.
    """
    return _needed(preparation).samples(rows)


def in_words(
    preparation: Any,
    predictions: Any,
) -> list[Any]:
    """Return predictions as values of the target.

    Raises:
      DataError: the model has no preparation, or these are no numbers of classes.
    """
    return _needed(preparation).decode(predictions)


# ---- internals ----


def _needed(preparation: Any) -> Any:
    if preparation is None:
        raise DataError(
            "these are raw rows, but the model does not know how its inputs were"
            " prepared",
            where="inputs",
            remedy=REMEDY,
        )
    return preparation


def _is_table(data: Any) -> bool:
    module = type(data).__module__.partition(".")[0]
    kind = type(data)
    return module in TABLES and (
        hasattr(
            kind,
            "columns",
        )
        or hasattr(kind, "schema")
    )


def _is_single(value: Any) -> bool:
    return (
        isinstance(
            value,
            SINGLE,
        )
        or np.ndim(value) == 0
    )

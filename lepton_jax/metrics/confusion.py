"""The confusion matrix of predictions."""

from __future__ import annotations

from typing import Any

import numpy as np

from lepton_jax.errors import DataError


def confusion_matrix(
    targets: Any,
    predictions: Any,
    classes: int | None = None,
) -> np.ndarray:
    """Count the samples of each class by the class that was predicted.

    Args:
      targets: whole numbers from 0, any shape; negative ones are left out.
      predictions: the same, e.g. `trainer.predict(inputs)`.
      classes: their number. None: the greatest of both plus 1.

    Returns:
      int64 (classes, classes): row i, column j holds the samples of class i that were
      taken for class j.

    Raises:
      DataError: shapes differ, or they are no classes.

    Example:
      >>> confusion_matrix([0, 0, 1, 2], [0, 1, 1, 1])
      array([[1, 1, 0],
             [0, 1, 0],
             [0, 1, 0]])
    """
    targets = np.asarray(targets)
    predictions = np.asarray(predictions)
    kinds = (targets.dtype, predictions.dtype)
    are_whole = all(kind.kind in "biu" for kind in kinds)
    if targets.shape != predictions.shape or not are_whole:
        raise DataError(
            f"targets are {kinds[0]}{list(targets.shape)}, predictions"
            f" {kinds[1]}{list(predictions.shape)}",
            where="metrics.confusion_matrix",
            remedy="give two arrays of whole numbers, of one shape",
        )
    rows = targets.reshape(-1).astype(np.int64)
    columns = predictions.reshape(-1).astype(np.int64)
    counted = rows >= 0
    rows = rows[counted]
    columns = columns[counted]

    most = max(rows.max(initial=-1), columns.max(initial=-1)) + 1
    classes = int(most) if classes is None else classes
    if most > classes or columns.min(initial=0) < 0:
        raise DataError(
            f"a class is not among {classes}, from 0",
            where="metrics.confusion_matrix",
            remedy="give the number of all classes, or leave it out",
        )
    counts = np.bincount(rows * classes + columns, minlength=classes**2)
    return counts.reshape(classes, classes)

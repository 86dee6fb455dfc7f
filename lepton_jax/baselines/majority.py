"""The least baseline: the answer that ignores the inputs."""

from __future__ import annotations

import numpy as np

from lepton_jax.baselines.baseline import Baseline, NotHere, Samples

# Added to each count, so that a class that was never seen has a finite logarithm: the
# rule of succession (Laplace 1814).
SUCCESSION = 1


def majority(train: Samples, test: Samples) -> Baseline:
    """Return the most frequent class, or the mean of the targets.

    Args:
      train: integer targets (rows,), targets 0 and 1, or quantities.
      test: rows to answer for; only their number counts.

    Raises:
      NotHere: the targets are none of these.
    """
    rows = f"{len(train):,} training rows"
    if train.task == "classes":
        counts = (
            np.bincount(
                train.targets,
                minlength=train.classes,
            )
            + SUCCESSION
        )
        shares = np.log(counts / counts.sum())
        outputs = np.tile(
            shares.astype(np.float32),
            (len(test), 1),
        )
        return Baseline("the most frequent class", f"counted in {rows}", outputs)
    if train.task == "binary":
        ones = (
            train.targets.sum(
                axis=0,
                dtype=np.float64,
            )
            + SUCCESSION
        )
        zeros = len(train) + 2 * SUCCESSION - ones
        logits = np.log(ones / zeros)
        name = "the more frequent answer"
        return Baseline(name, f"counted in {rows}", _repeated(logits, test))
    if train.task == "quantities":
        mean = train.targets.mean(
            axis=0,
            dtype=np.float64,
        )
        return Baseline("the mean", f"taken of {rows}", _repeated(mean, test))
    raise NotHere("the targets are neither classes nor quantities")


def _repeated(row: np.ndarray, test: Samples) -> np.ndarray:
    shape = (len(test), *np.shape(row))
    return np.broadcast_to(
        np.float32(row),
        shape,
    ).copy()

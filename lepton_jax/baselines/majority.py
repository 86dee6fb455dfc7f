"""The least baseline: the answer that ignores the inputs."""

from __future__ import annotations

from typing import Any

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
    fitted = f"on {len(train):,} training rows"
    targets = train.targets
    if train.task == "classes":
        known = targets[targets >= 0]  # a negative one is no class
        counts = np.bincount(known, minlength=train.classes) + SUCCESSION
        shares = np.log(counts / counts.sum())
        return Baseline("the most frequent class", fitted, _repeated(shares, test))
    if train.task == "binary":
        ones = targets.sum(axis=0, dtype=np.float64) + SUCCESSION
        zeros = len(train) + 2 * SUCCESSION - ones
        logits = np.log(ones / zeros)
        return Baseline("the more frequent answer", fitted, _repeated(logits, test))
    if train.task == "quantities":
        mean = np.nanmean(targets, axis=0, dtype=np.float64)
        return Baseline("the mean", fitted, _repeated(mean, test))
    raise NotHere("the targets are neither classes nor quantities")


def _repeated(row: Any, test: Samples) -> np.ndarray:
    """Return a row of outputs as often as there are test rows."""
    shape = (len(test), *np.shape(row))
    return np.broadcast_to(np.float32(row), shape).copy()

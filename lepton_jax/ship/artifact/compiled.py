"""A program compiled for one batch size, and a ladder of these for any number of rows.

    sizes 1, 2, 4, 8, ...       13 rows run in a batch of 16, of which 3 are filling

XLA compiles for fixed shapes. A ladder needs few compilations, and wastes less than
half of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from lepton_jax.errors import DataError

# Batch sizes. Assumption: powers of two, so that a batch is at least half full.
LADDER = (1, 2, 4, 8, 16, 32, 64, 128)


class BatchProgram:
    """A model's program, compiled for one batch size.

    Calls may come from several threads.

    Args:
      exported: the program.
      weights: on the device, by path.
      inputs: shapes of its inputs, by name, for this size.
      size: rows of a batch.

    Attributes:
      size: rows of a batch.
    """

    def __init__(
        self,
        exported: export.Exported,
        weights: Mapping[str, jax.Array],
        inputs: Mapping[str, jax.ShapeDtypeStruct],
        size: int,
    ):
        self.size = size
        self._weights = dict(weights)
        shapes = jax.tree.map(_shape, self._weights)
        jitted = jax.jit(exported.call)
        self._run = jitted.lower(
            shapes,
            dict(inputs),
        ).compile()

    def __call__(
        self,
        inputs: Mapping[str, Any],
    ) -> dict[str, np.ndarray]:
        """Return the outputs of a batch, by name, as NumPy arrays.

        Args:
          inputs: arrays by name, with exactly `size` rows each, of the signature's
            dtypes.
        """
        outputs = self.dispatch(inputs)
        return {name: np.asarray(leaf) for name, leaf in outputs.items()}

    def dispatch(
        self,
        inputs: Mapping[str, Any],
    ) -> dict[str, jax.Array]:
        """Return the outputs as arrays of the device, which may not be ready yet."""
        return self._run(self._weights, dict(inputs))

    @property
    def cost(self) -> dict[str, float]:
        """XLA's account of a batch: "flops", "bytes accessed"; {}: it gives none."""
        analysis = self._run.cost_analysis() or {}
        return {str(name): float(value) for name, value in dict(analysis).items()}


def batches(
    rows: int,
    sizes: Sequence[int],
) -> list[tuple[int, int]]:
    """Return the batches in which rows run: (real rows, size), in their order.

    >>> batches(13, (1, 2, 4, 8))
    [(8, 8), (5, 8)]
    """
    largest = max(sizes)
    parts = [(largest, largest)] * (rows // largest)
    rest = rows % largest
    if rest:
        parts.append((rest, min(size for size in sizes if size >= rest)))
    return parts


def filled(
    array: np.ndarray,
    start: int,
    count: int,
    size: int,
) -> np.ndarray:
    """Return rows of an array, filled up to a size by repeating the last one.

    Args:
      array: with the rows along its first dim.
      start: the first row.
      count: of rows.
      size: rows of the result.
    """
    rows = array[start : start + count]
    if count == size:
        return np.ascontiguousarray(rows)
    filling = np.repeat(
        rows[-1:],
        size - count,
        axis=0,
    )
    return np.concatenate([rows, filling])


def rows_of(inputs: Mapping[str, np.ndarray]) -> int:
    """Return how many rows arrays have.

    Raises:
      DataError: they differ, or there is none.
    """
    lengths = {name: len(array) for name, array in inputs.items()}
    if len(set(lengths.values())) != 1:
        told = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise DataError(
            f"the arrays differ in their rows: {told}",
            where="inputs",
            remedy="give every array one row for each sample",
        )
    return next(iter(lengths.values()))


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)

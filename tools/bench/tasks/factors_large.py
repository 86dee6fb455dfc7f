"""Completion of a generated matrix of rank 4, its factors from N(0, 1).

Its entries have a standard deviation of 1, those of the first product one of 2, and
noise one of 0.5.
"""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

ROWS = 200
COLUMNS = 150
RANK = 4
NOISE = 0.5


class Factors(nnx.Module):
    """The product of a row's and a column's factors, drawn from N(0, 1)."""

    def __init__(self, *, rngs: nnx.Rngs):
        drawn = nnx.initializers.normal(1.0)
        self.rows = nnx.Embed(ROWS, RANK, embedding_init=drawn, rngs=rngs)
        self.columns = nnx.Embed(COLUMNS, RANK, embedding_init=drawn, rngs=rngs)

    def __call__(self, row: jax.Array, column: jax.Array) -> jax.Array:
        """Map (batch,) and (batch,) to (batch,)."""
        return (self.rows(row) * self.columns(column)).sum(-1)


def task(data: Path) -> tasks.Task:
    """Return the task."""
    random = np.random.default_rng(3)
    left = random.normal(size=(ROWS, RANK)) / RANK**0.5
    matrix = left @ random.normal(size=(RANK, COLUMNS))
    seen = random.permutation(ROWS * COLUMNS)[: ROWS * COLUMNS // 2]
    row, column = np.divmod(seen.astype(np.int32), np.int32(COLUMNS))
    values = matrix[row, column] + NOISE * random.normal(size=len(seen))
    samples = Arrays({"row": row, "column": column}, values.astype(np.float32))
    return tasks.task_of(
        Factors,
        tasks.three(samples, 0.1, 0.2),
        600,
        128,
        loss=losses.squared_error,
    )

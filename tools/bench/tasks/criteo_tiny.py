"""Clicks of Criteo's sample, 2,000 rows: a logistic regression of hashed categories."""

import csv
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lepton_jax import losses
from lepton_jax.data import Arrays
from tools.bench import controller_tasks as tasks

COUNTS = 13
BUCKETS = 512  # of each of the 26 categories


class Clicks(nnx.Module):
    """A weight for each count and for each bucket of each category."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.counts = nnx.Linear(COUNTS, 1, rngs=rngs)
        zeros = nnx.initializers.zeros
        self.buckets = nnx.Embed(26 * BUCKETS, 1, embedding_init=zeros, rngs=rngs)

    def __call__(self, counts: jax.Array, buckets: jax.Array) -> jax.Array:
        """Map (batch, 13) and (batch, 26) to logits (batch,)."""
        return (self.counts(counts) + self.buckets(buckets).sum(1))[:, 0]


def task(data: Path) -> tasks.Task:
    """Return the task."""
    rows = list(csv.DictReader(tasks.lines_of(data / "criteo_sample/train.tiny.csv")))
    counts = [[float(row[f"I{k}"] or 0) for k in range(1, 14)] for row in rows]
    logs = np.log1p(np.maximum(np.asarray(counts, np.float32), 0))
    buckets = np.asarray([_buckets(row) for row in rows], np.int32)
    labels = np.asarray([float(row["Label"]) for row in rows], np.float32)
    samples = Arrays({"counts": logs, "buckets": buckets}, labels)
    return tasks.task_of(
        partial(Clicks),
        tasks.three(samples, 0.2, 0.35),
        400,
        32,
        loss=losses.binary_cross_entropy,
    )


def _buckets(row: dict[str, str]) -> list[int]:
    """Return the bucket of each category, whose values are hexadecimal hashes."""
    hashes = [int(row[f"C{k}"] or "0", 16) for k in range(1, 27)]
    return [k * BUCKETS + value % BUCKETS for k, value in enumerate(hashes)]

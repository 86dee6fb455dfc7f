"""Costs of Muon's orthogonalization: its products, and two exchanges.

The matrices of one shape are a stack that all devices divide, see
`step.optimizers.orthogonal`. Where kernels are kept in parts, the devices exchange
parts of each momentum for whole matrices (all-to-all), and the updates back. Where each
device keeps a kernel whole, it takes its matrices without asking, and all gather the
updates.

Of 64 kernels (4096, 14336) on 64 devices, each runs 15 products of one matrix, 5.5
TFLOP, and sends twice its 235 MB.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lepton_jax.hardware import Chip, matmul_seconds
from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step import optimizers
from lepton_jax.trees import by_path

FLOAT32 = 4


class Work(NamedTuple):
    """Products of a step's orthogonalization on one device."""

    seconds: float
    flops: float


class StackMove(NamedTuple):
    """An exchange of matrices.

    Attributes:
      kind: such as "all-to-all".
      axes: mask of the mesh axes.
      bytes: bytes of the buffer on a device.
      runs: how often a step does so.
    """

    kind: str
    axes: int
    bytes: float
    runs: int


def work(trace: Trace, chip: Chip, devices: int) -> Work:
    """Return the products of the stacks that a device has a share of."""
    seconds = 0.0
    flops = 0.0
    for stack in optimizers.stacks(_kernels(trace)):
        own = math.ceil(stack.matrices / devices)
        rows, columns = stack.rows, stack.columns
        # X X', A A, and A X, each [m, k] x [k, n] as (m, n, k)
        products = (rows, rows, columns), (rows, rows, rows), (rows, columns, rows)
        for m, n, k in products:
            one = matmul_seconds(chip, m, n, k, own, "float32")
            seconds += optimizers.STEPS * one
            flops += optimizers.STEPS * 2.0 * own * m * n * k
    return Work(seconds, flops)


def stack_moves(
    trace: Trace,
    storage: Sequence[Spec],
    counts: Sequence[int],
) -> Iterator[StackMove]:
    """Iterate over the exchanges of matrices in a step.

    Args:
      trace: the program.
      storage: the spec with which each parameter is kept.
      counts: the number of devices along each mask of mesh axes.
    """
    axes = len(counts) - 1
    kernels = _kernels(trace)
    if not kernels or counts[axes] == 1:
        return
    specs = dict(zip(by_path(trace.state.params), storage, strict=True))
    exchanged = 0.0
    gathered = 0.0
    for path, kernel in kernels.items():
        size = math.prod(kernel.shape) * FLOAT32
        mask = 0
        for own in specs[path]:
            mask |= own
        if mask:
            exchanged += size / counts[axes]
        if counts[mask] < counts[axes]:
            gathered += size / counts[mask]
    if exchanged:
        yield StackMove("all-to-all", axes, exchanged, 2 if not gathered else 1)
    if gathered:
        yield StackMove("all-gather", axes, gathered, 1)


# ---- internals ----


def _kernels(trace: Trace) -> dict[str, Any]:
    return optimizers.kernels_of(trace.recipe.optimizer, trace.state.params)

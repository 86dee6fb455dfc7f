"""Bytes of the arrays that operations with a user's rule need while they run.

Their dims are those of the operands, and they are split as the operation is, not as the
operands lie. A mixture's tokens lie split over the axis of the experts, too, but each
device of that axis computes with the tokens of all of them:

  tokens lie over         fsdp and expert
  the mixture splits      tokens over fsdp, experts over expert
  its rows take           as many times more as the expert axis has devices
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.sizes import tiling
from lepton_jax.planner.program.graph import Operation, Value
from lepton_jax.planner.program.layout import Layout, Spec
from lepton_jax.planner.program.named import Names
from lepton_jax.planner.program.ruled import workspace


def laid_out(
    names: Names,
    assignment: Assignment,
    prefers: Mapping[int, int],
) -> Layout:
    """Return how an assignment splits each value and operation.

    Args:
      names: named axes of the graph.
      assignment: its mesh axes.
      prefers: see `meets_stored`.
    """
    masks = list(assignment.masks)
    return Layout(
        names.graph,
        assignment.sizes,
        names.uses(masks),
        names.storage(masks, assignment.keep, assignment.counts),
        dict(prefers),
        names.batched,
        assignment.micro_batches,
        assignment.ring,
    )


def workspace_bytes(
    layout: Layout,
    operations: Iterable[Operation],
    tiled: bool,
) -> dict[int, float]:
    """Return the bytes of each of these arrays on a device, by the value's index.

    Args:
      layout: of the program.
      operations: those that need such arrays.
      tiled: whether to count the padding of arrays that lie in tiles, as on a TPU.
    """
    found = {}
    for op in operations:
        choice = layout.decide(op, None).choice
        assert choice is not None
        for value, spec in zip(workspace(op), choice.workspace, strict=True):
            pads = _padding(layout, value, spec) if tiled else 1.0
            found[value.index] = layout.bytes(value, spec) * pads
    return found


def _padding(layout: Layout, value: Value, spec: Spec) -> float:
    """Return how many times its bytes an array takes as rows in tiles."""
    pairs = zip(value.shape, spec, strict=True)
    *leading, width = (extent / layout.counts[mask] for extent, mask in pairs)
    shape = np.array([[math.prod(leading), width]])
    return float(tiling(shape, np.zeros(shape.shape))[0])

"""Values that a step keeps in the host's memory, and the seconds of moving them.

A value is copied out when the forward pass has made it, and fetched before the backward
pass reads it, while the device computes: libtpu writes both as a start and a done with
products between. What shows is what is longer than the computing beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from lepton_jax.planner.assignment import Assignment
from lepton_jax.planner.estimate.sizes import Sizes
from lepton_jax.planner.program.graph import Graph, Operation, Value

MOVE = "device_put"

# Shares of a step's computing beside which values are copied out and fetched: the
# forward pass is a third of the products, and a quarter where all are computed twice.
# Assumption.
OUT_BESIDE = 1 / 4
BACK_BESIDE = 1 / 2


class HostTraffic(NamedTuple):
    """Bytes that a device sends to its host and fetches from it, in a step.

    Attributes:
      out, back: bytes one way.
    """

    out: float
    back: float

    def seconds(self, bandwidth: float, computing: float) -> float:
        """Return the seconds that show.

        Args:
          bandwidth: bytes/s one way between a device and its host.
          computing: seconds of a step's products and memory traffic.
        """
        late = self.out / bandwidth - OUT_BESIDE * computing
        later = self.back / bandwidth - BACK_BESIDE * computing
        return max(0.0, late) + max(0.0, later)


class Offload:
    """The values of a graph that lie in the host's memory.

    Args:
      graph: of loss and gradients.
      sizes: bytes of its values.
    """

    def __init__(self, graph: Graph, sizes: Sizes):
        out = np.zeros(len(graph.values))
        back = np.zeros_like(out)
        for op, value, leaves in _moves(graph):
            counts = out if leaves else back
            counts[value.index] += op.times
        self.is_there = bool(out.any())
        self._sizes = sizes
        self._out = sizes.by_row(out)
        self._back = sizes.by_row(back)

    def traffic(self, assignment: Assignment) -> HostTraffic:
        """Return what a device moves in a step."""
        if not self.is_there:
            return HostTraffic(0.0, 0.0)
        out, back = (
            self._sizes.total(assignment, counts) * assignment.micro_batches
            for counts in (self._out, self._back)
        )
        return HostTraffic(out, back)

    def resident(self, assignment: Assignment) -> float:
        """Return the bytes of a device's host that are taken at a time."""
        return self.traffic(assignment).out / assignment.micro_batches


def _moves(graph: Graph) -> Iterator[tuple[Operation, Value, bool]]:
    """Yield what moves a value, the value on the device, and whether it leaves it."""
    for op in graph.operations():
        if op.name != MOVE:
            continue
        for given, made in zip(op.inputs, op.outputs, strict=True):
            if given is not None and given.on_host != made.on_host:
                yield op, given if made.on_host else made, made.on_host

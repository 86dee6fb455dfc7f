"""Reads and writes of the device's memory in a step, apart from those of matmuls."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np

from lepton_jax.planner.program.graph import BARRIER, Graph, Operation
from lepton_jax.planner.program.rules import ELEMENTWISE, REDUCTIONS
from lepton_jax.planner.rewrite.eight_bits import GRADIENT, RESULT
from lepton_jax.planner.rewrite.own import OWN_OPERATIONS
from lepton_jax.planner.xla.operations import DOTS, FREE, operands

# Operations that a fused group of elementwise operations may hold.
FUSIBLE = {
    *ELEMENTWISE,
    "broadcast_in_dim",
    "reshape",
    "transpose",
    "squeeze",
    "expand_dims",
    "concatenate",
    "split",
    "slice",
    "pad",
    "rev",
} - {BARRIER}


# Operations that move nothing, or are priced by themselves.
UNCOUNTED = {*FREE, *DOTS, *OWN_OPERATIONS, BARRIER}


def traffic(graph: Graph) -> np.ndarray:
    """Count how often a step reads or writes each value in a device's memory.

    What matmuls do with their operands is not counted. Elementwise operations and
    reductions run together (XLA's fusion): only what something else needs is written,
    and each such group reads its sources once.

    Returns:
      A float array, (values,).
    """
    counts = np.zeros(len(graph.values))
    for op, reads in _groups(graph):
        if op.name == "gather":
            counts[op.outputs[0].index] += 2 * op.times
            continue
        written = [value.index for value in op.outputs]
        for index in (*reads, *written):
            counts[index] += op.times
    return counts


def kernels(graph: Graph) -> int:
    """Return how many kernels a step starts, those of matmuls apart."""
    return sum(op.times for op, _ in _groups(graph))


def _groups(graph: Graph) -> Iterator[tuple[Operation, tuple[int, ...]]]:
    """Yield each fused group's last operation, and the indices of what it reads."""
    readers = _readers(graph)
    sources: dict[int, tuple[int, ...]] = {}
    joining = {*FUSIBLE, *REDUCTIONS}
    for op in graph.operations():
        if op.regions or op.name in UNCOUNTED or _ends_a_product(op):
            continue
        reads: dict[int, None] = {}
        for value in operands(op):
            if value.shape:
                behind = sources.get(value.index, (value.index,))
                reads.update(dict.fromkeys(behind))

        result = op.outputs[0].index if op.outputs else -1
        users = readers[result] if op.name in FUSIBLE else ()
        if users and all(user in joining for user in users):
            sources[result] = tuple(reads)
        else:
            yield op, tuple(reads)


def _ends_a_product(op: Operation) -> bool:
    """Whether an operation's result is written by a product of 8 bits.

    It is scaled before it is written, and counted as the product's.
    """
    return op.name == "name" and op.params["name"] in (RESULT, GRADIENT)


def _readers(graph: Graph) -> dict[int, list[str]]:
    """Return the names of the operations that read each value."""
    readers: dict[int, list[str]] = defaultdict(list)
    for op in graph.operations():
        for value in operands(op):
            readers[value.index].append(op.name)
    return readers

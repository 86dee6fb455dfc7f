"""Communication for the rows that a step takes out of embeddings, and puts back.

Where the rows of an embedding are split over devices, those that a step touches lie on
some of them each. An all-reduce gives each device all of them (those that it lacks
count as 0), of the parameter and of each array of the optimizer's state. After the
update, an all-gather does, and each device puts back its own.

Take 1,000 slots of 64 float32, split over four devices, under Adam: three all-reduces
and three all-gathers of 256,000 bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.trace import Trace
from lepton_jax.step.embeddings import rowwise_arrays
from lepton_jax.trees import by_path, nbytes

KINDS = ("all-reduce", "all-gather")


class RowMove(NamedTuple):
    """A collective that moves touched rows.

    Attributes:
      path: of the array in the state.
      kind: such as "all-reduce".
      axes: mask of the mesh axes.
      bytes: bytes of the buffer on a device.
    """

    path: str
    kind: str
    axes: int
    bytes: float


def row_moves(
    trace: Trace,
    storage: Sequence[Spec],
    counts: Sequence[int],
) -> Iterator[RowMove]:
    """Iterate over the collectives that move touched rows in a step.

    Args:
      trace: the program.
      storage: the spec with which each parameter is kept.
      counts: the number of devices along each mask of mesh axes.
    """
    tables = trace.tables.tables
    if not tables:
        return
    paths = by_path(trace.state.params)
    specs = dict(zip(paths, storage, strict=True))
    leaves = by_path(trace.state)
    for path, table in rowwise_arrays(trace.tables.sizes, trace.state).items():
        axes, *columns = specs[table]
        if not axes:
            continue
        taken = nbytes(leaves[path]) * tables[table].slots / tables[table].size
        if leaves[path].ndim > 1:
            for mask in columns:
                taken /= counts[mask]
        for kind in KINDS:
            yield RowMove(path, kind, axes, taken)

"""Costs of the rows that a step takes out of embeddings, and puts back.

Where the rows of an embedding are split over devices, those that a step touches lie on
some of them each. An all-reduce gives each device all of them (those that it lacks
count as 0), of the parameter and of each array of the optimizer's state. After the
update, an all-gather does, and each device puts back its own.

Take 1,000 slots of 64 float32, split over four devices, under Adam: three all-reduces
and three all-gathers of 256,000 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lepton_jax.planner.program.layout import Spec
from lepton_jax.planner.program.trace import Trace
from lepton_jax.planner.xla.figures import LANES
from lepton_jax.step.embeddings import rowwise_arrays
from lepton_jax.trees import by_path, nbytes

KINDS = ("all-reduce", "all-gather")
# columns from which on libtpu copies a table, see `copied_bytes`
COPIED = 64


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
    for path, table, leaf, spec in _arrays(trace, storage):
        axes, *columns = spec
        if not axes:
            continue
        taken = nbytes(leaf) * tables[table].slots / tables[table].size
        for mask in columns:
            taken /= counts[mask]
        for kind in KINDS:
            yield RowMove(path, kind, axes, taken)


def taken_bytes(trace: Trace) -> int:
    """Return the bytes of the rows that a step takes out, of all of their arrays."""
    tables = trace.tables.tables
    leaves = by_path(trace.state)
    taken = 0.0
    for path, table in rowwise_arrays(trace.tables.sizes, trace.state).items():
        taken += nbytes(leaves[path]) * tables[table].slots / tables[table].size
    return int(taken)


def copied_bytes(
    trace: Trace,
    storage: Sequence[Spec],
    counts: Sequence[int],
) -> int:
    """Return the bytes of copies of whole arrays that libtpu makes.

    It keeps an array of as many columns as fill no lanes with its rows along the lanes,
    and copies it to look rows up: of 64, 96 and 200 columns, but not of 8 to 48, nor
    of multiples of 128 (libtpu of jax 0.10, v5e, 1,000,000 rows).
    """
    copied = 0.0
    for _, _, leaf, (axes, *columns) in _arrays(trace, storage):
        width = math.prod(leaf.shape[1:])
        for mask in columns:
            width //= counts[mask]
        if width >= COPIED and width % LANES:
            lanes = math.ceil(width / LANES) * LANES
            copied += leaf.shape[0] / counts[axes] * lanes * leaf.dtype.itemsize
    return int(copied)


def _arrays(
    trace: Trace,
    storage: Sequence[Spec],
) -> Iterator[tuple[str, str, Any, Spec]]:
    """Iterate over the arrays of the state that have a table's rows.

    Yields:
      Path of the array and of its table, its shape, and the spec with which it is kept.
    """
    specs = dict(
        zip(
            by_path(trace.state.params),
            storage,
            strict=True,
        )
    )
    leaves = by_path(trace.state)
    for path, table in rowwise_arrays(trace.tables.sizes, trace.state).items():
        leaf = leaves[path]
        yield path, table, leaf, specs[table][: leaf.ndim]

"""One collective of a compiled module, and the mesh axes along which it moves data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class CollectiveFound:
    """One collective of the compiled module.

    An asynchronous pair is one, and so is a fusion with its inner operation.

    Attributes:
      kind: one of `KINDS`. An all-reduce that its fusion scatters at once (TPU) is a
        reduce-scatter.
      bytes: bytes of the whole buffer on one device in one run: an all-gather's result,
        else the operands. XLA for CPU widens bfloat16 to float32 here.
      groups: the members of each group, as positions in `mesh.devices.flat` (which are
        not `device.id`s); (source, target) pairs of a collective-permute.
      times: runs in one call of the program.
      op_name: JAX's name stack of the operation it comes from.
      file, line: the innermost line of that operation that is no library's; the empty
        string and 0 if unknown.
      exact: False inside a loop whose number of turns is not in the text (it counts as
        1), or in a conditional's branch.
      sliced: whether each use of an all-reduce takes a slice only, so that it would be
        a reduce-scatter if the backend had one.
      windowed: whether a permute bears a matmul's name: most likely a piece of an
        all-gather or reduce-scatter that XLA overlaps with it, a shard at a time (on
        TPU n or n + 1 shards in all, where a ring of n needs n - 1).
      name: of the instruction, and `computation` of what holds it.
      channel: XLA's number of it, which its parts share.
    """

    kind: str
    bytes: int
    groups: tuple[tuple[int, ...], ...]
    times: int
    op_name: str = ""
    file: str = ""
    line: int = 0
    exact: bool = True
    sliced: bool = False
    windowed: bool = False
    name: str = ""
    computation: str = ""
    channel: str = ""

    @property
    def sent(self) -> float:
        """Bytes that one device sends in one call of the program, by a ring's count."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        size = len(self.groups[0]) if self.groups else 1
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * (size - 1) / size * self.bytes * self.times

    def axes(
        self,
        mesh_shape: Mapping[str, int],
        device_ids: np.ndarray | None = None,
    ) -> tuple[str, ...] | None:
        """Return the mesh axes of its groups, see `axes_of`."""
        permute = self.kind == "collective-permute"
        return axes_of(self.groups, mesh_shape, device_ids, permute)


def axes_of(
    groups: Sequence[Sequence[int]],
    mesh_shape: Mapping[str, int],
    device_ids: np.ndarray | None = None,
    permute: bool = False,
) -> tuple[str, ...] | None:
    """Return the mesh axes along which a collective moves data, in the mesh's order.

        >>> axes_of([[0, 1], [2, 3], [4, 5], [6, 7]], {"fsdp": 4, "tensor": 2})
        ('tensor',)
        >>> axes_of([[0, 2, 4, 6], [1, 3, 5, 7]], {"fsdp": 4, "tensor": 2})
        ('fsdp',)

    Args:
      groups: groups of `CollectiveFound`.
      mesh_shape: sizes of the mesh's axes.
      device_ids: the numbers that `groups` uses, in the mesh's shape; default 0, 1, 2,
        ..., as XLA numbers the devices of a jitted function by their place in the mesh.
      permute: whether the groups are (source, target) pairs; then the axes are those
        along which any pair moves.

    Returns:
      The axes, or None if the groups are not a product of whole axes.
    """
    shape = np.asarray(tuple(mesh_shape.values()), int)
    ids = np.arange(shape.prod())
    if device_ids is not None:
        ids = np.asarray(device_ids).reshape(-1)
    lengths = {len(group) for group in groups}
    if len(lengths) != 1 or not np.isin(groups, ids).all():
        return None

    order = np.argsort(ids)
    # Positions in the mesh, (groups, members), and whether each axis varies in a group.
    places = order[
        np.searchsorted(
            ids,
            np.asarray(groups),
            sorter=order,
        )
    ]
    coordinates = np.stack(np.unravel_index(places, tuple(shape)), -1)
    varies = (coordinates != coordinates[:, :1]).any(1)
    if permute:
        varies = varies.any(0, keepdims=True)
    else:
        alike = (varies == varies[0]).all()
        if not alike or shape[varies[0]].prod() != places.shape[1]:
            return None
    return tuple(
        name for name, moves in zip(mesh_shape, varies[0], strict=True) if moves
    )

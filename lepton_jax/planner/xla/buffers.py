"""Buffers and groups: what XLA's fusion leaves of a program."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from lepton_jax.planner.program.graph import Operation

# Numbers of buffers.
Buffers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BufferKind:
    """The rule by which a buffer's bytes follow from the value that it holds.

    A value has two sizes on a device: as it is stored (a parameter may be split over
    devices) and as it is computed with (the same parameter, gathered). They are the
    same for most values.

    Attributes:
      computed: whether the buffer holds the value as it is computed with, else as it
        is stored.
      scale: how many times the value's bytes the buffer takes.
      gathered: whether there is a buffer only where the two sizes differ, because a
        collective has to gather or to reduce the value.
      padded: whether rows are padded to the width of a TPU's vector registers.
      number_bytes: bytes of each number, where that is not given by the value's dtype.
    """

    computed: bool = False
    scale: float = 1.0
    gathered: bool = False
    padded: bool = False
    number_bytes: int | None = None


# The value as it is stored, which for most values is as it is computed with.
STORED = BufferKind()
# In bfloat16, because only products read it that round their float32 operands (TPU).
STORED_HALF = BufferKind(scale=0.5)
# With each row in whole registers (TPU).
STORED_ROWS = BufferKind(padded=True)
# Four bytes for each number: indices, or a float32 copy (CPU).
STORED_WORDS = BufferKind(number_bytes=4)

# The value as it is computed with, such as a gradient before devices keep their parts.
COMPUTED = BufferKind(computed=True)
# A float32 copy of a 16-bit value (CPU).
COMPUTED_DOUBLE = BufferKind(computed=True, scale=2.0)
COMPUTED_ROWS = BufferKind(computed=True, padded=True)

# What a collective fills or reads, if there is one: a gathered parameter, a gradient
# that is reduced.
GATHERED = BufferKind(computed=True, gathered=True)
GATHERED_HALF = BufferKind(computed=True, scale=0.5, gathered=True)
GATHERED_DOUBLE = BufferKind(computed=True, scale=2.0, gathered=True)

# A token: it takes no memory, and only orders groups.
TOKEN = BufferKind(scale=0.0)


class Group:
    """Operations that run as one kernel; a loop is a group with a body.

    Attributes:
      reads: buffers that must exist before it runs.
      writes: buffers that it creates.
      body: groups that a loop repeats; None for a kernel.
      reuses: buffers that a result may overwrite if nothing else needs them.
      updates: buffers that it changes in place.
      late: whether it runs last of all that become ready at the same time (CPU), or
        waits for the chain of layers (TPU, see `fusion_tpu`).
      product: the matmul or convolution that it computes, if any.
    """

    __slots__ = ("body", "late", "product", "reads", "reuses", "updates", "writes")

    product: Operation | None

    def __init__(
        self,
        reads: Iterable[int],
        writes: Iterable[int],
        body: list[Group] | None = None,
        reuses: Iterable[int] = (),
        updates: Iterable[int] = (),
    ):
        self.reads = tuple(dict.fromkeys(reads))
        self.writes = tuple(writes)
        self.body = body
        self.reuses = tuple(reuses)
        self.updates = tuple(updates)
        self.late = False
        self.product = None

    @property
    def needs(self) -> Buffers:
        """Buffers that an earlier group has to provide."""
        return (*self.reads, *self.reuses, *self.updates)

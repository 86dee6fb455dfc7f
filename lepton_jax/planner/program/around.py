"""Attention whose sequence is split: which mesh axes exchange heads, which are a ring.

Where the sequence of attention lies in parts, there are two ways. The devices exchange
parts of the length for heads and back, an all-to-all for each array (Jacobs et al.
2023, "DeepSpeed Ulysses"). Or queries stay, and keys and values go around a ring
(`rewrite.ring`). Heads can be exchanged as far as there are enough of them; the other
axes are a ring. The inner axes exchange, since they join parts that lie next to each
other. With eight heads of keys, and a sequence over two axes of four and eight devices:

    >>> counts = [1, 4, 8, 32]
    >>> shares([(2, 64, 16, 4), (2, 64, 8, 4)], heads=0, length=3, counts=counts)
    Shares(exchanged=2, ring=1)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lepton_jax.planner.program.kernels import LENGTH, heads_dim, length_dim, split
from lepton_jax.planner.rewrite.attention import ATTENTION, OPERANDS
from lepton_jax.planner.rewrite.ring import halved, steps

# numbers of the operands of both operations
QUERY, KEY, VALUE = range(3)
# bytes of a number in float32, in which gradients travel
WIDE = 4
# a collective-permute between devices that are no neighbours
PERMUTATION = "permutation"
PASSED_ON = "collective-permute"


class Shares(NamedTuple):
    """Mesh axes that split the sequence, by what attention does along them.

    Attributes:
      exchanged: mask of those along which parts of it are exchanged for heads.
      ring: mask of those along which keys and values go around.
    """

    exchanged: int
    ring: int


class Passage(NamedTuple):
    """The moves that a ring makes of one array.

    Attributes:
      kind: `PERMUTATION` or `PASSED_ON`.
      where: "input N" or "out".
      bytes: of all steps together, on a device.
      steps: how often it is moved.
    """

    kind: str
    where: str
    bytes: float
    steps: int


def shares(
    shapes: Sequence[Sequence[int]],
    heads: int,
    length: int,
    counts: Sequence[int],
    ring: bool = False,
) -> Shares:
    """Divide the mesh axes of a sequence.

    Args:
      shapes: of the kernel's arrays, query and key first.
      heads: mask of the mesh axes that split the heads.
      length: mask of those that split the sequence.
      counts: devices along each mask.
      ring: whether all of them are a ring where they can be.
    """
    may_go_around = shapes[QUERY][LENGTH] == shapes[KEY][LENGTH]
    if ring and may_go_around:
        return Shares(0, length)
    exchanged = 0
    for axis in reversed(range(length.bit_length())):
        more = exchanged | length & 1 << axis
        if not _divide(shapes, counts[heads | more]):
            break
        exchanged = more
    if exchanged != length and not may_go_around:
        return Shares(0, 0)
    return Shares(exchanged, length & ~exchanged)


def goal(
    shape: Sequence[int],
    samples: int,
    heads: int,
    length: int,
) -> tuple[int, ...]:
    """Return the spec in which a kernel takes an array, its length split by a ring."""
    spec = list(split(shape, samples, heads))
    spec[length_dim(shape)] = length
    return tuple(spec)


def passages(op: Any, sizes: Sequence[float], devices: int) -> Iterator[Passage]:
    """Iterate over what the devices of a ring send for one operation.

    Args:
      op: attention or its gradient.
      sizes: bytes that a device has of each input and, behind them, output.
      devices: of the ring.
    """
    how = op.params["how"]
    inputs = len(op.inputs)
    arrays = 3 if op.name == ATTENTION else OPERANDS
    if halved(how):
        for number in range(inputs):
            yield Passage(PERMUTATION, f"input {number}", sizes[number], 1)
        for size in sizes[inputs:]:
            yield Passage(PERMUTATION, "out", size, 1)

    local = op.inputs[QUERY].shape[LENGTH] // devices
    count = steps(how, local, devices)
    if count == 0:
        return
    for number in (KEY, VALUE, *range(arrays, inputs)):
        yield Passage(PASSED_ON, f"input {number}", count * sizes[number], count)
    if op.name == ATTENTION:
        return
    for number in (KEY, VALUE):
        wide = WIDE / op.inputs[number].dtype.itemsize
        size = (count + 1) * sizes[number] * max(1.0, wide)
        yield Passage(PASSED_ON, f"input {number}", size, count + 1)


# ---- internals ----


def _divide(shapes: Sequence[Sequence[int]], count: int) -> bool:
    """Whether the heads of all arrays divide by a number of devices."""
    for shape in shapes:
        place = heads_dim(shape)
        if place is not None and shape[place] % count:
            return False
    return True

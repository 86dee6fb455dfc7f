"""Links of mesh axes on the hardware, and the cost of a collective over them.

The cost is alpha-beta: seconds = latency + bytes / bandwidth (Thakur, Rabenseifner and
Gropp 2005, "Optimization of collective communication operations in MPICH"). Latency and
bandwidth on a torus and on a switched node follow "How to Scale Your Model",
https://jax-ml.github.io/scaling-book, parts 3 (sharding) and 12 (GPUs).

An example: on "v5p:4x4x4" the mesh {"data": 16, "model": 4} gets a whole dim of the
torus for "model" and the two others for "data". All dims wrap, so each device receives
from two neighbours along each dim at the same time:

    >>> from lepton_jax.hardware import topology
    >>> links = lay({"data": 16, "model": 4}, topology("v5p:4x4x4"))
    >>> links["data"].physical
    'ICI dim 1 (4, wraps) and dim 2 (4, wraps)'
    >>> links["model"].physical
    'ICI dim 0 (4, wraps)'
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from lepton_jax.errors import PlanError
from lepton_jax.hardware.chips import Chip
from lepton_jax.hardware.topology import Topology

# Shape of the ramp. A small message takes 1 + RAMP_SLOPE times as long as at the full
# rate, a large one loses `ramp` seconds, and between lies a concave curve (assumption).
RAMP_SLOPE = 3

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "permutation",
)


class Part(NamedTuple):
    """The part of one physical dim that an axis takes.

    It is `size` devices, each `stride` further along `dim` of the topology's grid.
    """

    dim: int
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Link:
    """The links of one mesh axis, or of several joined, for its collectives.

    Attributes:
      size: devices along the axis.
      kind: "ici", "nvlink", "network" or "memory"; of several, the slowest.
      bandwidth: bytes/s at which each device receives an all-gather (or sends a
        reduce-scatter).
      exchange: bytes/s at which each device sends to all others alike.
      shift: bytes/s to the next device of the axis.
      latency: seconds that a pass through all devices costs, whatever its size.
      hop: seconds that a step to the next device costs.
      ramp: seconds that a large collective loses until the links are full.
      wraps: whether the links close to rings.
      physical: the place, for explanations.
      parts: parts of the physical dims, which `join` needs.
      topology: the topology, which `join` needs.
    """

    size: int
    kind: str
    bandwidth: float
    exchange: float
    shift: float
    latency: float
    hop: float
    ramp: float
    wraps: bool
    physical: str
    parts: tuple[Part, ...] = field(default=(), repr=False)
    topology: Topology | None = field(default=None, repr=False)

    def seconds(
        self,
        collective: str,
        payload: float,
    ) -> float:
        """Return the seconds of a collective over this axis.

        Args:
          collective: one of `COLLECTIVES`.
          payload: bytes on each device of the whole buffer: gathered (all-gather), to
            be reduced (reduce-scatter, all-reduce), exchanged (all-to-all, what a
            device holds of it) or passed on, to the next device (collective-permute) or
            to any (permutation: as many bytes cross the middle as of an all-to-all).
        """
        n = self.size
        if n == 1:
            return 0.0
        if collective == "collective-permute":
            return self.hop + payload / self.shift
        is_far = collective in ("all-to-all", "permutation")
        rate = self.exchange if is_far else self.bandwidth
        flow = payload * (n - 1) / n / rate
        once = self.latency + flow
        if self.ramp:
            once += self.ramp * flow / (flow + self.ramp / RAMP_SLOPE)
        if collective == "all-reduce":
            return 2 * once
        assert collective in COLLECTIVES, collective
        return once


def lay(
    mesh: Mapping[str, int],
    topology: Topology,
) -> dict[str, Link]:
    """Return the links of each mesh axis, axes from the least to the most local.

    On a TPU an axis gets whole dims of the torus where their product is its size, else
    pieces of dims, which don't wrap. On GPUs the last axes lie inside a node (an NVLink
    domain), the others over the network, or over both.

    Raises:
      PlanError: the axes' sizes don't multiply to the number of devices.
    """
    return dict(_lay(tuple(mesh.items()), topology))


def join(links: Iterable[Link]) -> Link:
    """Return the links of a collective over several axes of one `lay` at once."""
    links = tuple(links)
    assert links, "no links to join"
    return links[0] if len(links) == 1 else _join(links)


def across_slices(sizes: Sequence[int], topology: Topology) -> int:
    """Return the mask of the mesh axes that span slices; axis i is bit 1 << i.

    >>> from lepton_jax.hardware import topology
    >>> across_slices((2, 64), topology("2*v5p:4x4x4"))
    1
    """
    if topology.slices == 1:
        return 0
    links = lay({str(i): size for i, size in enumerate(sizes)}, topology)
    dim = _slices_dim(topology)
    return sum(
        1 << axis
        for axis, link in enumerate(links.values())
        if any(part.dim == dim for part in link.parts)
    )


def arrange(
    mesh: Mapping[str, int],
    topology: Topology,
    devices: Sequence[Any],
) -> np.ndarray:
    """Return the devices in the mesh's shape, each where `lay` has it.

    Args:
      mesh: sizes of the mesh's axes.
      topology: the topology.
      devices: as many as the topology has; on a TPU with `coords` and `core_on_chip`,
        else in JAX's own order.
    """
    assert len(devices) == topology.devices, (
        f"{len(devices)} devices for {topology.name}"
    )
    if topology.chip.torus:
        torus = topology.chip.torus
        devices = sorted(
            devices,
            key=lambda device: (
                *device.coords[:torus],
                device.core_on_chip,
                getattr(device, "slice_index", 0),
            ),
        )
    elif topology.slices > 1:
        # JAX's own order has slice after slice
        inside = len(devices) // topology.slices
        devices = [d for i in range(inside) for d in devices[i::inside]]

    # The grid of devices cut into the axes' parts, then its dims in the axes' order.
    links = lay(mesh, topology).values()
    pieces = [(part, axis) for axis, link in enumerate(links) for part in link.parts]
    pieces.sort(key=lambda piece: (piece[0].dim, -piece[0].stride))
    axes = [axis for _, axis in pieces]
    order = sorted(range(len(axes)), key=axes.__getitem__)
    grid = np.empty(len(devices), object)
    grid[:] = devices
    grid = grid.reshape([part.size for part, _ in pieces])
    return grid.transpose(order).reshape(tuple(mesh.values()))


@lru_cache(maxsize=4096)
def _lay(
    mesh: tuple[tuple[str, int], ...],
    topology: Topology,
) -> tuple[tuple[str, Link], ...]:
    sizes = [size for _, size in mesh]
    if math.prod(sizes) != topology.devices or any(size < 1 for size in sizes):
        product = " x ".join(f"{name}={size}" for name, size in mesh)
        raise PlanError(
            f"the mesh {product} has {math.prod(sizes)} places, and {topology.name} has"
            f" {topology.devices} devices",
            where=f"topology {topology.name}",
            remedy="choose sizes whose product is the devices",
        )
    taken = [1] * len(topology.grid)
    links = {}
    for name, size in reversed(mesh):
        whole = _whole(size, taken, topology) if topology.chip.torus else ()
        parts = whole or _split(size, taken, topology)
        for part in parts:
            taken[part.dim] *= part.size
        links[name] = _link(parts, topology)
    return tuple((name, links[name]) for name, _ in mesh)


def _whole(
    size: int,
    taken: list[int],
    topology: Topology,
) -> tuple[Part, ...]:
    """Return untouched dims that multiply to `size`, the fastest together, if any."""
    free = [
        Part(dim, n, 1)
        for dim, n in enumerate(topology.grid)
        if n > 1 and taken[dim] == 1 and dim != _slices_dim(topology)
    ]
    choices = []
    for count in range(1, len(free) + 1):
        for parts in itertools.combinations(free, count):
            if math.prod(part.size for part in parts) == size:
                choices.append(parts)
    return max(
        choices,
        key=lambda parts: _link(parts, topology).bandwidth,
        default=(),
    )


def _split(
    size: int,
    taken: list[int],
    topology: Topology,
) -> tuple[Part, ...]:
    """Return pieces of dims that multiply to `size`.

    On a torus they are those with the most devices in whole dims, then those that break
    the fewest dims for the axes to come, then the fastest; on GPUs as much as possible
    lies inside a node. As little as possible lies across slices.
    """
    left = [n // t for n, t in zip(topology.grid, taken, strict=True)]

    def merit(pieces: tuple[int, ...]) -> tuple[Any, ...]:
        across = -pieces[-1] if topology.slices > 1 else 0
        if not topology.chip.torus:
            return (across or pieces[-1],)
        pairs = zip(pieces, topology.grid, strict=True)
        whole = math.prod(piece for piece, n in pairs if piece == n)
        rests = zip(pieces, left, strict=True)
        broken = sum(1 < piece < rest for piece, rest in rests)
        bandwidth = _link(_parts(pieces, taken), topology).bandwidth
        return across, whole, -broken, bandwidth, pieces

    best = max(_factorings(size, left), key=merit)
    return _parts(best, taken)


def _parts(
    pieces: Sequence[int],
    taken: Sequence[int],
) -> tuple[Part, ...]:
    return tuple(
        Part(dim, size, taken[dim]) for dim, size in enumerate(pieces) if size > 1
    )


def _factorings(
    size: int,
    left: Sequence[int],
) -> Iterator[tuple[int, ...]]:
    """Yield all ways to write `size` as a product of a divisor of each number left.

    >>> list(_factorings(4, [4, 2]))
    [(2, 2), (4, 1)]
    """
    if not left:
        if size == 1:
            yield ()
        return
    for piece in range(1, min(size, left[0]) + 1):
        if left[0] % piece == 0 and size % piece == 0:
            for rest in _factorings(size // piece, left[1:]):
                yield (piece, *rest)


@lru_cache(maxsize=4096)
def _join(links: tuple[Link, ...]) -> Link:
    """Return the link of several axes.

    Pieces of one dim that lie next to each other become one piece; if that is the whole
    dim, it wraps again.
    """
    parts = [part for link in links for part in link.parts]
    parts.sort(key=lambda part: (part.dim, part.stride))
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if last and last.dim == part.dim and last.stride * last.size == part.stride:
            merged[-1] = Part(
                last.dim,
                last.size * part.size,
                last.stride,
            )
        else:
            merged.append(part)
    topology = links[0].topology
    assert topology is not None
    return _link(tuple(merged), topology)


# ---- the links of parts ----


def _link(
    parts: tuple[Part, ...],
    topology: Topology,
) -> Link:
    if not parts:
        return _one_device(topology)
    if any(part.dim == _slices_dim(topology) for part in parts):
        return _across_slices(parts, topology)
    if topology.chip.torus:
        return _torus(parts, topology)
    if topology.platform == "cpu":
        return _memory(parts, topology)
    return _switched(parts, topology)


def _slices_dim(topology: Topology) -> int:
    """Return the dim of the grid that the slices are; -1: there is one slice."""
    return len(topology.grid) - 1 if topology.slices > 1 else -1


def _across_slices(parts: tuple[Part, ...], topology: Topology) -> Link:
    """Return the link of an axis that spans slices.

    A collective is made of one inside each slice and one between them, in which each
    device sends its own share: of an all-gather of V bytes over n devices in each of s
    slices, V (s-1)/(s n) over the network, and V (n-1)/n inside. libtpu 0.0.42 compiles
    sums of gradients for two slices of v5e:2x2 so. Of an all-to-all's payload P,
    P (s-1)/s leaves the slice.
    """
    chip = topology.chip
    dim = _slices_dim(topology)
    slices = _size(part for part in parts if part.dim == dim)
    inner = _link(tuple(part for part in parts if part.dim != dim), topology)
    network = chip.network_bandwidth * chip.network_fraction
    between = (slices - 1) / slices / network
    share = (inner.size - 1) / inner.size
    size = inner.size * slices
    gather = between / inner.size + share / inner.bandwidth
    exchange = between + share / inner.exchange
    words = f"the network among {slices} slices"
    if inner.size > 1:
        words += f" and {inner.physical}"
    return Link(
        size=size,
        kind="network",
        bandwidth=(size - 1) / size / gather,
        exchange=(size - 1) / size / exchange,
        shift=network,
        latency=chip.call_latency + inner.latency + (slices - 1) * chip.network_latency,
        hop=chip.call_latency + chip.network_latency,
        ramp=chip.ramp_seconds,
        wraps=False,
        physical=words,
        parts=parts,
        topology=topology,
    )


def _one_device(topology: Topology) -> Link:
    return Link(
        size=1,
        kind="memory",
        bandwidth=math.inf,
        exchange=math.inf,
        shift=math.inf,
        latency=0.0,
        hop=0.0,
        ramp=0.0,
        wraps=False,
        physical="one device",
        parts=(),
        topology=topology,
    )


def _size(parts: Iterable[Part]) -> int:
    return math.prod(part.size for part in parts)


def _torus(
    parts: tuple[Part, ...],
    topology: Topology,
) -> Link:
    """Return the link of pieces of a torus.

    All-gather of V bytes: the dims work at the same time, V (N-1)/N over the sum of
    their rates (a ring sends both ways), but a dim of n carries at least V (n-1)/N.
    All-to-all: the bytes that cross the middle of each dim, floor(n^2/4)/n of a
    device's payload, over the links there. Groups that lie `stride` apart share the
    links between them. So do the devices of a chip, unless they are on the axis
    themselves: then each half of what the chip gathers crosses to the other device.
    """
    chip = topology.chip
    ici = [part for part in parts if part.dim < chip.torus]
    size = _size(parts)
    # Whether the axis has all devices of each chip.
    whole_chips = size > _size(ici)
    rings = {
        part: topology.wraps[part.dim] and part.size == topology.grid[part.dim]
        for part in ici
    }
    rate = chip.link_bandwidth * chip.link_fraction
    gather, exchange = _torus_passes(rings, chip, rate, whole_chips)

    stride = max((part.stride for part in ici), default=1)
    hops = 1 if whole_chips else 0
    for part, ring in rings.items():
        hops += part.stride * (part.size // 2 if ring else part.size - 1)
    shift = rate / stride / chip.devices_per_chip if ici else chip.core_bandwidth
    return Link(
        size=size,
        kind="ici",
        bandwidth=(size - 1) / size / gather,
        exchange=(size - 1) / size / exchange,
        shift=shift,
        latency=chip.call_latency + hops * chip.link_latency,
        hop=chip.call_latency + stride * chip.link_latency,
        ramp=chip.ramp_seconds,
        wraps=bool(ici) and all(rings.values()),
        physical=_named(parts, topology, rings),
        parts=parts,
        topology=topology,
    )


def _torus_passes(
    rings: Mapping[Part, bool],
    chip: Chip,
    rate: float,
    whole_chips: bool,
) -> tuple[float, float]:
    """Return the seconds per byte of an all-gather and of an all-to-all on a torus.

    Args:
      rings: the pieces of the torus, and whether each wraps.
      chip: the chip.
      rate: bytes/s of a link.
      whole_chips: whether the axis has all devices of each chip.
    """
    between_devices = 1 / chip.core_bandwidth if whole_chips else 0.0
    gather = between_devices / 2
    exchange = between_devices / 2
    if not rings:
        return gather, exchange

    # The devices of a chip are in groups that share its links, unless on the axis.
    sharing = 1 if whole_chips else chip.devices_per_chip
    chips = _size(rings)
    ways = {
        part: rate * (2 if ring else 1) / part.stride for part, ring in rings.items()
    }
    limits = [ways[part] * (chips - 1) / (part.size - 1) for part in rings]
    fastest = min(sum(ways.values()), *limits) / sharing
    gather += (chips - 1) / chips / fastest
    crossing = [
        part.size**2 // 4 / part.size * chip.devices_per_chip / ways[part]
        for part in rings
    ]
    return gather, max(exchange, *crossing)


def _named(
    parts: tuple[Part, ...],
    topology: Topology,
    rings: Mapping[Part, bool],
) -> str:
    """Return parts in words: "ICI dim 0 (16, wraps) and 4 of dim 1 (16)"."""
    words = []
    for part in parts:
        whole = topology.grid[part.dim]
        if part not in rings:
            words.append(f"the {part.size} devices of a chip")
        elif part.size == whole:
            closes = "wraps" if rings[part] else "open"
            words.append(f"dim {part.dim} ({whole}, {closes})")
        else:
            stride = f", stride {part.stride}" if part.stride > 1 else ""
            words.append(f"{part.size} of dim {part.dim} ({whole}{stride})")
    return ("ICI " if rings else "") + " and ".join(words)


def _switched(
    parts: tuple[Part, ...],
    topology: Topology,
) -> Link:
    """Return the link of GPUs in nodes.

    Inside, every byte goes through a device's NVLink; between, each device has its own
    network card. All-gather of V bytes over N devices, `inside` of them in each of M
    nodes: the slower of V (N-1)/N over NVLink and V (M-1)/M over the network cards of
    `inside` devices. All-to-all: of a payload P, P (N-inside)/N leaves the node.
    """
    chip = topology.chip
    nodes = _size(part for part in parts if part.dim == 0)
    inside = _size(part for part in parts if part.dim == 1)
    size = nodes * inside
    nvlink = chip.link_bandwidth * chip.link_fraction
    network = chip.network_bandwidth * chip.network_fraction
    through = (size - 1) / size / nvlink if inside > 1 else 0.0
    gather = max(through, (nodes - 1) / size / network)
    exchange = max(through, (size - inside) / size / network)

    between = nodes > 1
    inner_steps = (inside - 1) * chip.link_latency
    outer_steps = (nodes - 1) * chip.network_latency
    step = chip.network_latency if between else chip.link_latency
    words = []
    if inside > 1:
        words.append(f"NVLink among {inside} of a node")
    if between:
        words.append(f"the network among {nodes} nodes")
    return Link(
        size=size,
        kind="network" if between else "nvlink",
        bandwidth=(size - 1) / size / gather,
        exchange=(size - 1) / size / exchange,
        shift=network if between else nvlink,
        latency=chip.call_latency + inner_steps + outer_steps,
        hop=chip.call_latency + step,
        ramp=chip.ramp_seconds,
        wraps=False,
        physical=" and ".join(words),
        parts=parts,
        topology=topology,
    )


def _memory(
    parts: tuple[Part, ...],
    topology: Topology,
) -> Link:
    """Return the link of virtual devices, which all copy through one memory at once."""
    chip = topology.chip
    size = _size(parts)
    rate = chip.link_bandwidth * chip.link_fraction / topology.devices
    return Link(
        size=size,
        kind="memory",
        bandwidth=rate,
        exchange=rate,
        shift=rate,
        latency=chip.call_latency + (size - 1) * chip.link_latency,
        hop=chip.call_latency + chip.link_latency,
        ramp=chip.ramp_seconds,
        wraps=False,
        physical="shared memory",
        parts=parts,
        topology=topology,
    )

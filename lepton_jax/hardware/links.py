"""How mesh axes lie on physical links, and what a collective over them costs.

The cost is alpha-beta: seconds = latency + bytes / bandwidth (Thakur, Rabenseifner and
Gropp 2005, "Optimization of collective communication operations in MPICH"). What
latency and bandwidth are on a torus and on a switched node follows "How to Scale Your
Model", https://jax-ml.github.io/scaling-book, parts 3 (sharding) and 12 (GPUs).
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
from lepton_jax.hardware.topology import Topology

COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)


class Part(NamedTuple):
    """What an axis takes of one physical dim: `size` devices, each `stride` further
    along `dim` of the topology's grid.
    """

    dim: int
    size: int
    stride: int


@dataclass(frozen=True, slots=True)
class Link:
    """What one mesh axis, or several joined, has for its collectives.

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
      parts: of the physical dims; `join` needs them.
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
        """Seconds of a collective over this axis.

        Args:
          collective: one of `COLLECTIVES`.
          payload: bytes on each device of the whole buffer: gathered (all-gather), to
            be reduced (reduce-scatter, all-reduce), exchanged (all-to-all, what a
            device holds of it) or passed on (collective-permute).
        """
        n = self.size
        if n == 1:
            return 0.0
        if collective == "collective-permute":
            return self.hop + payload / self.shift
        flow = (
            payload
            * (n - 1)
            / n
            / (self.exchange if collective == "all-to-all" else self.bandwidth)
        )
        once = self.latency + flow
        if self.ramp:
            # small messages flow at a quarter of the rate, large ones lose a fixed
            # time: a concave curve between
            once += self.ramp * flow / (flow + self.ramp / 3)
        if collective == "all-reduce":
            return 2 * once
        assert collective in COLLECTIVES, collective
        return once


def lay(mesh: Mapping[str, int], topology: Topology) -> dict[str, Link]:
    """The links of each mesh axis, axes from the least to the most local.

    On a TPU an axis gets whole dims of the torus where their product is its size, else
    pieces of dims, which don't wrap. On GPUs the last axes lie inside a node (an NVLink
    domain), the others over the network, or over both.

    Raises:
      PlanError: the axes' sizes don't multiply to the number of devices.
    """
    return dict(_lay(tuple(mesh.items()), topology))


def join(links: Iterable[Link]) -> Link:
    """The links of a collective over several axes of one `lay` at once."""
    links = tuple(links)
    assert links, "no links to join"
    return links[0] if len(links) == 1 else _join(links)


def arrange(
    mesh: Mapping[str, int],
    topology: Topology,
    devices: Sequence[Any],
) -> np.ndarray:
    """The devices in the mesh's shape, each where `lay` has it.

    Args:
      devices: as many as the topology has; on a TPU with `coords` and `core_on_chip`,
        else in JAX's own order.
    """
    assert len(devices) == topology.devices, (
        f"{len(devices)} devices for {topology.name}"
    )
    if topology.chip.torus:
        devices = sorted(
            devices,
            key=lambda d: (*d.coords[: topology.chip.torus], d.core_on_chip),
        )
    links = lay(mesh, topology).values()
    pieces = [(part, axis) for axis, link in enumerate(links) for part in link.parts]
    pieces.sort(key=lambda piece: (piece[0].dim, -piece[0].stride))
    wanted = sorted(
        range(len(pieces)),
        key=lambda i: (pieces[i][1], i),
    )
    grid = np.empty(len(devices), object)
    grid[:] = devices
    return (
        grid.reshape([part.size for part, _ in pieces])
        .transpose(wanted)
        .reshape(tuple(mesh.values()))
    )


@lru_cache(maxsize=4096)
def _lay(
    mesh: tuple[tuple[str, int], ...], topology: Topology
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
    """Untouched dims that multiply to `size`, the fastest together; none if there are
    none.
    """
    free = [
        Part(dim, n, 1)
        for dim, n in enumerate(topology.grid)
        if n > 1 and taken[dim] == 1
    ]
    found = [
        parts
        for count in range(1, len(free) + 1)
        for parts in itertools.combinations(free, count)
        if math.prod(part.size for part in parts) == size
    ]
    return max(
        found,
        key=lambda parts: _link(parts, topology).bandwidth,
        default=(),
    )


def _split(
    size: int,
    taken: list[int],
    topology: Topology,
) -> tuple[Part, ...]:
    """Pieces of dims that multiply to `size`.

    On a torus those with the most devices in whole dims, then those that break the
    fewest dims for the axes to come, then the fastest; on GPUs as much as possible
    inside a node.
    """
    left = [n // t for n, t in zip(topology.grid, taken, strict=True)]

    def merit(pieces: tuple[int, ...]) -> tuple[Any, ...]:
        if not topology.chip.torus:
            return (pieces[-1],)
        whole = math.prod(
            piece for piece, n in zip(pieces, topology.grid, strict=True) if piece == n
        )
        broken = sum(1 < piece < rest for piece, rest in zip(pieces, left, strict=True))
        return whole, -broken, _link(_parts(pieces, taken), topology).bandwidth, pieces

    best = max(_factorings(size, left), key=merit)
    return _parts(best, taken)


def _parts(pieces: Sequence[int], taken: Sequence[int]) -> tuple[Part, ...]:
    return tuple(
        Part(dim, size, taken[dim]) for dim, size in enumerate(pieces) if size > 1
    )


def _factorings(size: int, left: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Every way to write `size` as a product of one divisor of each number left."""
    if not left:
        if size == 1:
            yield ()
        return
    for piece in range(1, min(size, left[0]) + 1):
        if left[0] % piece == 0 and size % piece == 0:
            yield from ((piece, *rest) for rest in _factorings(size // piece, left[1:]))


@lru_cache(maxsize=4096)
def _join(links: tuple[Link, ...]) -> Link:
    """Pieces of one dim that lie against each other become one piece; if that is the
    whole dim, it wraps again.
    """
    merged: list[Part] = []
    for part in sorted(
        (part for link in links for part in link.parts),
        key=lambda part: (part.dim, part.stride),
    ):
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


def _link(parts: tuple[Part, ...], topology: Topology) -> Link:
    if not parts:
        return Link(
            1,
            "memory",
            math.inf,
            math.inf,
            math.inf,
            0.0,
            0.0,
            0.0,
            False,
            "one device",
            (),
            topology,
        )
    if topology.chip.torus:
        return _torus(parts, topology)
    return (
        _memory(parts, topology)
        if topology.platform == "cpu"
        else _switched(parts, topology)
    )


def _torus(parts: tuple[Part, ...], topology: Topology) -> Link:
    """Pieces of a torus, seconds per byte by the links that each has to cross.

    All-gather of V bytes: the dims work at once, V (N-1)/N over the sum of their rates
    (a ring sends both ways), but a dim of n carries at least V (n-1)/N. All-to-all: the
    bytes that cross the middle of each dim, floor(n^2/4)/n of a device's payload, over
    the links there. Groups that lie `stride` apart share the links between them, and so
    do the devices of a chip, unless they are on the axis themselves: then each half of
    what the chip gathers crosses to the other device.
    """
    chip = topology.chip
    ici = [part for part in parts if part.dim < topology.chip.torus]
    n, chips = (math.prod(part.size for part in some) for some in (parts, ici))
    rings = {
        part: topology.wraps[part.dim] and part.size == topology.grid[part.dim]
        for part in ici
    }
    link = chip.link_bandwidth * chip.link_fraction
    ways = {part: link * (2 if rings[part] else 1) / part.stride for part in ici}
    # both devices of each chip are on the axis
    die = 1 / chip.core_bandwidth if n > chips else 0.0
    # else they are in two groups that share the chip's links
    apart = 1 if n > chips else chip.devices_per_chip
    gather = exchange = die / 2
    if ici:
        rate = (
            min(
                sum(ways.values()),
                *(ways[part] * (chips - 1) / (part.size - 1) for part in ici),
            )
            / apart
        )
        gather += (chips - 1) / chips / rate
        exchange = max(
            exchange,
            *(
                part.size**2 // 4 / part.size * chip.devices_per_chip / ways[part]
                for part in ici
            ),
        )
    stride = max((part.stride for part in ici), default=1)
    hops = sum(
        part.stride * (part.size // 2 if rings[part] else part.size - 1) for part in ici
    ) + bool(die)
    return Link(
        n,
        "ici",
        (n - 1) / n / gather,
        (n - 1) / n / exchange,
        link / stride / chip.devices_per_chip if ici else chip.core_bandwidth,
        chip.call_latency + hops * chip.link_latency,
        chip.call_latency + stride * chip.link_latency,
        chip.ramp_seconds,
        bool(ici) and all(rings.values()),
        _named(parts, topology, rings),
        parts,
        topology,
    )


def _named(
    parts: tuple[Part, ...],
    topology: Topology,
    rings: Mapping[Part, bool],
) -> str:
    """E.g. "ICI dim 0 (16, wraps) and 4 of dim 1 (16)"."""
    words = []
    for part in parts:
        whole = topology.grid[part.dim]
        if part not in rings:
            words.append(f"the {part.size} devices of a chip")
        elif part.size == whole:
            words.append(
                f"dim {part.dim} ({whole}, {'wraps' if rings[part] else 'open'})"
            )
        else:
            words.append(
                f"{part.size} of dim {part.dim} ({whole}"
                + (f", stride {part.stride})" if part.stride > 1 else ")")
            )
    return ("ICI " if rings else "") + " and ".join(words)


def _switched(parts: tuple[Part, ...], topology: Topology) -> Link:
    """GPUs in nodes: inside, every byte goes through a device's NVLink; between, each
    device has its own network card.

    All-gather of V bytes over N devices, `inside` of them in each of M nodes: the
    slower of V (N-1)/N over NVLink and V (M-1)/M over the network cards of `inside`
    devices. All-to-all: of a payload P, P (N-inside)/N leaves the node.
    """
    chip = topology.chip
    nodes, inside = (
        math.prod(part.size for part in parts if part.dim == dim) for dim in (0, 1)
    )
    n = nodes * inside
    nvlink = chip.link_bandwidth * chip.link_fraction
    network = chip.network_bandwidth * chip.network_fraction
    through = (n - 1) / n / nvlink if inside > 1 else 0.0
    gather = max(through, (nodes - 1) / n / network)
    exchange = max(through, (n - inside) / n / network)
    words = [
        f"NVLink among {inside} of a node" if inside > 1 else "",
        f"the network among {nodes} nodes" if nodes > 1 else "",
    ]
    return Link(
        n,
        "network" if nodes > 1 else "nvlink",
        (n - 1) / n / gather,
        (n - 1) / n / exchange,
        network if nodes > 1 else nvlink,
        chip.call_latency
        + (inside - 1) * chip.link_latency
        + (nodes - 1) * chip.network_latency,
        chip.call_latency + (chip.network_latency if nodes > 1 else chip.link_latency),
        chip.ramp_seconds,
        False,
        " and ".join(filter(None, words)),
        parts,
        topology,
    )


def _memory(parts: tuple[Part, ...], topology: Topology) -> Link:
    """Virtual devices copy through one memory, all at the same time."""
    chip = topology.chip
    n = math.prod(part.size for part in parts)
    rate = chip.link_bandwidth * chip.link_fraction / topology.devices
    return Link(
        n,
        "memory",
        rate,
        rate,
        rate,
        chip.call_latency + (n - 1) * chip.link_latency,
        chip.call_latency + chip.link_latency,
        chip.ramp_seconds,
        False,
        "shared memory",
        parts,
        topology,
    )

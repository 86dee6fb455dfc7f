"""A topology by name ("cpu:8", "h200:8", "v5p:4x4x4") or of the live devices.

"2*v5p:4x4x4" are two slices, which the data-centre network joins.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import jax

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware.chips import CHIPS, Chip

# Figures of a chip that is in no catalogue (assumption): a bfloat16 peak in FLOP/s,
# bytes of memory, and bytes/s of its memory.
UNKNOWN_PEAK = 100e12
UNKNOWN_MEMORY = 16 * 2**30
UNKNOWN_BANDWIDTH = 1e12


@dataclass(frozen=True)
class Topology:
    """Chips in a grid.

    Attributes:
      chip: the catalogue's entry.
      shape: chips along each physical dim of a TPU slice; GPUs: (count,) or (nodes,
        GPUs of each); one number where they are all linked alike.
      platform: JAX's platform name.
      slices: number of such grids, joined by the network between data-centre hosts.
    """

    chip: Chip
    shape: tuple[int, ...]
    platform: str
    slices: int = 1

    @property
    def name(self) -> str:
        """Its name, such as "v5p:4x4x4"."""
        several = f"{self.slices}*" if self.slices > 1 else ""
        return f"{several}{self.slice}"

    @property
    def slice(self) -> str:
        """Name of one slice."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Number of JAX devices, of which a chip may have several."""
        return self.chips * self.chip.devices_per_chip

    @property
    def grid(self) -> tuple[int, ...]:
        """Devices along each physical dim, the most local last.

        On a TPU it is (x, y, z), with the devices of a chip as one more dim where it
        has several; on GPUs (nodes, GPUs of each); on a CPU (devices,). Where there are
        several slices, they are a dim behind these.
        """
        several = (self.slices,) if self.slices > 1 else ()
        return (*self._slice_grid, *several)

    @property
    def _slice_grid(self) -> tuple[int, ...]:
        chip = self.chip
        if chip.torus:
            torus = self.shape + (1,) * (chip.torus - len(self.shape))
            if chip.devices_per_chip == 1:
                return torus
            return (*torus, chip.devices_per_chip)
        if self.platform == "cpu":
            return (self.devices // self.slices,)
        if len(self.shape) == 2:
            return (self.shape[0], self.shape[1] * chip.devices_per_chip)
        largest = min(self.chips, chip.node)
        sizes = range(1, largest + 1)
        node = max(size for size in sizes if self.chips % size == 0)
        return (self.chips // node, node * chip.devices_per_chip)

    @cached_property
    def wraps(self) -> tuple[bool, ...]:
        """Whether the links of each dim of the grid close to a ring."""
        size = self.chip.wrap_size
        torus = self.grid[: self.chip.torus]
        rings = [n >= size and n % size == 0 and n > 2 for n in torus]
        if self.chip.torus == 3:
            rings = [all(rings)] * 3
        others = len(self.grid) - len(torus)
        return (*rings, *(False,) * others)

    @property
    def nodes(self) -> int:
        """Number of hosts, or of NVLink domains."""
        if self.chip.torus:
            return -(-self.chips // self.chip.node)
        return 1 if self.platform == "cpu" else self.grid[0]

    @property
    def price_per_hour(self) -> float | None:
        """US dollars at list price; None where it isn't known."""
        price = self.chip.price
        return None if price is None else price * self.chips

    @cached_property
    def device(self) -> Chip:
        """The figures of one device.

        They are the chip's, but each of several virtual CPU devices has its share of
        the machine.
        """
        if self.platform != "cpu":
            return self.chip
        chip = self.chip
        n = self.devices
        return replace(
            chip,
            peaks={dtype: peak / n for dtype, peak in chip.peaks.items()},
            memory=chip.memory / n,
            bandwidth=chip.bandwidth / n,
            host_bandwidth=chip.host_bandwidth / n,
        )

    def __str__(self) -> str:
        if self.chip.torus:
            rings = [
                f"{n} {'wraps' if ring else 'open'}"
                for n, ring in zip(self.grid, self.wraps, strict=True)
            ]
            del rings[len(self._slice_grid) :]
            links = f"ICI dims {', '.join(rings)}"
        else:
            links = f"{self.nodes} node{'s' * (self.nodes != 1)}"
        if self.slices > 1:
            links = f"{self.slices} slices joined by the network, {links}"
        price = "price unknown"
        if self.price_per_hour is not None:
            price = f"${self.price_per_hour:,.2f}/h"
        return (
            f"{self.name}: {self.devices} devices on {self.chips} chips, {links},"
            f" {self.device.memory / 1e9:.4g} GB and"
            f" {self.device.bf16_flops / 1e12:.4g} TFLOP/s bf16 each, {price}"
        )


def topology(
    name: str,
    chips: Mapping[str, Chip] | None = None,
) -> Topology:
    """Return the topology of a name.

    It is "chip:count", or "chip:AxBxC" for a slice of TPUs, "chip:nodesxGPUs" for GPUs,
    and "N*chip:AxBxC" for several slices.

    Args:
      name: the name.
      chips: chips in addition to the catalogue's, as `read_chips` gives them; they win
        over a name of the catalogue.

    Raises:
      PlanError: there is no such chip, a shape isn't numbers, or it has more dims than
        the chip's links have.
    """
    pattern = r"(?:(\d+)\*)?([\w-]+):(\d+(?:x\d+)*)"
    match = re.fullmatch(pattern, name.strip().lower())
    if not match or 0 in map(int, (match[1] or "1", *match[3].split("x"))):
        raise PlanError(
            f"topology {name!r} is not of the form chip:count or chip:AxBxC",
            where=name,
            remedy='write e.g. "cpu:8", "h200:8", "v5p:4x4x4", "2*v5p:4x4x4"',
        )
    chip = _chip(match[2], name, chips or {})
    shape = tuple(int(n) for n in match[3].split("x"))
    _check_shape(shape, match[3], chip, name)
    slices = int(match[1] or 1)
    if slices > 1 and chip.platform not in ("tpu", "cpu"):
        raise PlanError(
            f"{chip.name} has nodes, and no slices",
            where=name,
            remedy=f'write "{chip.name}:{slices}x{math.prod(shape)}" (nodes x GPUs)',
        )
    return Topology(chip, shape, chip.platform, slices)


def _chip(
    short: str,
    name: str,
    chips: Mapping[str, Chip],
) -> Chip:
    """Return the chip of the topology `name` by its name or an alias."""
    known = dict(CHIPS)
    known.update((key.lower(), chip) for key, chip in chips.items())
    if short in known:
        return known[short]
    for chip in known.values():
        if short in chip.aliases:
            return chip
    aliases = [alias for chip in known.values() for alias in chip.aliases]
    near = nearest(short, [*known, *aliases])
    raise PlanError(
        f"chip {short!r} is not in the catalogue{near}",
        where=name,
        remedy=f"the catalogue has {', '.join(known)}",
    )


def _check_shape(
    shape: tuple[int, ...],
    text: str,
    chip: Chip,
    name: str,
) -> None:
    """Refuse a shape, written as `text`, that the chip's links can't have."""
    dims = chip.torus or (1 if chip.platform == "cpu" else 2)
    if len(shape) > dims:
        example = f'"{chip.name}:{"x".join(["4"] * dims)}"'
        if not chip.torus:
            nodes = f'"{chip.name}:2x8" (nodes x GPUs)'
            example = f'"{chip.name}:8"' if dims == 1 else nodes
        raise PlanError(
            f"{text} has {len(shape)} dims, and the links of {chip.name} have {dims}",
            where=name,
            remedy=f"write e.g. {example}",
        )
    if not chip.torus and len(shape) == 2 and shape[1] > chip.node:
        raise PlanError(
            f"{shape[1]} {chip.name} in a node, and at most {chip.node} are joined in"
            " one",
            where=name,
            remedy=(
                f'write "{chip.name}:{math.prod(shape)}", or nodes x GPUs with at most'
                f" {chip.node} GPUs"
            ),
        )


def here(count: int | None = None) -> tuple[Topology, list[jax.Device]]:
    """Return the topology of the live devices, and these devices.

    Args:
      count: how many of them to take, the first ones; None: all.

    Raises:
      PlanError: JAX finds no devices, or fewer than asked for.
    """
    devices = _live_devices(count)
    kind = devices[0].device_kind
    platform = devices[0].platform
    chip = next((c for c in CHIPS.values() if kind in c.kinds), None)
    if chip is None:
        chip = _unknown_chip(devices[0])
    chip = replace(chip, memory=_memory(devices[0], chip.memory))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if len(devices) % slices or platform != "tpu":
        slices = 1
    one = [d for d in devices if slices == 1 or d.slice_index == devices[0].slice_index]
    return Topology(chip, _shape(one, chip), platform, slices), devices


def _live_devices(count: int | None) -> list[jax.Device]:
    try:
        devices = jax.devices()
    # JAX_PLATFORMS names a platform that doesn't exist, or two settings contradict.
    except RuntimeError as error:
        raise PlanError(
            f"JAX finds no devices: {error}",
            where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
            remedy="set JAX_PLATFORMS=cpu, or install JAX for the chips that are there",
        ) from error
    if count is None:
        return devices
    if isinstance(count, bool) or not isinstance(count, int):
        raise PlanError(
            f"{count!r} devices are asked for",
            where="devices",
            remedy="give a whole number",
        )
    if not 1 <= count <= len(devices):
        raise PlanError(
            f"{count} devices are asked for, {len(devices)} are there",
            where=f"platform {jax.default_backend()}",
            remedy=(
                "ask for fewer; on a CPU set"
                " XLA_FLAGS=--xla_force_host_platform_device_count=N, or let the"
                " launcher do it with --devices N"
            ),
        )
    return devices[:count]


def _unknown_chip(device: jax.Device) -> Chip:
    stats = device.memory_stats() or {}
    kind = device.device_kind
    source = "assumption: a chip that is in no catalogue"
    return Chip(
        name=kind,
        platform=device.platform,
        peaks={"bfloat16": UNKNOWN_PEAK},
        memory=stats.get("bytes_limit", UNKNOWN_MEMORY),
        bandwidth=UNKNOWN_BANDWIDTH,
        kinds=(kind,),
        sources=dict.fromkeys(("peaks.bfloat16", "bandwidth"), source),
    )


def _memory(
    device: jax.Device,
    otherwise: float,
) -> float:
    """Return the bytes that a device really has, `otherwise` if it doesn't tell.

    A CPU's are the machine's, which its virtual devices share.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return float(stats.get("bytes_limit", otherwise))
    if not hasattr(os, "sysconf"):
        return otherwise
    return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _shape(
    devices: list[jax.Device],
    chip: Chip,
) -> tuple[int, ...]:
    """Return the grid of a TPU slice if the devices fill one; else their number."""
    count = max(1, len(devices) // chip.devices_per_chip)
    if chip.torus and all(hasattr(d, "coords") for d in devices):
        places = {tuple(d.coords[: chip.torus]) for d in devices}
        extents = tuple(
            1 + max(p[dim] for p in places) - min(p[dim] for p in places)
            for dim in range(chip.torus)
        )
        if math.prod(extents) == count == len(places):
            return extents
    return (count,)

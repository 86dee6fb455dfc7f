"""A topology by name ("cpu:8", "h200:8", "v5p:4x4x4") or from the devices that are
there.
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


@dataclass(frozen=True)
class Topology:
    """Chips in a grid.

    Attributes:
      chip: the catalogue's entry.
      shape: chips along each physical dim of a TPU slice; GPUs: (count,) or (nodes,
        GPUs of each); one number where they are all linked alike.
      platform: JAX's platform name.
    """

    chip: Chip
    shape: tuple[int, ...]
    platform: str

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        """JAX devices, not chips."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def grid(self) -> tuple[int, ...]:
        """Devices along each physical dim, the most local last: (x, y, z), with the
        devices of a chip as one more dim where it has several; (nodes, GPUs of each);
        (devices,) of a CPU.
        """
        chip = self.chip
        if chip.torus:
            torus = self.shape + (1,) * (chip.torus - len(self.shape))
            return (
                torus if chip.devices_per_chip == 1 else (*torus, chip.devices_per_chip)
            )
        if self.platform == "cpu":
            return (self.devices,)
        if len(self.shape) == 2:
            return (self.shape[0], self.shape[1] * chip.devices_per_chip)
        node = max(
            n for n in range(1, min(self.chips, chip.node) + 1) if self.chips % n == 0
        )
        return (self.chips // node, node * chip.devices_per_chip)

    @cached_property
    def wraps(self) -> tuple[bool, ...]:
        """Of each dim of the grid, whether its links close to a ring."""
        size = self.chip.wrap_size
        torus = self.grid[: self.chip.torus]
        rings = [n >= size and n % size == 0 and n > 2 for n in torus]
        if self.chip.torus == 3:
            rings = [all(rings)] * 3
        return (*rings, *(False,) * (len(self.grid) - len(torus)))

    @property
    def nodes(self) -> int:
        """Hosts, or NVLink domains."""
        return (
            -(-self.chips // self.chip.node)
            if self.chip.torus
            else 1
            if self.platform == "cpu"
            else self.grid[0]
        )

    @property
    def price_per_hour(self) -> float | None:
        """US dollars at list price; None where it isn't known."""
        return None if self.chip.price is None else self.chip.price * self.chips

    @cached_property
    def device(self) -> Chip:
        """One device's figures: the chip's, but of virtual CPU devices each has its
        share of the machine.
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
        rings = ", ".join(
            f"{n} {'wraps' if ring else 'open'}"
            for n, ring in zip(self.grid, self.wraps, strict=True)
        )
        links = (
            f"ICI dims {rings}"
            if self.chip.torus
            else f"{self.nodes} node{'s' * (self.nodes != 1)}"
        )
        price = (
            "price unknown"
            if self.price_per_hour is None
            else f"${self.price_per_hour:,.2f}/h"
        )
        return (
            f"{self.name}: {self.devices} devices on {self.chips} chips, {links},"
            f" {self.device.memory / 1e9:.4g} GB and"
            f" {self.device.bf16_flops / 1e12:.4g} TFLOP/s bf16 each, {price}"
        )


def topology(
    name: str,
    chips: Mapping[str, Chip] | None = None,
) -> Topology:
    """The topology of a name: "chip:count", or "chip:AxBxC" for a slice of TPUs,
    "chip:nodesxGPUs" for GPUs.

    Args:
      chips: more chips than the catalogue's, as `read_chips` gives them; they win over
        a name of the catalogue.

    Raises:
      PlanError: no such chip, a shape that isn't numbers, or one of more dims than the
        chip's links have.
    """
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name.strip().lower())
    if not match or 0 in map(int, match[2].split("x")):
        raise PlanError(
            f"topology {name!r} is not of the form chip:count or chip:AxBxC",
            where=name,
            remedy='write e.g. "cpu:8", "h200:8", "v5p:4x4x4"',
        )
    known = {**CHIPS, **{key.lower(): chip for key, chip in (chips or {}).items()}}
    chip = known.get(match[1]) or next(
        (c for c in known.values() if match[1] in c.aliases), None
    )
    if chip is None:
        names = [*known, *(alias for c in known.values() for alias in c.aliases)]
        raise PlanError(
            f"chip {match[1]!r} is not in the catalogue{nearest(match[1], names)}",
            where=name,
            remedy=f"the catalogue has {', '.join(known)}",
        )
    shape = tuple(int(n) for n in match[2].split("x"))
    dims = chip.torus or (1 if chip.platform == "cpu" else 2)
    if len(shape) > dims:
        form = "x".join(["4"] * dims) if chip.torus else {1: "8", 2: "2x8"}[dims]
        raise PlanError(
            f"{match[2]} has {len(shape)} dims, and the links of {chip.name} have"
            f" {dims}",
            where=name,
            remedy=f'write e.g. "{chip.name}:{form}"'
            + (" (nodes x GPUs)" if form == "2x8" else ""),
        )
    if not chip.torus and len(shape) == 2 and shape[1] > chip.node:
        raise PlanError(
            f"{shape[1]} {chip.name} in a node, and at most {chip.node} are joined"
            " in one",
            where=name,
            remedy=(
                f'write "{chip.name}:{math.prod(shape)}", or nodes x GPUs with at most'
                f" {chip.node} GPUs"
            ),
        )
    return Topology(chip, shape, chip.platform)


def here(count: int | None = None) -> tuple[Topology, list[jax.Device]]:
    """The live devices (the first `count` of them) and their topology.

    Raises:
      PlanError: fewer devices are there than asked for.
    """
    try:
        devices = jax.devices()
    # JAX_PLATFORMS names a platform that isn't there, or two settings contradict
    except RuntimeError as error:
        raise PlanError(
            f"JAX finds no devices: {error}",
            where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
            remedy="set JAX_PLATFORMS=cpu, or install JAX for the chips that are there",
        ) from error
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        raise PlanError(
            f"{count!r} devices are asked for",
            where="devices",
            remedy="give a whole number",
        )
    if count is not None and not 1 <= count <= len(devices):
        raise PlanError(
            f"{count} devices are asked for, {len(devices)} are there",
            where=f"platform {jax.default_backend()}",
            remedy=(
                "ask for fewer; on a CPU set"
                " XLA_FLAGS=--xla_force_host_platform_device_count=N, or let the"
                " launcher do it with --devices N"
            ),
        )
    devices = devices[:count]
    kind = devices[0].device_kind
    platform = devices[0].platform
    chip = next((c for c in CHIPS.values() if kind in c.kinds), None)
    if chip is None:
        stats = devices[0].memory_stats() or {}
        chip = Chip(
            kind,
            platform,
            {"bfloat16": 100e12},
            stats.get("bytes_limit", 16 * 2**30),
            1e12,
            (kind,),
            sources=dict.fromkeys(
                ("peaks.bfloat16", "bandwidth"),
                "assumption: a chip that is in no catalogue",
            ),
        )
    chip = replace(
        chip,
        memory=_memory(devices[0], chip.memory),
    )
    return Topology(chip, _shape(devices, chip), platform), devices


def _memory(device: jax.Device, otherwise: float) -> float:
    """Bytes that there really are: a CPU's are the machine's, which its virtual devices
    share.
    """
    if device.platform == "cpu":
        return (
            float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
            if hasattr(os, "sysconf")
            else otherwise
        )
    return float((device.memory_stats() or {}).get("bytes_limit", otherwise))


def _shape(devices: list[jax.Device], chip: Chip) -> tuple[int, ...]:
    """The grid of a TPU slice, if the devices fill one; else their number."""
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

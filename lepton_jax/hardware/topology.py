"""A topology by name ("cpu:8", "h200:8", "v5p:4x4x4") or from the devices that are there."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass

import jax

from lepton_jax.errors import PlanError, nearest
from lepton_jax.hardware.chips import CHIPS, Chip


@dataclass(frozen=True)
class Topology:
    """Chips in a grid.

    Attributes:
      chip: the catalogue's entry.
      shape: chips along each physical dim; one number where they are all linked alike.
      platform: JAX's platform name.
    """

    chip: Chip
    shape: tuple[int, ...]
    platform: str

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """JAX devices, not chips."""
        return math.prod(self.shape) * self.chip.devices_per_chip


def topology(name: str) -> Topology:
    """The topology of a name.

    Raises:
      PlanError: no such chip, or a shape that isn't numbers.
    """
    match = re.fullmatch(r"([\w-]+):(\d+(?:x\d+)*)", name.strip().lower())
    if not match or "0" in match[2].split("x"):
        raise PlanError(f"topology {name!r} is not of the form chip:count or chip:AxBxC", where=name,
                        remedy='write e.g. "cpu:8", "h200:8", "v5p:4x4x4"')
    chip = CHIPS.get(match[1])
    if chip is None:
        raise PlanError(f"chip {match[1]!r} is not in the catalogue{nearest(match[1], CHIPS)}", where=name,
                        remedy=f"the catalogue has {', '.join(CHIPS)}")
    platform = "cpu" if chip.name == "cpu" else "tpu" if chip.name.startswith(("v", "tpu")) else "cuda"
    return Topology(chip, tuple(int(n) for n in match[2].split("x")), platform)


def here(count: int | None = None) -> tuple[Topology, list[jax.Device]]:
    """The live devices (the first `count` of them) and their topology.

    Raises:
      PlanError: fewer devices are there than asked for.
    """
    try:
        devices = jax.devices()
    except RuntimeError as error:  # JAX_PLATFORMS names a platform that isn't there, or two settings contradict
        raise PlanError(f"JAX finds no devices: {error}", where=f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}",
                        remedy="set JAX_PLATFORMS=cpu, or install JAX for the chips that are there") from error
    if count is not None and (isinstance(count, bool) or not isinstance(count, int)):
        raise PlanError(f"{count!r} devices are asked for", where="devices", remedy="give a whole number")
    if count is not None and not 1 <= count <= len(devices):
        raise PlanError(f"{count} devices are asked for, {len(devices)} are there", where=f"platform {jax.default_backend()}",
                        remedy="ask for fewer; on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count=N, or let "
                               "the launcher do it with --devices N")
    devices = devices[:count]
    kind = devices[0].device_kind
    chip = next((c for c in CHIPS.values() if kind in c.kinds), None)
    if chip is None:
        stats = devices[0].memory_stats() or {}
        chip = Chip(kind, (kind,), 100e12, stats.get("bytes_limit", 16 * 2**30), 1e12)
    return Topology(chip, (max(1, len(devices) // chip.devices_per_chip),), devices[0].platform), devices

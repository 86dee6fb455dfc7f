"""Compile ahead of time for devices that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from lepton_jax.errors import PlanError
from lepton_jax.hardware import Topology, arrange

# without them libtpu asks a cloud host's metadata server who it is, for minutes where
# there is none
NOT_A_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
UNITS = {
    "": 1,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
    "T": 2**40,
}


@dataclass(frozen=True)
class Memory:
    """XLA's own account of one device's memory, in bytes.

    Attributes:
      arguments, outputs: of the program.
      temporaries: at the peak.
      aliases: outputs that lie in donated arguments.
      code: the program itself.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliases: int
    code: int

    @property
    def peak(self) -> int:
        return self.arguments + self.temporaries + self.outputs - self.aliases


class TooLarge(PlanError):
    """XLA found that a program does not fit the device's memory.

    Attributes:
      needed, available: bytes as far as XLA's message tells them, else None.
    """

    needed: float | None = None
    available: float | None = None


def devices_for(topology: Topology) -> list[Any]:
    """As many devices as the topology has, to compile for: live ones if they are there,
    else descriptions of TPUs.

    Raises:
      PlanError: libtpu is missing or refuses the topology's name; too few virtual CPU
        devices; no such GPUs here.
    """
    if topology.platform == "cpu":
        return _live(
            topology,
            "cpu",
            "set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{topology.devices} before JAX is first used",
        )
    if topology.platform != "tpu":
        return _live(
            topology,
            "gpu",
            f"a program for {topology.chip.name} can only be compiled where such a GPU"
            " is: run this there, or plan without a proof",
        )
    if jax.default_backend() == "tpu":
        devices = [
            device
            for device in jax.devices()
            if device.device_kind in topology.chip.kinds
        ]
        if len(devices) >= topology.devices:
            return devices[: topology.devices]
    return _described(topology)


def mesh_devices(
    topology: Topology,
    mesh: Mapping[str, int],
    devices: Sequence[Any],
) -> np.ndarray:
    """The devices as an array of the mesh's shape, each where the cost model has it:
    axes along the links of a torus.

    Raises:
      PlanError: the mesh's axes don't multiply up to the devices.
    """
    return arrange(mesh, topology, devices)


def compile_for(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, Memory]:
    """Compile for the devices of the shardings that the program was lowered with.

    Raises:
      TooLarge: the program does not fit the device's memory.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        first = re.sub(
            r"^RESOURCE_EXHAUSTED: (E\d+: \w+: )?", "", message.partition("\n")[0]
        )
        large = TooLarge(
            f"XLA refuses the program: {first}",
            where="device memory",
            remedy="shard more, take fewer samples a device, or rematerialize more",
        )
        large.needed, large.available = _sizes(first)
        raise large from error
    stats = compiled.memory_analysis()
    assert stats is not None, "this backend gives no account of memory"
    return compiled, Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
    )


def _live(
    topology: Topology,
    platform: str,
    remedy: str,
) -> list[Any]:
    try:
        devices = jax.devices(platform)
    except RuntimeError:
        devices = []
    kinds = topology.chip.kinds
    there = [
        device for device in devices if platform == "cpu" or device.device_kind in kinds
    ]
    if len(there) < topology.devices:
        raise PlanError(
            f"{topology.name} needs {topology.devices} devices, {len(there)} such are"
            " here",
            where=topology.name,
            remedy=remedy,
        )
    return there[: topology.devices]


def _described(topology: Topology) -> list[Any]:
    """Descriptions of TPUs from libtpu, which knows legal slices and their links."""
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"compiling for {topology.name} needs libtpu, which is not installed",
            where=topology.name,
            remedy="pip install 'lepton-jax[tpu]'; it needs no TPU",
        )
    bounds = (*topology.shape, 1, 1)[:3]
    refused = []
    # a shape smaller than a host's usual 2x2 must say so; a v4 shows two devices per
    # chip unless told otherwise
    for options in (
        {},
        {"chip_config_name": "megacore"},
        {"chips_per_host_bounds": bounds},
        {"chips_per_host_bounds": bounds, "chip_config_name": "megacore"},
    ):
        try:
            with _environment(NOT_A_TPU_HOST if jax.default_backend() != "tpu" else {}):
                devices = topologies.get_topology_desc(
                    platform="tpu", topology_name=topology.name, **options
                ).devices
        except (RuntimeError, ValueError, NotImplementedError) as error:
            refused.append(str(error).strip().partition("\n")[0])
            continue
        if len(devices) == topology.devices:
            return list(devices)
        refused.append(f"libtpu gives {len(devices)} devices")
    raise PlanError(
        f"libtpu refuses {topology.name}: {'; '.join(dict.fromkeys(refused))}",
        where=topology.name,
        remedy=(
            "give the slice's shape, e.g. v5e:4x4 or v5p:4x4x4, in multiples of a"
            " host's 2x2; pip install -U 'lepton-jax[tpu]' for newer chips"
        ),
    )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, as long as libtpu starts."""
    new = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in new})
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _sizes(message: str) -> tuple[float | None, float | None]:
    """(needed, available) bytes from `... (33.54G) exceeds available HBM (15.75G)` or
    `Used 20.1G of 15.75G hbm`.
    """
    found = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT]?)B?\b(?=[\s).,]|$)", message)
    sizes = [float(number) * UNITS[unit] for number, unit in found if unit]
    return (sizes[0], sizes[1]) if len(sizes) >= 2 else (None, None)

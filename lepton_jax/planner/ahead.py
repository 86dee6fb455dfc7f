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

from lepton_jax.errors import PlanError, first_line
from lepton_jax.hardware import Topology, arrange

# Variables without which libtpu asks a cloud host's metadata server who it is, for
# minutes where there is none.
NOT_A_TPU_HOST = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
# bytes of a unit in XLA's messages
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
      arguments: inputs of the program.
      temporaries: what it holds at the peak in addition to inputs and outputs.
      outputs: results of the program.
      aliases: outputs that lie in donated arguments.
      code: the program itself.
      high: the most that XLA says it holds at any time, gaps between arrays left out;
        None where it doesn't say, or leaves temporaries out, as on CPUs.
    """

    arguments: int
    temporaries: int
    outputs: int
    aliases: int
    code: int
    high: int | None = None

    @property
    def peak(self) -> int:
        """Bytes that the program holds at the most, which must fit the device.

        On TPUs that is what XLA says, not the sum of the parts, which is more: XLA
        (libtpu 0.0.42) compiles the 8B model of `recipes/lm.py` for v5p:4x4x4 within
        50.3 GB (xla_tpu_max_hbm_size_mib=48000). It says that it holds 45.4 GB, and the
        parts are 64.6 GB.
        """
        return self.parts if self.high is None else self.high

    @property
    def parts(self) -> int:
        """Arguments, temporaries and outputs, aliases once."""
        return self.arguments + self.temporaries + self.outputs - self.aliases


class TooLarge(PlanError):
    """XLA found that a program does not fit the device's memory.

    Attributes:
      needed: bytes of the program; None: XLA's message does not say.
      available: bytes of the device; None: the same.
      message: of XLA.
    """

    needed: float | None = None
    available: float | None = None
    message: str = ""


def devices_for(topology: Topology) -> list[Any]:
    """Return as many devices as the topology has, to compile for.

    They are live ones if they are there, else descriptions of TPUs.

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
    """Return the devices as an array of the mesh's shape.

    Each lies where the cost model has it: axes along the links of a torus.

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
        large = too_large(str(error))
        if large is None:
            raise
        raise large from error
    stats = compiled.memory_analysis()
    assert stats is not None, "this backend gives no account of memory"
    return compiled, Memory(
        stats.argument_size_in_bytes,
        stats.temp_size_in_bytes,
        stats.output_size_in_bytes,
        stats.alias_size_in_bytes,
        stats.generated_code_size_in_bytes,
        stats.peak_memory_in_bytes if _platform(compiled) == "tpu" else None,
    )


def _platform(compiled: jax.stages.Compiled) -> str:
    shardings = jax.tree.leaves(compiled.input_shardings)
    return next(iter(shardings[0].device_set)).platform


def too_large(message: str) -> TooLarge | None:
    """Return the error for XLA's message; None if it is not about memory."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    first_line = message.partition("\n")[0]
    first = re.sub(r"^RESOURCE_EXHAUSTED: (E\d+: \w+: )?", "", first_line)
    large = TooLarge(
        f"XLA refuses the program: {first}",
        where="device memory",
        remedy="shard more, take fewer samples a device, or rematerialize more",
    )
    large.needed, large.available = _sizes(first)
    large.message = message
    return large


def description(devices: Sequence[Any]) -> tuple[str, dict[str, Any]] | None:
    """Return how libtpu was asked to describe some devices.

    Returns:
      The topology's name, and libtpu's other options; None: the devices are live.
    """
    return _asked.get(id(devices[0].client))


# Requests to libtpu by the identity of the client of the devices that it described.
# The clients are kept, so that no other object has the same identity.
_asked: dict[int, tuple[str, dict[str, Any]]] = {}
_clients: list[Any] = []


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
    if platform != "cpu":
        devices = [device for device in devices if device.device_kind in kinds]
    if len(devices) < topology.devices:
        raise PlanError(
            f"{topology.name} needs {topology.devices} devices, {len(devices)} such are"
            " here",
            where=topology.name,
            remedy=remedy,
        )
    return devices[: topology.devices]


def _described(topology: Topology) -> list[Any]:
    """Return descriptions of TPUs from libtpu, which knows slices and their links."""
    if importlib.util.find_spec("libtpu") is None:
        raise PlanError(
            f"compiling for {topology.name} needs libtpu, which is not installed",
            where=topology.name,
            remedy="pip install 'lepton-jax[tpu]'; it needs no TPU",
        )

    # a shape smaller than a host's usual 2x2 must say so; a v4 shows two devices per
    # chip without "megacore"
    bounds = (*topology.shape, 1, 1)[:3]
    megacore = {"chip_config_name": "megacore"}
    small = {"chips_per_host_bounds": bounds}
    variables = NOT_A_TPU_HOST if jax.default_backend() != "tpu" else {}
    several = {"num_slices": topology.slices} if topology.slices > 1 else {}
    refused = []
    for more in ({}, megacore, small, small | megacore):
        options = more | several
        try:
            with _environment(variables):
                described = topologies.get_topology_desc(
                    platform="tpu", topology_name=topology.slice, **options
                )
                devices = described.devices
        except (RuntimeError, ValueError, NotImplementedError) as error:
            refused.append(first_line(error))
            continue
        if len(devices) == topology.devices:
            client: Any = getattr(devices[0], "client")  # noqa: B009
            _clients.append(client)
            _asked[id(client)] = (topology.slice, options)
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
    """Set variables that are not set, while libtpu starts."""
    new = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in new})
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _sizes(message: str) -> tuple[float | None, float | None]:
    """Return the bytes that a program needs and those that a device has.

    Two forms of the message are known (jax 0.10 with libtpu):

    >>> _sizes("temporaries (32.0G) exceeds available HBM (16.0G).")
    (34359738368.0, 17179869184.0)
    >>> _sizes("Used 32.0G of 16.0G hbm.")
    (34359738368.0, 17179869184.0)
    """
    figures = re.findall(r"\b(\d+(?:\.\d+)?)([KMGT]?)B?\b(?=[\s).,]|$)", message)
    sizes = [float(number) * UNITS[unit] for number, unit in figures if unit]
    if len(sizes) < 2:
        return None, None
    needed, available, *_ = sizes
    return needed, available

"""The chip catalogue: what planning needs to know of a chip, each figure per JAX device and from its vendor's page.

Sources: TPU pages at docs.cloud.google.com/tpu/docs (v4, v5e, v5p, v6e, tpu7x); GPU figures are the dense ones of the
vendor's data sheets as collected by S. Bekman, "Machine Learning Engineering", accelerator chapter (2026-08).
"""

from __future__ import annotations

from typing import NamedTuple


class Chip(NamedTuple):
    """One JAX device.

    Attributes:
      name: as in a topology's name.
      kinds: the `device_kind` strings that JAX reports for it.
      bf16_flops: dense bfloat16 matmul peak, FLOP/s.
      memory: bytes of device memory.
      bandwidth: device memory, bytes/s.
      devices_per_chip: JAX devices that one physical chip shows.
    """

    name: str
    kinds: tuple[str, ...]
    bf16_flops: float
    memory: float
    bandwidth: float
    devices_per_chip: int = 1


GIB = 2**30
CHIPS = {chip.name: chip for chip in (
    Chip("v4", ("TPU v4",), 275e12, 32 * GIB, 1.2e12),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * GIB, 819e9),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, 95 * GIB, 2765e9),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, 32 * GIB, 1638e9),
    Chip("tpu7x", ("TPU7x",), 1153.5e12, 96 * GIB, 3690e9, devices_per_chip=2),
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80e9, 2039e9),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 989e12, 80e9, 3.35e12),
    Chip("h200", ("NVIDIA H200",), 989e12, 141e9, 4.8e12),
    Chip("b200", ("NVIDIA B200",), 2250e12, 180e9, 8.0e12),
    # A round figure for a CPU of a few cores; it only decides how many steps share a call.
    Chip("cpu", ("cpu",), 200e9, 8 * GIB, 10e9),
)}

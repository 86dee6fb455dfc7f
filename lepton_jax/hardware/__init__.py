"""The machine: chips, their number and links, and the cost of work and collectives."""

from lepton_jax.hardware.calibrate import calibrate_cpu
from lepton_jax.hardware.chips import CHIPS, Chip, read_chips
from lepton_jax.hardware.links import (
    COLLECTIVES,
    Link,
    across_slices,
    arrange,
    join,
    lay,
)
from lepton_jax.hardware.roofline import (
    convolution_flops,
    matmul_seconds,
    memory_seconds,
    taps,
)
from lepton_jax.hardware.topology import Topology, here, topology

__all__ = [
    "CHIPS",
    "COLLECTIVES",
    "Chip",
    "Link",
    "Topology",
    "across_slices",
    "arrange",
    "calibrate_cpu",
    "convolution_flops",
    "here",
    "join",
    "lay",
    "matmul_seconds",
    "memory_seconds",
    "read_chips",
    "taps",
    "topology",
]

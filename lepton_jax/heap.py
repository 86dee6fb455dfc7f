"""The memory that a process keeps between two steps on a CPU.

XLA's CPU backend allocates what a program needs anew at each call, and frees it after.
glibc takes such large pieces from the kernel and gives them back at once, so that each
step touches pages that the kernel must first fill with zeros: 100,000 of them in a step
of the MNIST CNN at a batch of 128. Kept, the step took 71 ms of a core instead of 97,
and that of an LSTM 101 instead of 145 (AMD EPYC, jaxlib 0.10, glibc 2.36; page faults
by `resource.getrusage`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path

# Parameters of glibc's mallopt(3), from its malloc.h.
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
ARENA_MAX = -8

# Bytes of an allocation above which it is a mapping of its own, which is given back.
# Assumption: a step that needs more takes so long that the zeros do not matter.
LARGEST_KEPT = 2**30
# Freed bytes at the end of the heap above which they are given back. Assumption.
MOST_KEPT = 2**31 - 1
# Heaps of a process. Only the first one can hold more than 64 MiB in one piece, and
# XLA's threads would have others (glibc's arena.c, HEAP_MAX_SIZE).
ARENAS = 1

# Variables by which a user decides for himself how glibc does it.
VARIABLES = (
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
)
# Files of accelerators. Where there is one, the steps do not run on the CPU.
ACCELERATORS = ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd")


@functools.cache
def keep_freed_memory() -> bool:
    """Let the process keep what a step frees for the next one, up to 2 GiB.

    It is done when Lepton is imported, before XLA starts its threads; on machines
    without an accelerator, or with JAX_PLATFORMS=cpu; under glibc; and not where
    `VARIABLES` or GLIBC_TUNABLES say otherwise. Memory that a large step has used then
    shows as used until the process ends.

    Returns:
      Whether it is done.
    """
    if not _wanted(os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    settings = (
        (MMAP_THRESHOLD, LARGEST_KEPT),
        (TRIM_THRESHOLD, MOST_KEPT),
        (ARENA_MAX, ARENAS),
    )
    done = [libc.mallopt(name, value) for name, value in settings]
    return all(done)


def _wanted(environment: Mapping[str, str]) -> bool:
    """Whether steps run on the CPU, and nobody has set how memory is kept."""
    if any(name in environment for name in VARIABLES):
        return False
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    if environment.get("JAX_PLATFORMS") == "cpu":
        return True
    return not any(Path(file).exists() for file in ACCELERATORS)

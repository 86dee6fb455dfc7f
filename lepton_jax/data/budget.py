"""How many threads a feed may read with, and how many bytes it may hold."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lepton_jax.errors import DataError

# Share of the machine's memory that a feed takes at most, unless it is told otherwise,
# and the most bytes. Assumptions: the model's state and the system need the rest, and
# more than the bound hides no wait.
MEMORY_SHARE = 1 / 8
MOST_MEMORY = 4 * 2**30

# Where Linux says how many bytes the processes of a container may take (cgroup v2, v1).
LIMITS_OF_A_CONTAINER = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Budget:
    """Memory and threads of a feed.

    Attributes:
      memory: bytes of blocks that are read ahead and of row groups that are held.
      workers: threads that read.
    """

    memory: int
    workers: int

    @classmethod
    def of_this_machine(cls) -> Budget:
        """Return an eighth of the memory, and a thread for each core."""
        memory = int(_machine_memory() * MEMORY_SHARE)
        return cls(min(memory, MOST_MEMORY), _cores())

    def with_(
        self,
        memory: int | None,
        workers: int | None,
    ) -> Budget:
        """Return the budget with what is given in place of its own.

        Raises:
          DataError: a number is below 1.
        """
        for name, value in (("memory", memory), ("workers", workers)):
            if value is not None and value < 1:
                raise DataError(
                    f"{name} is {value!r}",
                    where="within",
                    remedy="give at least 1, or leave it out",
                )
        return Budget(memory or self.memory, workers or self.workers)


def _machine_memory() -> int:
    """Return the bytes of memory that this process could have."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in LIMITS_OF_A_CONTAINER:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            memory = min(memory, int(text))
    return memory


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1

"""Energy: joules by the counters that a machine has, and what they cost.

    /sys/class/powercap/intel-rapl:0      a processor's package (Intel, AMD)
    /sys/class/powercap/intel-rapl:0:2    its memory, which the package leaves out
    NVML                                  a GPU since Volta

Many machines show none: virtual machines, containers, and Linux since 5.10 to anybody
but root (a counter that others can read tells them secrets: Lipp et al. 2021,
"PLATYPUS: Software-based Power Side-Channel Attacks on x86"). Energy is then "not
measured", for a reason, and nothing is guessed in its place.

A counter sees the whole machine: what runs next to a server is in its figures, too.
"""

from __future__ import annotations

import importlib
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
# A package or a package's part; "intel-rapl-mmio:0" is the first one a second time.
ZONE = re.compile(r"intel-rapl:\d+(:\d+)?")
# Zones that add up: cores ("core", "uncore") are part of a package, and "psys" is the
# whole platform, which few machines have.
PACKAGE = "package"
MEMORY = "dram"

MICROJOULES = 1e6
MILLIJOULES = 1e3

# Seconds over which a power is taken: a hundred times the millisecond at which RAPL's
# counters move (Hähnel et al. 2012, "Measuring Energy Consumption for Short Code Paths
# Using RAPL").
LEAST_INTERVAL = 0.1
# Seconds between two looks. At 1,000 W a counter of 262 kJ, the least that is known,
# runs over after four minutes.
PERIOD = 1.0


class Counter(Protocol):
    """A counter of energy that only grows.

    Attributes:
      name: of what it measures.
    """

    name: str

    def joules(self) -> float:
        """Return the energy since the counter was opened.

        Raises:
          OSError: it can't be read any more.
        """


class Rapl:
    """A zone of the kernel's powercap folder.

    Args:
      folder: of the zone.
      name: of what it measures.

    Raises:
      OSError: it can't be read.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last = self._microjoules()
        self._total = 0

    def joules(self) -> float:
        now = self._microjoules()
        # a counter at its end begins again at 0
        self._total += (now - self._last) % (self._range + 1)
        self._last = now
        return self._total / MICROJOULES

    def _microjoules(self) -> int:
        return int(self._file.read_text())


class Nvml:
    """A GPU, by NVIDIA's management library.

    Args:
      library: `pynvml`, initialized.
      handle: of the GPU.
      name: of what it measures.
    """

    def __init__(
        self,
        library: Any,
        handle: Any,
        name: str,
    ) -> None:
        self.name = name
        self._library = library
        self._handle = handle
        self._first = self._millijoules()

    def joules(self) -> float:
        return (self._millijoules() - self._first) / MILLIJOULES

    def _millijoules(self) -> int:
        try:
            return int(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._library.NVMLError as error:
            raise OSError(f"NVML: {error}") from error


@dataclass(frozen=True)
class Found:
    """The counters of a machine.

    Attributes:
      counters: those that can be read.
      reasons: why others can't, a sentence each.
    """

    counters: tuple[Counter, ...]
    reasons: tuple[str, ...]

    @property
    def measured(self) -> bool:
        """Whether there is any counter."""
        return bool(self.counters)

    def __str__(self) -> str:
        """Return what is measured, or why nothing is."""
        if self.measured:
            return ", ".join(counter.name for counter in self.counters)
        return f"not measured: {'; '.join(self.reasons)}"


def find_counters(
    powercap: Path = POWERCAP,
    nvml: str = "pynvml",
) -> Found:
    """Return the energy counters of this machine that can be read.

    Args:
      powercap: the kernel's folder of zones.
      nvml: name of the module of NVIDIA's management library.
    """
    processors, reason = _zones(powercap)
    gpus, other_reason = _gpus(nvml)
    reasons = [text for text in (reason, other_reason) if text]
    return Found((*processors, *gpus), tuple(reasons))


class EnergyMeter:
    """The energy of a machine since the meter was made.

    Args:
      found: the counters; None: those of this machine.
      clock: returns seconds.
    """

    def __init__(
        self,
        found: Found | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found = find_counters() if found is None else found
        self._clock = clock
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = {counter.name: 0.0 for counter in self.found.counters}
        self._since = clock()
        self._then = 0.0
        self._watts: float | None = None

    def read(self) -> dict[str, float]:
        """Return the joules of each counter since the meter was made.

        A counter that can't be read any more stays where it was.
        """
        with self._lock:
            for counter in self.found.counters:
                try:
                    self._joules[counter.name] = counter.joules()
                except OSError:
                    continue
            self._note_power()
            return dict(self._joules)

    @property
    def joules(self) -> float | None:
        """The joules of all counters since the meter was made; None: not measured."""
        if not self.found.measured:
            return None
        return sum(self.read().values())

    def told(self) -> dict[str, Any]:
        """Return plain data: "joules" by counter, or why they are "not_measured"."""
        if not self.found.measured:
            return {"not_measured": "; ".join(self.found.reasons)}
        return {"joules": self.read()}

    @property
    def watts(self) -> float | None:
        """Mean power of the last interval that was looked at; None: not measured."""
        return self._watts

    def start(self) -> EnergyMeter:
        """Look at the counters once a second, so that none runs over unseen."""
        if self.found.measured and self._thread is None:
            self._thread = threading.Thread(
                target=self._look,
                name="lepton-energy",
                daemon=True,
            )
            self._thread.start()
        return self

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    # ---- internals ----

    def _look(self) -> None:
        while not self._stop.wait(PERIOD):
            self.read()

    def _note_power(self) -> None:
        now = self._clock()
        seconds = now - self._since
        if not self.found.measured or seconds < LEAST_INTERVAL:
            return
        total = sum(self._joules.values())
        self._watts = (total - self._then) / seconds
        self._since = now
        self._then = total


# ---- internals ----


def _zones(powercap: Path) -> tuple[list[Counter], str]:
    """Return the zones that add up to the processors' energy, or why there is none."""
    folders = sorted(powercap.glob("intel-rapl:*"))
    wanted = [folder for folder in folders if ZONE.fullmatch(folder.name)]
    counters: list[Counter] = []
    for folder in wanted:
        try:
            kind = (folder / "name").read_text().strip()
            if kind.startswith(PACKAGE) or kind == MEMORY:
                counters.append(Rapl(folder, _named(folder, kind)))
        except PermissionError:
            return [], (
                f"{folder}/energy_uj is closed to this user; let it read the file"
                " (chmod a+r), or run as root"
            )
        except (OSError, ValueError) as error:
            return [], f"{folder}: {error}"
    if counters:
        return counters, ""
    return [], f"no energy counters of a processor in {powercap}"


def _named(folder: Path, kind: str) -> str:
    """Return a zone's name: "package-0", or "dram-0" after its package's number."""
    number = folder.name.split(":")[1]
    return kind if kind.startswith(PACKAGE) else f"{kind}-{number}"


def _gpus(module: str) -> tuple[list[Counter], str]:
    """Return the GPUs that this process may use, or why there is none."""
    try:
        library = importlib.import_module(module)
    except ImportError:
        return [], f"{module} is not installed, so no GPU is asked"
    try:
        library.nvmlInit()
        handles = _handles(library, os.environ.get("CUDA_VISIBLE_DEVICES"))
        counters: list[Counter] = [
            Nvml(library, handle, f"gpu-{number}")
            for number, handle in enumerate(handles)
        ]
    except (library.NVMLError, OSError) as error:
        return [], f"no GPU tells its energy: {error}"
    return counters, "" if counters else "there is no GPU"


def _handles(library: Any, visible: str | None) -> Sequence[Any]:
    """Return the handles of the GPUs that CUDA shows to this process, in its order."""
    if visible is None:
        return [
            library.nvmlDeviceGetHandleByIndex(number)
            for number in range(library.nvmlDeviceGetCount())
        ]
    handles = []
    for name in visible.split(","):
        name = name.strip()
        if not name or name == "-1":
            break  # as CUDA does: the list ends at the first that is none
        if name.isdigit():
            handles.append(library.nvmlDeviceGetHandleByIndex(int(name)))
        else:
            handles.append(library.nvmlDeviceGetHandleByUUID(name))
    return handles

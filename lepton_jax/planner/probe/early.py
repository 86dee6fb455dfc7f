"""XLA's account of a program's memory, before it has generated the program's code.

XLA first transforms and schedules a program, then gives each array its place in memory,
and only then makes machine code. That last part takes most of the time: 48 of 51 s of
CPU time for a language model of four layers on v5e:4x4 (libtpu 0.0.42). But the places
are decided before it, and XLA can be asked to write them to a file. So another process
compiles the program, and is stopped as soon as the file is there.

    allocation 0: size 8192000, parameter 10, shape |f32[2000,1024]|, maybe-live-out:
    allocation 1: size 16384, parameter 39, shape |s32[4,1024]| at ShapeIndex {}:
    allocation 2: size 512, maybe-live-out:
    allocation 3: size 2847965696, preallocated-temp:
    allocation 4: size 116986368, color 1, preallocated-temp:

A color other than 0 is a memory of its own on the chip.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lepton_jax.compat import compile_request
from lepton_jax.errors import PlanError
from lepton_jax.planner import ahead

CHILD = Path(__file__).with_name("child.py")
# The file that the process writes at its end.
END = "end.json"
# Seconds between two looks at the files.
PERIOD = 0.05
# A line of XLA's dump of its buffers.
ALLOCATION = re.compile(r"^allocation \d+: size (\d+)(.*)$", re.MULTILINE)


class Placed(NamedTuple):
    """A program whose arrays have their places.

    Attributes:
      memory: XLA's account of it, without its code.
      text: the program, optimized and in its order, as `Compiled.as_text` gives it.
    """

    memory: ahead.Memory
    text: str


def memory(lowered: Any, devices: Any) -> ahead.Memory:
    """Return XLA's account of a program, without its code; see `placed`."""
    return placed(lowered, devices).memory


def placed(lowered: Any, devices: Any) -> Placed:
    """Compile a program until its arrays have their places.

    A program that is too large may be refused, or else its account says so.

    Args:
      lowered: the program.
      devices: those that it is for, in the mesh's order.

    Raises:
      TooLarge: the program does not fit the device's memory.
      PlanError: XLA can't compile it.
    """
    with _compiling(lowered, devices) as (folder, process):
        return _awaited(folder, process, _name(lowered))


def finished(lowered: Any, devices: Any, limit: float) -> ahead.Memory:
    """Compile a program to its end, in a process that can be stopped.

    Args:
      lowered: the program.
      devices: those that it is for, in the mesh's order.
      limit: the most seconds that it may take.

    Raises:
      TimeoutError: it takes longer.
      TooLarge: the program does not fit the device's memory.
      PlanError: XLA can't compile it.
    """
    with _compiling(lowered, devices) as (folder, process):
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"XLA compiles for more than {limit:g} s") from error
        return _account(folder)


def read(text: str) -> ahead.Memory:
    """Read XLA's dump of its buffers.

    >>> text = '''
    ... allocation 0: size 800, parameter 1, shape |f32[200]| at ..., maybe-live-out:
    ... allocation 1: size 100, parameter 2, shape |f32[25]| at ShapeIndex {}:
    ... allocation 2: size 50, maybe-live-out:
    ... allocation 3: size 3000, preallocated-temp:
    ... allocation 4: size 9000, color 1, preallocated-temp:
    ... '''
    >>> memory = read(text)
    >>> memory.arguments, memory.temporaries, memory.outputs, memory.aliases
    (900, 3000, 850, 800)
    """
    sums = dict.fromkeys(("arguments", "temporaries", "outputs", "aliases"), 0)
    for size, kind in _allocations(text):
        is_output = "maybe-live-out" in kind
        if ", parameter" in kind:
            sums["arguments"] += size
            sums["aliases"] += size * is_output
        if is_output:
            sums["outputs"] += size
        elif "preallocated-temp" in kind:
            sums["temporaries"] += size
    return ahead.Memory(code=0, **sums)


# ---- internals ----


@contextlib.contextmanager
def _compiling(
    lowered: Any,
    devices: Any,
) -> Iterator[tuple[Path, subprocess.Popen]]:
    """Yield the folder and the process in which a program compiles; stop it then."""
    with tempfile.TemporaryDirectory(prefix="lepton-probe-") as name:
        folder = Path(name)
        _write_request(folder, lowered, devices)
        command = [sys.executable, "-P", str(CHILD), name]
        with (folder / "log.txt").open("wb") as log:
            process = subprocess.Popen(
                command,
                env=_environment(len(devices)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            try:
                yield folder, process
            finally:
                process.kill()
                process.wait()


def _allocations(text: str) -> Iterator[tuple[int, str]]:
    """Yield size and description of each allocation in the device's main memory."""
    for size, kind in ALLOCATION.findall(text):
        if ", color" not in kind:
            yield int(size), kind


def _write_request(folder: Path, lowered: Any, devices: Any) -> None:
    module, options = compile_request(lowered)
    (folder / "module.mlir").write_bytes(module)
    (folder / "options.pb").write_bytes(options)
    request = {
        "platform": devices[0].platform,
        "devices": [device.id for device in devices],
    }
    described = ahead.description(devices)
    if described is not None:
        name, topology_options = described
        request |= {"topology": name, "topology_options": topology_options}
    (folder / "request.json").write_text(json.dumps(request))


def _name(lowered: Any) -> str:
    """Return the name of a program's module, which its dumps bear."""
    module = lowered.compiler_ir("stablehlo")
    return str(module.operation.attributes["sym_name"]).strip('"')


def _environment(devices: int) -> dict[str, str]:
    flags = os.environ.get("XLA_FLAGS", "")
    if "host_platform_device_count" not in flags:
        flags += f" --xla_force_host_platform_device_count={devices}"
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    return ahead.NOT_A_TPU_HOST | dict(os.environ) | own


def _awaited(
    folder: Path,
    process: subprocess.Popen,
    name: str,
) -> Placed:
    """Wait until XLA has placed a program's arrays, or has refused it.

    Args:
      folder: of the request.
      process: which compiles.
      name: of the program.
    """
    while True:
        has_ended = process.poll() is not None
        if (folder / END).exists():
            return Placed(_account(folder), _text(folder, name))
        # this file comes after that of the buffers, which is complete then
        if _dumped(folder, name, "memory-usage-report"):
            (buffers,) = _dumped(folder, name, "buffer-assignment")
            text = _text(folder, name)
            if _is_complete(text):
                return Placed(read(buffers.read_text()), text)
        if has_ended:
            return Placed(_account(folder), _text(folder, name))
        time.sleep(PERIOD)


def _text(folder: Path, name: str) -> str:
    """Return the program as far as it is written; nothing before it is."""
    return "".join(file.read_text() for file in _dumped(folder, name, ""))


def _is_complete(text: str) -> bool:
    """Whether a program's last computation, its entry, has its closing bracket.

    XLA of jaxlib 0.12 writes the program after the report on its memory.
    """
    return "\nENTRY " in text and text.rstrip().endswith("\n}")


def _dumped(
    folder: Path,
    name: str,
    kind: str,
) -> list[Path]:
    ending = f"-{kind}" if kind else ""
    pattern = f"*.{name}.*after_optimizations{ending}.txt"
    return list((folder / "dump").glob(pattern))


def _account(folder: Path) -> ahead.Memory:
    """Return the account of a program that compiled to its end.

    Raises:
      TooLarge: it was refused.
      PlanError: it failed in another way, or its process ended without a word.
    """
    file = folder / END
    if not file.exists():
        raise PlanError(
            f"XLA's compiler stopped: {_last_line(folder / 'log.txt')}",
            where="probe",
            remedy="compile the whole step in this process: --whole",
        )
    return _ended(json.loads(file.read_text()))


def _ended(end: dict[str, Any]) -> ahead.Memory:
    """Return what a process wrote at its end.

    Raises:
      TooLarge: the program was refused.
      PlanError: it failed in another way.
    """
    if "error" not in end:
        names = ("argument", "temp", "output", "alias", "generated_code", "high")
        return ahead.Memory(*(end[name] for name in names))
    large = ahead.too_large(end["error"])
    if large is not None:
        raise large
    raise PlanError(
        f"XLA can't compile the step: {end['error'].partition(chr(10))[0]}",
        where="probe",
        remedy="compile the whole step in this process: --whole",
    )


def _last_line(file: Path) -> str:
    lines = file.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it says nothing"

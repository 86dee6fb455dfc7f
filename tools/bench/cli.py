"""Measure Lepton against what one would use without it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lepton_jax.cli.settings import Parser
from lepton_jax.errors import LeptonError, SettingError
from tools.bench import (
    adapters,
    calibration,
    controller,
    cpu_rates,
    data,
    defaults,
    embeddings,
    faults,
    generate,
    generation,
    lm,
    memory,
    overhead,
    peers,
    prepare,
    regret,
    restart,
    serve,
    shakespeare,
    shrink,
    step,
    step_time,
)

# Each module has an `add(commands, shared)`. It adds a parser whose default `run` takes
# the options and returns what --json keeps.
COMMANDS = (
    step,
    overhead,
    lm,
    memory,
    step_time,
    cpu_rates,
    calibration,
    regret,
    controller,
    faults,
    restart,
    prepare,
    data,
    defaults,
    embeddings,
    generate,
    generation,
    shrink,
    peers,
    serve,
    adapters,
    shakespeare,
)
# Variables that change the figures, and so are part of a command that is recorded.
ENVIRONMENT = (
    "JAX_PLATFORMS",
    "XLA_FLAGS",
    "CUDA_VISIBLE_DEVICES",
    "XLA_CLIENT_MEM_FRACTION",
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 0, or 2 for a mistake of the user's."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        options = _parser().parse_args(arguments)
        options.arguments = arguments
        if options.json is not None:
            _check_writable(options.json)
        results = options.run(options)
        if options.json is not None:
            _write(options.json, {**surroundings(arguments), "results": results})
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def surroundings(arguments: list[str]) -> dict[str, Any]:
    """Return where, when, on what and by which command figures were measured."""
    variables = [
        f"{name}={shlex.quote(os.environ[name])}"
        for name in ENVIRONMENT
        if name in os.environ
    ]
    command = [*variables, "python -m tools.bench", shlex.join(arguments)]
    packages = ("jax", "jaxlib", "flax", "optax", "lepton-jax")
    versions = {name: version(name) for name in packages}
    return {
        "command": " ".join(command),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": _cores(),
            "system": platform.system(),
            "architecture": platform.machine(),
        },
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version(), **versions},
    }


def _parser() -> Parser:
    parser = Parser(
        prog="python -m tools.bench",
        description=__doc__,
        allow_abbrev=False,
    )
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="also write results, machine and versions to FILE",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands, shared)
    return parser


def _cpu() -> str:
    """Return the processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor()
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_writable(file: Path) -> None:
    """Raise a SettingError before minutes of measuring, not after."""
    target = file if file.exists() else file.parent
    if file.is_dir() or not os.access(target, os.W_OK):
        raise SettingError(
            "the results can't be written there",
            where=file,
            remedy="name a file in a folder that exists and that you may write to",
        )


def _write(
    file: Path,
    results: dict[str, Any],
) -> None:
    try:
        file.write_text(json.dumps(results, indent=1) + "\n")
    except OSError as error:
        raise SettingError(
            f"the results can't be written: {error.strerror}",
            where=file,
            remedy="fix that and measure again; the table above is complete",
        ) from error

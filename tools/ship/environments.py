"""Make an environment for each runtime that an exported model needs.

    python -m tools.ship.environments FOLDER [TARGET ...]

Each is a virtual environment with that runtime alone, in the version that this
interpreter has; `lepton` has this checkout without its recipes. `tools.ship.parity
--runtimes FOLDER` then opens exported models in them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What runs an exported model of each target; NumPy holds its arrays.
RUNTIMES = {
    "stablehlo": ("jax", "jaxlib", "flatbuffers", "safetensors"),
    "onnx": ("onnxruntime", "numpy"),
    "litert": ("ai-edge-litert", "numpy"),
    "iree": ("iree-base-runtime", "numpy"),
    "savedmodel": ("tensorflow-cpu", "numpy"),
    "safetensors": ("safetensors", "numpy"),
    "lepton": (f"{ROOT}[ship,data,image,text]",),
}


def python_of(
    folder: Path,
    target: str,
) -> Path | None:
    """Return the interpreter of a target's environment; None: it was not made."""
    path = folder / target / "bin" / "python"
    return path if path.exists() else None


def make(folder: Path, target: str) -> None:
    """Make the environment of a target.

    Raises:
      subprocess.CalledProcessError: pip fails.
    """
    place = folder / target
    venv.create(place, with_pip=True, clear=True)
    wanted = [_pinned(name) for name in RUNTIMES[target]]
    # -I: what PYTHONPATH has is not installed
    command = [str(place / "bin" / "python"), "-I", "-m", "pip", "install", "--quiet"]
    subprocess.run(
        [*command, *wanted],
        check=True,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environments that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    options = parser.parse_args(arguments)
    for target in options.targets or RUNTIMES:
        make(options.folder, target)
        print(f"{target}: {python_of(options.folder, target)}", flush=True)
    return 0


def _pinned(name: str) -> str:
    """Return a requirement of the version that is installed here."""
    try:
        return f"{name}=={version(name)}"
    except PackageNotFoundError:
        return name


if __name__ == "__main__":
    sys.exit(main())

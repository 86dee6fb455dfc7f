"""`lepton serve` with stand-ins for artifacts.

python standin_server.py NAME ... --port PORT; a NAME is a function of `standins`, or
`slow:SECONDS`.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import standins

from lepton_jax.cli import serve, trained


def slow(seconds):
    """`linear`, whose program takes a while."""
    artifact = standins.linear("slow")
    quick = artifact.function

    def function(arrays):
        time.sleep(seconds)
        return quick(arrays)

    artifact.function = function
    return artifact


def artifact_of(place):
    name, _, argument = str(place).partition(":")
    if name == "slow":
        return slow(float(argument))
    if name == "linear2":
        return standins.linear(version="2", scale=3.0)
    return getattr(standins, name)()


if __name__ == "__main__":
    trained.artifact_of = artifact_of
    sys.exit(serve.main(sys.argv[1:]))

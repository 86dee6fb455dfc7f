"""`python -m tools.hub COMMAND`: models of folders, compared."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import LeptonError
from tools.hub import checkpoints, hosts, parity, reference, stories
from tools.hub.mutants import mutants

BAR = 1e-4  # of a logit, in float32
MISTAKE = 2  # exit code
FELL_SHORT = 1  # exit code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a campaign; return 1 if it falls short of its bar."""
    parser = argparse.ArgumentParser(prog="python -m tools.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__)
        command.add_argument("--family", action="append", choices=checkpoints.AXES)
        command.add_argument("--json", type=Path, help="file for the result")
        if name in ("parity", "rounding"):
            command.add_argument("--python", required=True)
        if name == "parity":
            command.add_argument("--folder", action="append", default=[], type=Path)
        if name == "stories":
            command.add_argument("--data", required=True, type=Path)
    options = parser.parse_args(arguments)
    families = options.family or list(checkpoints.AXES)
    try:
        result = COMMANDS[options.command](families, options)
    except LeptonError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISTAKE
    text = json.dumps(result, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    shown = {name: value for name, value in result.items() if name != "cases"}
    print(json.dumps(shown, indent=1))
    passes = all(family["passes"] for family in result["families"].values())
    return 0 if passes else FELL_SHORT


def cross(families: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Compare all cases of the cross product with the float64 reference."""
    found = {}
    for family in families:
        start = time.monotonic()
        errors = []
        with tempfile.TemporaryDirectory() as place:
            for number, case in enumerate(checkpoints.cases(family)):
                errors.append((_error(case, Path(place) / str(number)), str(case)))
                if number % CASES_A_CLEARING == 0:
                    jax.clear_caches()  # else compiled operations fill the memory
        worst = max(errors)
        found[family] = {
            "cases": len(errors),
            "logit_most": worst[0],
            "worst": worst[1],
            "seconds": round(time.monotonic() - start),
            "passes": worst[0] <= BAR,
        }
        print(family, found[family], file=sys.stderr, flush=True)
    return {"bar": BAR, "families": found}


CASES_A_CLEARING = 200  # assumption


def faults(families: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Make models wrong in one way each, and see whether the comparison shows it."""
    least: dict[str, float] = {}
    found = {}
    for family in families:
        errors = []
        with tempfile.TemporaryDirectory() as place:
            for number, case in enumerate(checkpoints.covering(family)):
                folder = Path(place) / str(number)
                config, tensors = checkpoints.write(case, folder)
                tokens = checkpoints.tokens_of()
                right = reference.logits(config, tensors, tokens)
                for name, mutant in mutants(lepton.hub.open(folder).module()):
                    error = float(np.abs(_logits(mutant, tokens) - right).max())
                    errors.append(error)
                    least[name] = min(error, least.get(name, error))
        found[family] = {
            "mutants": len(errors),
            "caught": sum(error > BAR for error in errors),
            "passes": min(errors) > BAR,
        }
    return {"bar": BAR, "least": least, "families": found}


def against_transformers(
    families: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Let transformers open what is written, and compare the distributions."""
    return parity.compare(options.python, families, options.folder)


def rounding(families: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Compare what bfloat16 does to the distributions here and in transformers."""
    return parity.rounding(options.python, families)


def known_model(families: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Read, compare, write and train a real model of the public data."""
    folder = options.data / "weights_stories260k"
    text = options.data / "tinyshakespeare" / "input.txt"
    return {"families": {"stories260K": stories.look(folder, text)}}


def two_hosts(families: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Let two processes read their parts of a folder onto one mesh, and write it."""
    return {"families": {"llama": hosts.look()}}


COMMANDS = {
    "cross": cross,
    "faults": faults,
    "parity": against_transformers,
    "rounding": rounding,
    "stories": known_model,
    "hosts": two_hosts,
}


def _error(case: checkpoints.Case, folder: Path) -> float:
    config, tensors = checkpoints.write(case, folder)
    tokens = checkpoints.tokens_of()
    right = reference.logits(config, tensors, tokens)
    module = lepton.hub.open(folder).module()
    return float(np.abs(_logits(module, tokens) - right).max())


def _logits(module: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(module(jnp.asarray(tokens)[None])[0], np.float64)


if __name__ == "__main__":
    sys.exit(main())

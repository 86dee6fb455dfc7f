"""Record what the recipes do, and compare it after a change that must not alter it.

    python tools/golden.py record golden.json      before the change
    python tools/golden.py compare golden.json     after it

Recorded are, of each recipe: the losses of its first steps and a hash of the parameters
after them, on one device and on eight virtual ones, with and without `adaptive()`; and
its plan for four topologies. Bits depend on the machine and on the version of XLA, so a
record is compared where it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.launch import settings
from lepton_jax.state import by_path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
TOPOLOGIES = ("cpu:8", "h200:8", "v5e:4x4", "v5p:4x4x4")
# Settings with which a recipe's steps are short: what is compared is bits, not learning.
QUICK = {"lm": {"length": 64, "batch_size": 8}}


def recorded(names: list[str]) -> dict[str, Any]:
    """Losses, hashes and plans of each recipe, by its name."""
    found: dict[str, Any] = {}
    for name in names:
        make = settings.load(ROOT / "recipes" / f"{name}.py")
        recipe = make(steps=STEPS, **QUICK.get(name, {}))
        runs = {}
        for devices in (1, 8):
            for policies in ("none", "adaptive"):
                runs[f"{devices} devices, {policies}"] = _run(recipe, devices, policies)
        plans = {on: _plan(recipe, on) for on in TOPOLOGIES}
        found[name] = {"runs": runs, "plans": plans}
        print(f"{name}: {len(runs)} runs, {len(plans)} plans", file=sys.stderr)
    return found


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Where two records differ, a line each."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in dict.fromkeys((*before, *after)):
            lines += differences(before.get(key), after.get(key), f"{place}/{key}")
        return lines
    return [] if before == after else [f"{place}: {_short(before)} -> {_short(after)}"]


def main() -> int:
    """Record or compare; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    names = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))
    now = json.loads(json.dumps(recorded(names)))
    if options.what == "record":
        options.file.write_text(json.dumps(now, indent=1))
        return 0
    lines = differences(json.loads(options.file.read_text()), now)
    print("\n".join(lines) if lines else "nothing differs")
    return 1 if lines else 0


def _run(recipe: lepton.Recipe, devices: int, policies: str) -> dict[str, Any]:
    controller = controllers.adaptive() if policies == "adaptive" else ()
    recipe = dataclasses.replace(recipe, controller=controller, test=None, best=None)
    trainer = lepton.Trainer(recipe, devices=devices)
    history = trainer.fit()
    digest = hashlib.sha256()
    for path, leaf in by_path(trainer.state.params).items():
        digest.update(path.encode())
        digest.update(np.asarray(leaf).tobytes())
    losses = [float(loss).hex() for loss in history["loss"]]
    return {"losses": losses, "parameters": digest.hexdigest(), "step": trainer.step}


def _plan(recipe: lepton.Recipe, on: str) -> dict[str, Any]:
    return json.loads(lepton.Trainer(recipe, devices=1).plan(on).to_json())


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


if __name__ == "__main__":
    assert len(jax.devices()) == 8, "XLA_FLAGS were read before this module was"
    sys.exit(main())

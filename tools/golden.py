"""Record what the recipes do, and compare it after a change that must not alter it.

    python tools/golden.py record FOLDER      before the change
    python tools/golden.py compare FOLDER     after it

The record has, for each recipe, the losses of its first steps and a hash of the
parameters after them, on one device and on eight virtual ones, with and without
`adaptive()`, and its plan for four topologies; and the exit text of twenty bad command
lines. FOLDER also keeps a run folder and a saved model; `compare` resumes the one and
loads the other. Bits depend on the machine and on the version of XLA, so compare a
record where it was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import numpy as np

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.cli import settings
from lepton_jax.trees import by_path

ROOT = Path(__file__).resolve().parents[1]
STEPS = 30
TOPOLOGIES = ("cpu:8", "h200:8", "v5e:4x4", "v5p:4x4x4")
# Settings with which a recipe's steps are short: what is compared is bits, not
# learning.
QUICK = {"lm": {"length": 64, "batch_size": 8}}
# Twenty mistakes on the command line of `tools/launch.py`; "{recipes}" is the folder of
# the recipes, "{tmp}" an empty one that holds the files of `_write_bad_files`.
BAD_COMMANDS = (
    "",
    "nothing.py",
    "{recipes}/digits_cn.py",
    "{recipes}/digits_cnn.py --witdh 3",
    "{recipes}/digits_cnn.py --width three",
    "{recipes}/digits_cnn.py --width 0",
    "{recipes}/digits_cnn.py --batch-size -1",
    "{recipes}/digits_cnn.py --batch-size big",
    "{recipes}/digits_cnn.py --learning-rate nan",
    "{recipes}/digits_cnn.py --precision float8",
    "{recipes}/digits_cnn.py --epochs 0",
    "{recipes}/digits_cnn.py --devices 0",
    "{recipes}/digits_cnn.py --devices none",
    "{recipes}/digits_cnn.py --resume {tmp}/nowhere",
    "{recipes}/digits_cnn.py --run-dir {tmp}/file.txt",
    "{recipes}/mnist_cnn.py --data {tmp}/nowhere",
    "{recipes}/csv_mlp.py --data {tmp}/file.txt",
    "{recipes}/csv_mlp.py --data {tmp}/ragged.csv",
    "{tmp}/broken.py",
    "{tmp}/empty.py",
)


def recorded(names: list[str]) -> dict[str, Any]:
    """Losses, hashes and plans of each recipe, by its name."""
    by_recipe: dict[str, Any] = {}
    for name in names:
        make = settings.load(ROOT / "recipes" / f"{name}.py")
        recipe = make(steps=STEPS, **QUICK.get(name, {}))
        runs = {}
        for devices in (1, 8):
            for policies in ("none", "adaptive"):
                runs[f"{devices} devices, {policies}"] = _run(recipe, devices, policies)
        plans = {on: _plan(recipe, on) for on in TOPOLOGIES}
        by_recipe[name] = {"runs": runs, "plans": plans}
        print(f"{name}: {len(runs)} runs, {len(plans)} plans", file=sys.stderr)
    return by_recipe


def exit_texts() -> dict[str, str]:
    """Exit code and last error line of each bad command, by the command."""
    with tempfile.TemporaryDirectory() as folder:
        _write_bad_files(Path(folder))
        return {command: _exit_text(command, folder) for command in BAD_COMMANDS}


def write_run(folder: Path) -> None:
    """Write a run folder and a saved model, for a later `compare` to open."""
    trainer = lepton.Trainer(
        _digits(STEPS),
        devices=1,
        run_dir=folder / "run",
    )
    trainer.fit()
    trainer.save(folder / "model")


def reopened(folder: Path) -> dict[str, Any]:
    """Go on from the run folder, and load the saved model."""
    resumed = lepton.Trainer(_digits(2 * STEPS), devices=1).load(folder / "run")
    resumed.fit()
    model = lepton.Trainer(_digits(STEPS), devices=1).load(folder / "model")
    return {"resumed": _digest(resumed), "loaded": _digest(model)}


def differences(
    before: Any,
    after: Any,
    place: str = "",
) -> list[str]:
    """List where two records differ, a line each; places in sources don't count."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines = []
        for key in dict.fromkeys((*before, *after)):
            lines += differences(
                before.get(key),
                after.get(key),
                f"{place}/{key}",
            )
        return lines
    if _without_lines(before) == _without_lines(after):
        return []
    return [f"{place}: {_short(before)} -> {_short(after)}"]


def main() -> int:
    """Record or compare; returns 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    folder: Path = options.folder
    if options.what == "record":
        folder.mkdir(parents=True)
        write_run(folder)
    names = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))
    now = {
        "recipes": recorded(names),
        "exit texts": exit_texts(),
        "reopened": reopened(folder),
    }
    now = json.loads(json.dumps(now))
    if options.what == "record":
        (folder / "record.json").write_text(json.dumps(now, indent=1))
        return 0
    lines = differences(json.loads((folder / "record.json").read_text()), now)
    print("\n".join(lines) if lines else "nothing differs")
    return 1 if lines else 0


# ---- internals ----


def _digits(steps: int) -> lepton.Recipe:
    recipe = settings.load(ROOT / "recipes" / "digits_cnn.py")(steps=2 * STEPS)
    return dataclasses.replace(
        recipe,
        steps=steps,
        save_every=STEPS // 3,
    )


def _run(
    recipe: lepton.Recipe,
    devices: int,
    policies: str,
) -> dict[str, Any]:
    recipe = dataclasses.replace(recipe, test=None, best=None, controller=())
    if policies == "adaptive":  # which finds the rate, and refuses a schedule
        recipe = dataclasses.replace(
            recipe, controller=controllers.adaptive(), learning_rate=1e-3
        )
    trainer = lepton.Trainer(recipe, devices=devices)
    history = trainer.fit()
    losses = [float(loss).hex() for loss in history["loss"]]
    return {
        "losses": losses,
        "parameters": _digest(trainer),
        "step": trainer.step,
    }


def _digest(trainer: lepton.Trainer) -> str:
    digest = hashlib.sha256()
    for path, leaf in by_path(trainer.state.params).items():
        digest.update(path.encode())
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _plan(recipe: lepton.Recipe, on: str) -> dict[str, Any]:
    return json.loads(lepton.Trainer(recipe, devices=1).plan(on).to_json())


def _write_bad_files(folder: Path) -> None:
    (folder / "file.txt").write_text("not a table\n")
    (folder / "ragged.csv").write_text("a,b,label\n1,2,x\n3,y\n")
    (folder / "broken.py").write_text("def recipe(:\n")
    (folder / "empty.py").write_text("")


def _exit_text(command: str, folder: str) -> str:
    arguments = command.format(recipes=ROOT / "recipes", tmp=folder).split()
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tools" / "launch.py"),
            *arguments,
        ],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "XLA_FLAGS": ""},
    )
    text = done.stderr[done.stderr.rfind("error:") :] if "error:" in done.stderr else ""
    text = text.replace(folder, "{tmp}").replace(str(ROOT), "{root}")
    return f"{done.returncode}: {re.sub(r'[0-9.]+ (s|GiB)', 'N', text).strip()}"


def _without_lines(value: Any) -> str:
    """Drop lines and functions of source files, which an edit of these may move."""
    return re.sub(r"\.py:[\d:]+( \([\w.]+\))?", ".py", json.dumps(value))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


if __name__ == "__main__":
    assert len(jax.devices()) == 8, "XLA_FLAGS were read before this module was"
    sys.exit(main())

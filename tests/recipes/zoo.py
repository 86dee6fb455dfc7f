"""Every recipe in the small: its plans for two machines and its first losses.

`python tests/recipes/zoo.py [RECIPE...]` records them anew in `zoo.json`, after a
change that is meant to change them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("zoo.json")
TOPOLOGIES = ("h200:8", "v5e:4x4")
STEPS = 20
DEVICES = 8
RECIPES = sorted(
    path.stem
    for path in (ROOT / "recipes").glob("*.py")
    if not path.stem.startswith("_")
)
# Settings with which the steps are short: what is compared are plans and numbers.
SMALL = {
    "cats_dogs": {"width": 8},
    "diffusion": {"width": 8, "batch_size": 16},
    "gan": {"width": 8, "batch_size": 16},
    "lm": {"length": 32, "batch_size": 8},
}


def made(name):
    """Return a recipe with its embedded data, short steps and STEPS of them."""
    module = importlib.import_module(f"recipes.{name}")
    return module.recipe(steps=STEPS, **SMALL.get(name, {}))


def plans(recipe):
    """Return, by topology, the mesh and what of the parameters is sharded."""
    import lepton_jax as lepton

    trainer = lepton.Trainer(recipe, devices=DEVICES)
    found = {}
    for name in TOPOLOGIES:
        plan = trainer.plan(name)
        sharded = {
            array.path.removeprefix("params/"): array.spec
            for array in plan.arrays
            if array.kind == "params" and any(array.spec)
        }
        record = {
            "mesh": plan.mesh,
            "batch_axes": plan.batch_axes,
            "micro_batches": plan.micro_batches,
            "sharded": sharded,
        }
        # as it comes back from the file
        found[name] = json.loads(json.dumps(record))
    return found


def losses(recipe):
    """Return the losses of STEPS steps on DEVICES devices, as planned for them."""
    import lepton_jax as lepton

    # an evaluation takes longer than so few steps, and changes no loss
    trainer = lepton.Trainer(recipe.with_(test=None), devices=DEVICES)
    return [round(float(loss), 6) for loss in trainer.fit()["loss"]]


def main(names):
    record = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for name in names or RECIPES:
        recipe = made(name)
        record[name] = {"plans": plans(recipe), "losses": losses(recipe)}
        print(name, flush=True)
    kept = {name: record[name] for name in RECIPES if name in record}
    GOLDEN.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
    main(sys.argv[1:])

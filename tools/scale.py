"""Plan language models for hardware of four kinds, and write what was chosen and why.

    python tools/scale.py --out benchmarks/scale.json

The sizes of `recipes/lm.py` are planned, not compiled. MFU is the FLOP that a model
needs, 6N a token and attention counted half, over the chips' peak and the step's time.
Of a mixture, N is what a token passes through.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

sys.path.append(str(Path(__file__).resolve().parents[1]))

import lepton_jax as lepton
from lepton_jax.data import sample, settled
from lepton_jax.errors import PlanError
from lepton_jax.planner import Plan, Trace, trace
from lepton_jax.trees import by_path
from recipes.lm import recipe

GIB = 2**30
MIXTURE = {"size": "8b", "experts": 32}
CHOSEN = 2  # of the experts, by a token: the recipe's default

# names and settings of the models, and the topologies that each is planned for
MODELS: dict[str, tuple[Mapping[str, Any], tuple[str, ...]]] = {
    "1B": ({"size": "1b"}, ("v5e:8x8", "v6e:4x4", "v5p:2x2x4", "h100:2x8")),
    "8B": ({"size": "8b"}, ("v5e:16x16", "v6e:16x16", "v5p:4x4x4", "h100:8x8")),
    "70B": ({"size": "70b"}, ("v5e:16x16", "v6e:16x16", "v5p:8x8x8", "h100:32x8")),
    "8B, 32 experts": (MIXTURE, ("v5e:16x16", "v6e:16x16", "v5p:4x4x8", "h100:16x8")),
    "8B, 32 experts, none dropped": (
        {**MIXTURE, "dropless": True},
        ("v5e:16x16", "v6e:16x16", "v5p:4x4x8", "h100:16x8"),
    ),
}


class Model(NamedTuple):
    """A model, and the FLOP that it needs for a token.

    Attributes:
      traced: its recipe.
      parameters: all of them.
      active: those that a token passes through.
      flops: that a token needs, forward and backward.
    """

    traced: Trace
    parameters: int
    active: float
    flops: float


def model_of(settings: Mapping[str, Any]) -> Model:
    """Trace a recipe and count what it needs."""
    asked = recipe(**settings)
    traced = trace(asked, *sample(settled(asked.train)))
    params = by_path(traced.state.params)
    total = sum(leaf.size for leaf in params.values())
    ours = [leaf.size for leaf in params.values() if len(leaf.shape) == 4]  # experts
    share = CHOSEN / settings["experts"] if ours else 1.0
    active = total - (1 - share) * sum(ours)

    out = next(leaf for path, leaf in params.items() if path.endswith("out/kernel"))
    layers, _, dim = out.shape
    length = traced.inputs.shape[1]
    attention = 6 * layers * length * dim
    return Model(traced, total, active, 6 * active + attention)


def planned(model: Model, name: str) -> dict[str, Any]:
    """Return what the planner chooses for a model on a topology."""
    topology = lepton.topology(name)
    try:
        plan = lepton.plan(model.traced, topology)
    except PlanError as error:
        return {"topology": name, "fits": False, "why": error.what}
    tokens = plan.batch_size * model.traced.inputs.shape[1]
    peak = topology.chip.peak("bfloat16") * topology.devices
    seconds = plan.step_seconds
    return {
        "topology": name,
        "fits": plan.peak <= plan.memory,
        "plan": plan.name,
        "mesh": plan.mesh,
        "remat": plan.remat,
        "micro_batches": plan.micro_batches,
        "stages": plan.stages,
        "step_seconds": seconds,
        "seconds": plan.seconds,
        "mfu": model.flops * tokens / seconds / peak,
        "peak_gib": plan.peak / GIB,
        "memory_gib": plan.memory / GIB,
        "dollars_per_billion_tokens": _price(plan, tokens),
        "why": _longest(plan),
    }


def _price(plan: Plan, tokens: int) -> float | None:
    if plan.price_per_hour is None:
        return None
    return plan.price_per_hour / 3600 * plan.step_seconds / tokens * 1e9


def _longest(plan: Plan) -> str:
    """Return what a step spends its time on, the longest first."""
    kinds = sorted(plan.seconds, key=lambda kind: -plan.seconds[kind])
    shares = (f"{kind} {plan.seconds[kind] / plan.step_seconds:.0%}" for kind in kinds)
    return ", ".join(list(shares)[:3])


def row_of(name: str, found: Mapping[str, Any]) -> str:
    """Return a row of the table."""
    if "mesh" not in found:
        return f"| {name} | {found['topology']} | {found['why']} | | | | | |"
    mesh = ", ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    form = f"{found['remat']}, {found['micro_batches']}"
    memory = f"{found['peak_gib']:.1f} of {found['memory_gib']:.1f} GiB"
    price = found["dollars_per_billion_tokens"]
    cells = [
        name,
        found["topology"],
        mesh,
        form,
        f"{found['step_seconds']:.3g} s",
        f"{found['mfu']:.0%}",
        memory,
        "" if price is None else f"${price:,.0f}",
        found["why"],
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Plan every model everywhere, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="a part of a topology's or a model's name")
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    rows = []
    for name, (settings, topologies) in MODELS.items():
        wanted = [
            topology
            for topology in topologies
            if options.only is None or options.only in f"{name} {topology}"
        ]
        model = model_of(settings) if wanted else None
        for topology in wanted:
            found = planned(model, topology)
            rows.append({"model": name, "parameters": model.parameters, **found})
            print(row_of(name, found), flush=True)
    if options.out is not None:
        machine = {"jax": jax.__version__, "python": platform.python_version()}
        command = "python tools/scale.py --out benchmarks/scale.json"
        record = {"command": command, **machine, "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()

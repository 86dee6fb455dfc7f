"""Forms of a step, as the campaign's recipe is trained in them.

A form is a few settings of `recipe.py` and a plan. The plan is made for a number of
devices, and what the planner would choose for large models alone is put into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jax.sharding import PartitionSpec

import lepton_jax as lepton
from lepton_jax.planner import Plan
from tools.faults import recipe as recipes

# Settings of a Transformer that all forms can be had of: kernels of 64 rows and more
# are multiplied in 8 bits, and four layers are stages. At the recipe's own rate, 0.01,
# training makes a thousand times as much of a rounding within ten steps.
SIZES = {"layers": 4, "width": 64, "learning_rate": 0.001}
EXPERTS = 8
# Attention over 256 tokens is computed by a kernel; eight samples divide over devices.
LONG = {"length": 256, "batch_size": 8}

Mesh = Callable[[int], dict[str, int]]


def _over(*axes: str) -> Mesh:
    """Return a mesh for any even number of devices: the last axis has two of them."""

    def mesh(devices: int) -> dict[str, int]:
        *outer, inner = axes
        if not outer:
            return {inner: devices}
        two = 1 if devices % 2 else 2
        return {outer[0]: devices // two, inner: two}

    return mesh


# Each device keeps its rows of the kernels, however small these are.
KEPT_IN_PARTS = {"pins": {"**/kernel": PartitionSpec(None, "fsdp")}}


def _staged(devices: int) -> dict[str, int]:
    return {"stage": 2, "data": devices // 2} if devices % 2 == 0 else {"data": devices}


@dataclass(frozen=True)
class Form:
    """A form in which the campaign's recipe is trained.

    Attributes:
      mesh: for a number of devices, mesh axis name to size, outermost first.
      settings: of the recipe, next to `SIZES`.
      asked: arguments of `Trainer.plan`.
      fields: of the plan, put into it by hand.
      rounding: relative difference of losses where other devices sum in another order.
    """

    mesh: Mesh
    settings: dict[str, Any] = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    rounding: float = 1e-5

    def recipe(self, **settings: Any) -> lepton.Recipe:
        """Return the recipe of the form, with some settings more."""
        return recipes.recipe(**SIZES | self.settings | settings)

    def plan(self, devices: int, **settings: Any) -> Plan:
        """Return the plan of the form for a number of CPU devices."""
        return self.plan_of(self.recipe(**settings), devices)

    def plan_of(self, recipe: lepton.Recipe, devices: int) -> Plan:
        """Return the plan of the form for a recipe that has its settings."""
        trainer = lepton.Trainer(recipe, devices=1)
        asked = dict(self.asked)
        mesh = self.mesh(devices)
        if "stage" not in mesh:
            asked.pop("stages", None)
        plan = trainer.plan(f"cpu:{devices}", mesh=mesh, **asked)
        return dataclasses.replace(plan, **self.fields)

    def options(self, folder: Path, devices: int) -> list[str]:
        """Return what tells the launcher of the form, with its plan in a folder."""
        file = folder / f"plan-{devices}.json"
        if not file.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self.plan(devices).save(file)
        options = ["--plan", str(file)]
        for name, value in (SIZES | self.settings).items():
            options += [f"--{name.replace('_', '-')}", str(value)]
        return options


TENSOR = _over("data", "tensor")
SEQUENCE = _over("sequence")
# Assumption: bfloat16 has 8 bits, and a loss is a mean over all tokens.
BFLOAT16 = 2.0**-8
FORMS = {
    "plain": Form(_over("fsdp"), asked=KEPT_IN_PARTS),
    "blocks": Form(TENSOR, LONG),
    "pieces": Form(TENSOR, fields={"loss_pieces": 4}),
    "kept": Form(TENSOR, asked={"remat": "keep 0,2 and 1,4 in 2"}),
    "ring": Form(SEQUENCE, LONG, asked={"context": "ring"}),
    "all-to-all": Form(SEQUENCE, LONG, asked={"context": "all-to-all"}),
    "stages": Form(_staged, asked={"stages": (2, 4)}),
    "experts": Form(_over("data", "expert"), {"experts": EXPERTS}),
    "fp8": Form(TENSOR, {"precision": "fp8"}, rounding=BFLOAT16),
    "int8": Form(TENSOR, {"precision": "int8"}, rounding=BFLOAT16),
    "muon": Form(_over("fsdp"), {"optimizer": "muon"}, asked=KEPT_IN_PARTS),
}

"""`tools.bench planner-memory`: the planner's predicted peak memory beside XLA's, models x
topologies.

For each model and topology the planner plans, which predicts the peak; then XLA
compiles the planned train step ahead of time, TPUs' by libtpu, the CPU's for virtual
devices. XLA's peak is its arguments + temporaries + outputs - aliases.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.errors import PlanError, SettingError, nearest
from lepton_jax.hardware import Topology, topology
from lepton_jax.planner import ahead, trace
from lepton_jax.train.program import Program
from tools.bench.regret import virtual_devices

TOPOLOGIES = ("v5e:4x4", "v5p:2x2x2", "v6e:4x4", "cpu:8")


@dataclass(frozen=True)
class Case:
    """A recipe and the shapes of one sample; `fixed` goes to the planner, e.g.
    remat.
    """

    model: Callable[..., Any]
    inputs: Any
    targets: Any
    batch_size: int
    loss: Callable[..., Any] = lepton.losses.cross_entropy
    optimizer: Any = field(default_factory=lambda: optax.adamw(1e-3))
    precision: str = "bfloat16"
    fixed: dict[str, Any] = field(default_factory=dict)


def shape(
    *dims: int,
    dtype: Any = jnp.int32,
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *dims), dtype)


def language(
    batch_size: int,
    length: int,
    model: Callable[..., Any] = models.TransformerLM,
    remat: str | None = None,
    **arguments: Any,
) -> Case:
    return Case(
        partial(model, **arguments),
        shape(length),
        shape(length),
        batch_size,
        fixed={} if remat is None else {"remat": remat},
    )


SMALL: dict[str, Any] = {
    "dim": 512,
    "layers": 6,
    "heads": 8,
}
CASES = {
    "mlp": Case(
        partial(models.MLP, (784, 4096, 4096, 10)),
        shape(784, dtype=jnp.float32),
        shape(),
        65_536,
        precision="float32",
    ),
    "cnn": Case(
        partial(
            models.CNN,
            10,
            size=(64, 64, 3),
            widths=(128, 128, 256),
            batch_norm=True,
        ),
        shape(64, 64, 3, dtype=jnp.float32),
        shape(),
        2048,
        optimizer=optax.sgd(0.1, momentum=0.9),
        precision="float32",
    ),
    "lstm": Case(
        partial(
            models.LSTM,
            20_000,
            10,
            dim=256,
            hidden=1024,
        ),
        shape(256),
        shape(),
        4096,
    ),
    "two-tower": Case(
        partial(
            models.TwoTower,
            400_000,
            100_000,
            dim=64,
            hidden=(512, 256),
        ),
        {"user": shape(), "item": shape()},
        shape(dtype=jnp.float32),
        262_144,
        lepton.losses.squared_error,
        optax.adafactor(1e-3),
        "float32",
    ),
    "lm-scan": language(
        256,
        1024,
        vocab=32_000,
        loop="scan",
        **SMALL,
    ),
    "lm-full": language(
        256,
        2048,
        vocab=32_000,
        loop="scan",
        remat="full",
        **SMALL,
    ),
    "lm-unrolled": language(
        128,
        1024,
        vocab=16_384,
        **(SMALL | {"layers": 3}),
    ),
    "moe": language(
        128,
        1024,
        models.MoELM,
        vocab=16_384,
        loop="scan",
        **SMALL,
    ),
}
# of other sizes, for other topologies too; measured only if asked for by name
MORE = {
    "mlp-wide": Case(
        partial(models.MLP, (1024, 8192, 8192, 8192, 1000)),
        shape(1024, dtype=jnp.float32),
        shape(),
        8192,
        precision="float32",
    ),
    "cnn-plain": Case(
        partial(
            models.CNN,
            100,
            size=(96, 96, 3),
            widths=(64, 128, 256, 512),
        ),
        shape(96, 96, 3, dtype=jnp.float32),
        shape(),
        512,
        precision="float32",
    ),
    "lm-wide": language(
        64,
        512,
        vocab=32_000,
        dim=1024,
        layers=4,
        heads=16,
        loop="scan",
    ),
    "lm-124m": language(
        256,
        1024,
        loop="scan",
        **models.transformer_size("124m"),
    ),
    "lm-1b": language(
        256,
        2048,
        loop="scan",
        **models.transformer_size("1b"),
    ),
    "lm-8b": language(
        512,
        4096,
        loop="scan",
        **models.transformer_size("8b"),
    ),
}


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `planner-memory` to the subcommands."""
    parser = commands.add_parser(
        "planner-memory",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help="predicted peak memory beside XLA's, compiled ahead of time",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        default=list(CASES),
        metavar="NAME",
        help=f"of {', '.join(CASES)} (the default), {', '.join(MORE)}",
    )
    parser.add_argument(
        "--on",
        nargs="+",
        default=list(TOPOLOGIES),
        metavar="TOPOLOGY",
        help="topologies (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile the cases asked for, and print a line for each as it ends.

    Raises:
      SettingError: no such model.
      PlanError: no such topology, or too few virtual CPU devices.
    """
    cases = CASES | MORE
    for name in options.models:
        if name not in cases:
            raise SettingError(
                f"there is no model {name!r}{nearest(name, cases)}",
                where="--models",
                remedy=f"the models are {', '.join(cases)}",
            )
    where = [topology(name) for name in options.on]
    virtual_devices()
    devices = {t.name: ahead.devices_for(t) for t in where}
    results: list[dict[str, Any]] = []
    print(
        f"{'model':12} {'topology':10}  {'plan':44} {'predicted':>10} {'XLA':>10}"
        f" {'error':>7} {'seconds':>8}",
        flush=True,
    )
    for name in options.models:
        for t in where:
            results.append(
                {
                    "model": name,
                    **measure(
                        cases[name],
                        t,
                        devices[t.name],
                    ),
                }
            )
            print(_line(results[-1]), flush=True)
            gc.collect()
    errors = [abs(r["error"]) for r in results if "error" in r]
    if errors:
        print(
            f"{len(errors)} cases: median error {statistics.median(errors):.1%}, worst"
            f" {max(errors):.1%}; {sum(r.get('fits') is False for r in results)} plans"
            " do not fit"
        )
    return results


def measure(
    case: Case,
    where: Topology,
    devices: list[Any],
) -> dict[str, Any]:
    """One case: the plan, predicted bytes by kind, XLA's account; `fits` is False where
    XLA refuses the program.
    """
    recipe = lepton.Recipe(
        model=case.model,
        loss=case.loss,
        optimizer=case.optimizer,
        batch_size=case.batch_size,
        precision=case.precision,
    )
    traced = trace(recipe, case.inputs, case.targets)
    begun = time.perf_counter()
    try:
        plan = lepton.plan(traced, where, **case.fixed)
    except PlanError as error:
        return {"topology": where.name, "plan": f"none: {error}"}
    result = {
        "topology": where.name,
        "plan": plan.name,
        "mesh": dict(plan.mesh),
        "remat": plan.remat,
        "micro_batches": plan.micro_batches,
        "predicted": plan.peak,
        "kinds": dict(plan.bytes_per_device),
    }
    program = Program(
        traced,
        plan,
        ahead.mesh_devices(where, plan.mesh, devices),
    )
    try:
        _, memory = ahead.compile_for(program.lower())
    except ahead.TooLarge as error:
        return result | {
            "fits": False,
            "needed": error.needed,
            "seconds": time.perf_counter() - begun,
        }
    return result | {
        "xla": memory.peak,
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "fits": True,
        "error": plan.peak / memory.peak - 1,
        "seconds": time.perf_counter() - begun,
    }


def _line(r: dict[str, Any]) -> str:
    plan = (
        r["plan"]
        if "mesh" not in r
        else (
            f"{r['plan']} {'x'.join(map(str, r['mesh'].values()))}, remat {r['remat']},"
            f" {r['micro_batches']} piece(s)"
        )
    )
    figures = "" if "predicted" not in r else f" {r['predicted'] / 1e9:7.3f} GB"
    figures += f" {r['xla'] / 1e9:7.3f} GB {r['error']:+7.1%}" if "xla" in r else ""
    return (
        f"{r['model']:12} {r['topology']:10}  {plan[:44]:44}{figures}"
        f" {r.get('seconds', 0):8.1f}"
    )

"""The planner's predicted peak memory, compared with XLA's, models x topologies.

`tools.bench planner-memory`. For each model and topology the planner plans, which
predicts the peak. Then XLA compiles the planned train step ahead of time: libtpu for
TPUs, the CPU backend for virtual devices. XLA's peak is what it says that it holds at
the most; on CPUs its arguments + temporaries + outputs - aliases.

With --half it takes programs of `tools.bench.families` in place of the models here;
with --long or --dropless those of one family that is judged apart (`families.apart`).
With --early XLA is stopped once it has placed its arrays: quick, but not the same where
the chip sorts rows: 1.50 GB for 1.79 of a two-tower model on v5p:2x2x1 (libtpu 0.0.42).
What is claimed is judged without it.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp
import optax

import lepton_jax as lepton
from lepton_jax import models
from lepton_jax.errors import PlanError, SettingError
from lepton_jax.hardware import Topology, topology
from lepton_jax.planner import ahead, trace
from lepton_jax.train.program import Program
from tools.bench import options as checks
from tools.bench.families import apart, command, figures, history, measuring, workers
from tools.bench.families.case import Case, shape
from tools.bench.regret import virtual_devices

TOPOLOGIES = ("v5e:4x4", "v5p:2x2x2", "v6e:4x4", "cpu:8")
# Of a half, unless --programs says otherwise: a claim asks for 150 that are compared,
# and for some of these no plan fits.
PROGRAMS = 192
MINUTE = 60.0  # seconds


def language(
    batch_size: int,
    length: int,
    model: Callable[..., Any] = models.TransformerLM,
    remat: str | None = None,
    **arguments: Any,
) -> Case:
    """Return the case of a language model."""
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
# Cases of other sizes, for other topologies, too; measured only if named.
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


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `planner-memory` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "planner-memory",
        __doc__,
        "predicted peak memory next to XLA's, compiled ahead of time",
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
    command.add_options(parser, PROGRAMS)
    for name, what in apart.FAMILIES.items():
        parser.add_argument(
            f"--{name}",
            dest="apart",
            action="store_const",
            const=name,
            help=f"with --half: {what}, in place of the families",
        )
    parser.add_argument(
        "--first",
        type=int,
        default=0,
        metavar="N",
        help="with one of these: pass over the first N programs of its half (default:"
        " %(default)s)",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="with --half: predict with the probe of a plan, and with the plan alone",
    )
    parser.add_argument(
        "--early",
        action="store_true",
        help="with --half: stop XLA once it has placed its arrays",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="S",
        help="with --half: seconds after which a program is given up (default: never)",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="with --half: begin no further program after as many; their order is drawn"
        " by a seed (default: never)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="with --half: processes that plan and compile (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]] | dict[str, Any]:
    """Measure the models, or the programs of a half.

    Raises:
      SettingError: no such model or family.
      PlanError: no such topology, or too few virtual CPU devices.
    """
    return run_models(options) if options.half is None else run_half(options)


def run_half(options: argparse.Namespace) -> dict[str, Any]:
    """Measure programs of one half.

    Returns:
      The aggregate figures; with the programs if they are for tuning, with errors
      without a name if they judge.

    Raises:
      SettingError: no such family, or the options contradict each other.
    """
    if options.probe and options.early:
        raise SettingError(
            "the probe is XLA's early account, and can't be judged by it",
            where="--early",
            remedy="leave it out; --cache keeps what was compiled for the next time",
        )
    checks.check_at_least(options, jobs=1)
    checks.check_positive(options, "limit", "minutes")
    names = _apart(options) if options.apart else command.chosen(options)
    settings = measuring.Settings(
        options.probe,
        options.early,
        options.cache,
        options.limit,
    )
    calls = [(*name, settings) for name in names]
    rows = command.collect(
        options,
        workers.rows(
            measuring.measure_cached,
            calls,
            command.judging(options),
            options.jobs,
            math.inf if options.minutes is None else options.minutes * MINUTE,
        ),
        len(calls),
        _program_line,
    )
    found = figures.summary(rows)
    print(figures.text(found))
    if command.judging(options):
        if not options.no_history:
            own = options.apart and history.of_apart(options.apart)
            file = own or history.MEMORY
            history.append(file, found, options.arguments)
        return {"figures": found, "errors": command.unnamed(rows)}
    for key in (figures.family, figures.platform):
        for name, group in figures.by(rows, key).items():
            print(f"{name:14} {figures.text(figures.summary(group))}")
    return {"figures": found, "programs": rows}


def _apart(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the names of the programs of a family that is judged apart."""
    checks.check_at_least(options, programs=1, first=0)
    if options.families is not None:
        raise SettingError(
            f"the programs of --{options.apart} are one family",
            where="--families",
            remedy=f"leave it out, or --{options.apart}",
        )
    return apart.names(options.apart, options.half, options.programs, options.first)


def run_models(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile the cases asked for, and print a line for each as it ends.

    Raises:
      SettingError: no such model.
      PlanError: no such topology, or too few virtual CPU devices.
    """
    cases = CASES | MORE
    checks.check_names(options.models, cases, "--models", "model")
    where = [topology(name) for name in options.on]
    virtual_devices()
    devices = {t.name: ahead.devices_for(t) for t in where}

    results: list[dict[str, Any]] = []
    print(HEADER, flush=True)
    for name in options.models:
        for target in where:
            measured = measure(cases[name], target, devices[target.name])
            results.append({"model": name, **measured})
            print(_line(results[-1]), flush=True)
            gc.collect()

    errors = [abs(row["error"]) for row in results if "error" in row]
    if errors:
        unfit = sum(row.get("fits") is False for row in results)
        print(
            f"{len(errors)} cases: median error {statistics.median(errors):.1%}, worst"
            f" {max(errors):.1%}; {unfit} plans do not fit"
        )
    return results


def measure(
    case: Case,
    where: Topology,
    devices: list[Any],
) -> dict[str, Any]:
    """Measure one case.

    Returns:
      The plan, predicted bytes by kind, and XLA's account; `fits` is False where XLA
      refuses the program.
    """
    traced = trace(case.recipe(), case.inputs, case.targets)
    began = time.perf_counter()
    try:
        plan = lepton.plan(traced, where, **case.fixed)
    except PlanError as error:
        return {"topology": where.name, "plan": f"none: {error}"}

    predicted = {
        "topology": where.name,
        "plan": plan.name,
        "mesh": dict(plan.mesh),
        "batch_axes": list(plan.batch_axes),
        "remat": plan.remat,
        "micro_batches": plan.micro_batches,
        "predicted": plan.peak,
        "kinds": dict(plan.bytes_per_device),
    }
    program = Program(traced, plan, ahead.mesh_devices(where, plan.mesh, devices))
    try:
        _, memory = ahead.compile_for(program.lower())
    except ahead.TooLarge as error:
        return predicted | {
            "fits": False,
            "needed": error.needed,
            "seconds": time.perf_counter() - began,
        }
    return predicted | {
        "xla": memory.peak,
        "arguments": memory.arguments,
        "temporaries": memory.temporaries,
        "fits": True,
        "error": plan.peak / memory.peak - 1,
        "seconds": time.perf_counter() - began,
    }


# ---- the table ----

HEADER = (
    f"{'model':12} {'topology':10}  {'plan':44} {'predicted':>10} {'XLA':>10}"
    f" {'error':>7} {'seconds':>8}"
)


def _program_line(row: dict[str, Any]) -> str:
    """Return the line of a program of the tuning half."""
    name = f"{row['family']}:{row['number']}"
    line = f"{name:17} {row.get('topology', '?'):10} {row['outcome']:9}"
    if row["outcome"] in ("no plan", "failed", "late"):
        return f"{line} {row['why'].splitlines()[0][:120]}"

    mesh = "x".join(map(str, row["mesh"].values()))
    line += f" {row['plan'][:30]} {mesh}, {row['remat']}, {row['micro_batches']}p"
    line = f"{line:80} {row['peak'] / 1e9:7.3f} GB"
    if row["bound"] is not None:
        line += f" ({row['bound'] / 1e9:7.3f})"
    line += f" of {row['memory'] / 1e9:.1f}"
    if row["xla"] is not None:
        line += f", XLA {row['xla'] / 1e9:7.3f} GB {row['error']:+7.1%}"
    if row["said"] and not row["fits"]:
        line += " SAID TO FIT"
    return f"{line} {row['planned']:.0f}+{row['seconds']:.0f}+{row['compiling']:.0f} s"


def _line(row: dict[str, Any]) -> str:
    plan = row["plan"]
    if "mesh" in row:
        mesh = "x".join(map(str, row["mesh"].values()))
        plan += f" {mesh}, remat {row['remat']}, {row['micro_batches']} piece(s)"

    figures = ""
    if "predicted" in row:
        figures += f" {row['predicted'] / 1e9:7.3f} GB"
    if "xla" in row:
        figures += f" {row['xla'] / 1e9:7.3f} GB {row['error']:+7.1%}"
    figures += f" {row.get('seconds', 0):8.1f}"
    return f"{row['model']:12} {row['topology']:10}  {plan[:44]:44}{figures}"

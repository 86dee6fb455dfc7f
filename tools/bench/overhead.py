"""What signals and policies cost of a train step.

`tools.bench overhead`. The cases of `tools.bench step`, each trained by `Trainer.fit`
on one device in three ways: without policies ("plain"), with one that watches loss,
gradient norm and finiteness and moves nothing ("signals"), and under
`controllers.adaptive()` ("adaptive"). Slices and rounds are those of `timing.py`.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax.numpy as jnp

from lepton_jax import controllers
from tools.bench import options as checks
from tools.bench.step import CASES, Case, count_parameters, fit, make_trainer
from tools.bench.timing import (
    compilations,
    spread,
    spread_of_ratios,
    steps_of_slice,
    time_in_rounds,
)

WATCHED = ("loss_mean", "loss_variance", "loss_trend", "gradient_norm", "finite")


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `overhead` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "overhead",
        __doc__,
        "what signals and policies cost of a step",
    )
    checks.add_timing(parser, rounds=8, seconds=2.0)
    parser.add_argument(
        "--only",
        nargs="+",
        default=["cnn-128", "lm"],
        metavar="NAME",
        help=f"of {', '.join(CASES)}",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the cases asked for, and print a line for each as it ends.

    Raises:
      SettingError: no such case, or a count or time that can't be.
    """
    checks.check_positive(options, "rounds", "seconds")
    checks.check_names(options.only, CASES, "--only", "case")
    print(
        f"{'case':8}  {'plain ms':>9}  {'signals/plain':>20}  {'adaptive/plain':>20}",
        flush=True,
    )
    results = []
    for name in dict.fromkeys(options.only):
        measured = measure(CASES[name], options.rounds, options.seconds)
        results.append({"case": name, **measured})
        plain = measured["ms_a_step"]["plain"]["median"]
        spreads = "  ".join(
            f"{ratio['median']:6.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})"
            for ratio in measured["to_plain"].values()
        )
        print(f"{name:8}  {plain:9.4g}  {spreads}", flush=True)
    return results


def measure(
    case: Case,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Return milliseconds a step of each contender, and the ratios to the plain one."""
    x, y = case.data()
    watching = controllers.Policy(
        "watching",
        lambda: jnp.int32(0),
        lambda signals, state: ({}, state),
        WATCHED,
    )
    policies = {
        "plain": (),
        "signals": (watching,),
        "adaptive": controllers.adaptive(),
    }
    trainers = {
        name: make_trainer(case, x, y, controller=chain)
        for name, chain in policies.items()
    }
    runs = {name: partial(fit, trainer) for name, trainer in trainers.items()}
    steps = {
        name: steps_of_slice(run, seconds, trainers[name].plan().steps_per_call)
        for name, run in runs.items()
    }
    with compilations() as compiled:
        ms = time_in_rounds(runs, steps, rounds)
    assert not compiled, f"compiled while it was measured: {compiled}"
    return {
        "batch_size": case.batch_size,
        "parameters": count_parameters(trainers["plain"]),
        "ms_a_step": {name: spread(values) for name, values in ms.items()},
        "to_plain": {
            name: spread_of_ratios(ms[name], ms["plain"])
            for name in ("signals", "adaptive")
        },
    }

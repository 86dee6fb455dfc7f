"""What signals and policies cost of a train step.

`tools.bench overhead`. The models of `tools.bench step`, each trained by `Trainer.fit`
on one device in three ways: without policies ("plain"), with one that watches loss,
gradient norm and finiteness and moves nothing ("signals"), and under
`controllers.adaptive()` ("adaptive"). Slices and rounds are those of `timing.py`; all
the slices of a contender are one run.

In the first tenth of a run `adaptive` looks for the learning rate, which costs more.
So the ratio of a run is a tenth of the median of the rounds in its first tenth, and
nine tenths of that of the others.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
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

MODELS = {
    "mlp-128": replace(CASES["mlp-16"], batch_size=128),
    "mlp-16": CASES["mlp-16"],
    "cnn-128": CASES["cnn-128"],
    "lm": CASES["lm"],
}
# share of a run in which `adaptive` looks for the rate; its `until`
LOOKING = 0.1
# calls before the rounds, in which each contender is compiled
WARMING = 2

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
    checks.add_timing(parser, rounds=20, seconds=1.0)
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(MODELS),
        metavar="NAME",
        help=f"of {', '.join(MODELS)}",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the cases asked for, and print a line for each as it ends.

    Raises:
      SettingError: no such case, or a count or time that can't be.
    """
    checks.check_positive(options, "rounds", "seconds")
    checks.check_names(options.only, MODELS, "--only", "model")
    print(
        f"{'case':8}  {'plain ms':>9}  {'signals/plain':>20}  {'adaptive/plain':>20}",
        flush=True,
    )
    results = []
    for name in dict.fromkeys(options.only):
        measured = measure(MODELS[name], options.rounds, options.seconds)
        results.append({"case": name, **measured})
        plain = measured["ms_a_step"]["plain"]["median"]
        spreads = "  ".join(
            f"{ratio['run']:6.3f} ({ratio['min']:.3f}-{ratio['max']:.3f})"
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
    # a run is as long as that of plain steps
    trial = make_trainer(case, x, y)
    steps = steps_of_slice(partial(fit, trial), seconds, _steps_a_call(trial))
    budget = rounds * steps + WARMING * _steps_a_call(trial)
    trainers = {
        name: make_trainer(case, x, y, controller=chain, steps=budget)
        for name, chain in policies.items()
    }
    runs = {name: partial(fit, trainer) for name, trainer in trainers.items()}
    for name, run in runs.items():
        for _ in range(WARMING):
            run(_steps_a_call(trainers[name]))
    with compilations() as compiled:
        ms = time_in_rounds(runs, dict.fromkeys(runs, steps), rounds)
    assert not compiled, f"compiled while it was measured: {compiled}"
    return {
        "batch_size": case.batch_size,
        "parameters": count_parameters(trainers["plain"]),
        "steps_a_slice": steps,
        "ms_a_step": {name: spread(values) for name, values in ms.items()},
        "to_plain": {
            name: _ratios(ms[name], ms["plain"]) for name in ("signals", "adaptive")
        },
    }


def _steps_a_call(trainer: Any) -> int:
    return trainer.plan().steps_per_call


def _ratios(
    values: list[float],
    plain: list[float],
) -> dict[str, Any]:
    """Return the spread of the rounds' ratios, and that of the whole run as "run"."""
    ratios = spread_of_ratios(values, plain)
    rounds = ratios["rounds"]
    first = math.ceil(LOOKING * len(rounds))
    looking = statistics.median(rounds[:first])
    later = statistics.median(rounds[first:] or rounds)
    return ratios | {"run": LOOKING * looking + (1 - LOOKING) * later}

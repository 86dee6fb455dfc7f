"""`tools.bench overhead`: what signals and policies cost of a train step.

The cases of `tools.bench step`, each trained by `Trainer.fit` three times over on one
device: without policies ("plain"), with one that watches loss, gradient norm and
finiteness and moves nothing ("signals"), and under `controllers.adaptive()`
("adaptive"). Rounds and ratios as there: everything compiled before, slices in rotating
order, ratios within a round.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax import controllers
from lepton_jax.errors import SettingError, nearest
from tools.bench.step import (
    CASES,
    Case,
    _fit,
    _rounds,
    _slice,
    _spread,
    _trainer,
    compilations,
)

WATCHED = ("loss_mean", "loss_variance", "loss_trend", "gradient_norm", "finite")


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `overhead` to the subcommands."""
    parser = commands.add_parser(
        "overhead",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help="what signals and policies cost of a step",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=8,
        metavar="N",
        help="rounds a case (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.0,
        metavar="S",
        help="length of a slice (default: %(default)s)",
    )
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
    if options.rounds < 1 or not 0 < options.seconds < 1e6:
        raise SettingError(
            "there is nothing to measure",
            where="--rounds, --seconds",
            remedy="give numbers above 0",
        )
    for name in options.only:
        if name not in CASES:
            raise SettingError(
                f"there is no case {name!r}{nearest(name, CASES)}",
                where="--only",
                remedy=f"the cases are {', '.join(CASES)}",
            )
    print(
        f"{'case':8}  {'plain ms':>9}  {'signals/plain':>20}  {'adaptive/plain':>20}",
        flush=True,
    )
    results = []
    for name in dict.fromkeys(options.only):
        results.append(
            {
                "case": name,
                **measure(
                    CASES[name],
                    options.rounds,
                    options.seconds,
                ),
            }
        )
        spreads = "  ".join(
            f"{s['median']:6.3f} ({s['min']:.3f}-{s['max']:.3f})"
            for s in results[-1]["to_plain"].values()
        )
        print(
            f"{name:8}  {results[-1]['ms_a_step']['plain']['median']:9.4g}  {spreads}",
            flush=True,
        )
    return results


def measure(
    case: Case,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """One case: milliseconds a step of each contender, and the ratios to the plain
    one.
    """
    x, y = case.data()
    watching = controllers.Policy(
        "watching",
        lambda: jnp.int32(0),
        lambda signals, state: ({}, state),
        WATCHED,
    )
    trainers = {
        name: _trainer(case, x, y, controller=policies)
        for name, policies in (
            ("plain", ()),
            ("signals", (watching,)),
            ("adaptive", controllers.adaptive()),
        )
    }
    runs = {name: partial(_fit, trainer) for name, trainer in trainers.items()}
    steps = {
        name: _slice(
            f,
            seconds,
            trainers[name].plan().steps_per_call,
        )
        for name, f in runs.items()
    }
    with compilations() as compiled:
        ms = _rounds(runs, steps, rounds)
    assert not compiled, f"compiled while it was measured: {compiled}"
    return {
        "batch_size": case.batch_size,
        "parameters": sum(
            p.size for p in jax.tree.leaves(trainers["plain"].state.params)
        ),
        "ms_a_step": {name: _spread(values) for name, values in ms.items()},
        "to_plain": {
            name: _spread([a / b for a, b in zip(ms[name], ms["plain"], strict=True)])
            for name in ("signals", "adaptive")
        },
    }

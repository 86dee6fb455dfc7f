"""What a train step of a two-tower recommender costs by the rows of its embedding.

`tools.bench embeddings`. Two-tower models whose users' embedding has 1, 2, 5 and 10
million rows are trained by `Trainer.fit` on one device, on the same batches, but for
the ids, which are drawn from all of the rows. Each optimizer of --optimizers is
measured: "sparse_adam" and "rowwise_adagrad" of `lepton.optimizers`, and "sgd". With
--dense, "adam" on the smallest embedding is measured next to them, which updates all
rows in each step.

The time is milliseconds a step, with slices and rounds as in `timing.py`; a slice is
one `fit`. The memory is what XLA holds beyond its arguments, which are the state and
the batch: `temp_size_in_bytes` plus the outputs that are no donated arguments. Nothing
else may run on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax

import lepton_jax as lepton
from tools.bench import options as checks
from tools.bench.step import NEVER, SEED, fit
from tools.bench.timing import spread, spread_of_ratios, steps_of_slice, time_in_rounds

MILLION = 10**6
ROWS = (1.0, 2.0, 5.0, 10.0)  # millions
# 10 million rows of it take 0.64 GB, and as much again for each moment
DIM = 16
ITEMS = 10_000
BATCH = 1024
SAMPLES = 128 * BATCH
# steps a call of XLA's: slices are a multiple of it
CALL = 32
LEARNING_RATE = 1e-3
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sparse_adam": lepton.optimizers.sparse_adam,
    "rowwise_adagrad": lepton.optimizers.rowwise_adagrad,
    "sgd": optax.sgd,
}
DENSE = "adam"


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `embeddings` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "embeddings",
        __doc__,
        "what a step costs by the rows of an embedding",
    )
    checks.add_timing(parser, rounds=7, seconds=1.0)
    parser.add_argument(
        "--millions",
        nargs="+",
        type=float,
        default=list(ROWS),
        metavar="M",
        help="rows of the users' embedding, in millions (default: 1 2 5 10)",
    )
    parser.add_argument(
        "--optimizers",
        nargs="+",
        default=list(OPTIMIZERS)[:1],
        metavar="NAME",
        help=f"of {', '.join(OPTIMIZERS)} (default: sparse_adam)",
    )
    parser.add_argument(
        "--dense",
        action="store_true",
        help="also measure optax.adam on the smallest embedding",
    )
    parser.add_argument(
        "--dim",
        type=int,
        default=DIM,
        metavar="D",
        help="width of the embeddings (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the optimizers asked for, and print a table for each.

    Raises:
      SettingError: no such optimizer, or a number that can't be.
    """
    checks.check_positive(options, "rounds", "seconds", "dim")
    checks.check_names(options.optimizers, OPTIMIZERS, "--optimizers", "optimizer")
    rows = [round(millions * MILLION) for millions in sorted(options.millions)]
    results = []
    for name in dict.fromkeys(options.optimizers):
        cases = {f"{count:,}": (name, count) for count in rows}
        if options.dense:
            cases[f"{rows[0]:,} {DENSE}"] = (DENSE, rows[0])
        print(f"{name}, {options.dim} columns, batches of {BATCH}", flush=True)
        results += measure(cases, options.dim, options.rounds, options.seconds)
    return results


def measure(
    cases: dict[str, tuple[str, int]],
    dim: int,
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Return time and memory of each case, and the ratio to the first one's time.

    Args:
      cases: optimizer and rows by name.
      dim: width of the embeddings.
      rounds: rounds of all cases.
      seconds: length of a slice.
    """
    trainers = {name: make_trainer(*case, dim) for name, case in cases.items()}
    runs = {name: partial(fit, trainer) for name, trainer in trainers.items()}
    steps = {name: steps_of_slice(run, seconds, CALL) for name, run in runs.items()}
    ms = time_in_rounds(runs, steps, rounds)
    first = next(iter(cases))
    print(f"  {'rows':16}  {'ms a step':>9}  {'to the first':>20}  {'beyond MB':>9}")
    results = []
    for name, (optimizer, count) in cases.items():
        times = spread(ms[name])
        ratio = spread_of_ratios(ms[name], ms[first])
        held = memory(trainers[name])
        span = f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})"
        print(
            f"  {name:16}  {times['median']:9.3f}  {span:>20}"
            f"  {held['beyond'] / MILLION:9.2f}",
            flush=True,
        )
        results.append(
            {
                "optimizer": optimizer,
                "rows": count,
                "dim": dim,
                "ms_a_step": times,
                "to_first": ratio,
                "bytes": held,
            }
        )
    return results


def make_trainer(optimizer: str, rows: int, dim: int) -> lepton.Trainer:
    """Return a trainer of a two-tower model, without evaluations or checkpoints."""
    generator = np.random.default_rng(SEED)
    inputs = {
        "user": generator.integers(0, rows, SAMPLES, dtype=np.int32),
        "item": generator.integers(0, ITEMS, SAMPLES, dtype=np.int32),
    }
    ratings = generator.normal(size=SAMPLES).astype(np.float32)
    recipe = lepton.Recipe(
        model=partial(lepton.models.TwoTower, users=rows, items=ITEMS, dim=dim),
        loss=lepton.losses.squared_error,
        optimizer=optax.adam if optimizer == DENSE else OPTIMIZERS[optimizer],
        learning_rate=LEARNING_RATE,
        train=lepton.data.Arrays(inputs, ratings),
        batch_size=BATCH,
        seed=SEED,
        evaluate_every=NEVER,
        save_every=NEVER,
    )
    return lepton.Trainer(recipe, devices=1)


def memory(trainer: lepton.Trainer) -> dict[str, int]:
    """Return bytes of a step's state and batch, and of what it holds beyond them."""
    program = lepton.Program(trainer.trace, trainer.plan(), jax.devices()[:1])
    held = program.lower().compile().memory_analysis()
    made = held.output_size_in_bytes - held.alias_size_in_bytes
    return {
        "arguments": held.argument_size_in_bytes,
        "beyond": held.temp_size_in_bytes + made,
    }

"""Faults in runs under `adaptive()`, at the start, in the middle and at the end.

`tools.bench faults --half judging`. Some tasks of a half of `tools.bench controller`,
chosen by a seed, are run with each fault in each place, by the same loop:

  nan     the real inputs of one batch are NaN; not for a task whose inputs are integers
  inputs  20 batches of random inputs, 50 times as large as the data's; integers are
          random among the data's
  labels  20 batches whose targets are mixed among their samples
  rate    a person sets a learning rate 1000 times as high while the run goes on

The first place is within the first 20 steps, the last one is the end of the run.
Printed are the share of (task, fault, place) whose final test loss is at most 1.02
times the clean run's (mean of the seeds), the worst of these ratios, and the share of
faulty runs whose journal names the fault: a policy skips, goes back, begins anew or
limits the loss while it lasts or soon after. A false alarm is such a decision in a
clean run; there are three clean runs of each task of the half, 57 or more.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lepton_jax.data import Arrays
from lepton_jax.errors import RecipeError
from tools.bench import controller, history
from tools.bench.controller import Curves, Fault, Problem, Runner, adaptive
from tools.bench.controller_tasks import Task
from tools.bench.tasks import HALVES, TASKS

FAULTS = ("nan", "inputs", "labels", "rate")
PLACES = ("start", "middle", "end")
START = 5  # steps before a fault at the start
BURST = 20  # batches of a fault in inputs or labels
LOUD = 50  # how many times as large the inputs are
HIGHER = 1000.0  # how many times as high a rate a person sets
SOON = 20  # steps after a fault within which the journal has to name it; assumption
CHOSEN = 6  # tasks of a half that get faults
CHOICE_SEED = 0
HISTORY = Path("benchmarks", "judged-faults.jsonl")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the judged part."""
    parser.add_argument(
        "--half",
        choices=list(HALVES),
        help="of the tasks of `controller`: judge `adaptive` on them alone",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="of `controller`, for the clean runs of --half",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs, print the aggregates, and of the tuning half each task's rows."""
    judging = options.half == "judging"
    seeds = range(options.seeds)
    rows: list[dict[str, Any]] = []
    chosen = random.Random(CHOICE_SEED).sample(HALVES[options.half], CHOSEN)
    for name in sorted(chosen):
        own = list(of_task(name, TASKS[name](options.data), seeds))
        rows += own
        if not judging:
            print(_lines(own), flush=True)
    campaign = controller.Campaign(options.data, options.cache, controller.SEEDS)
    clean = false_alarms(campaign, HALVES[options.half])
    summary = {**summarize(rows), **clean}
    print("\n".join(f"{name:12} {_short(value)}" for name, value in summary.items()))
    if judging:
        history.append(HISTORY, summary)
        return {"summary": summary}
    return {"rows": rows, "summary": summary}


# ---- the runs ----


def of_task(name: str, task: Task, seeds: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Yield the results of each fault in each place; none where it is refused."""
    problem = Problem(prepared(task))
    try:
        runner = Runner(problem, adaptive)
    except RecipeError:
        return
    none = [clean_of(problem) for _ in seeds]
    clean = _runs(runner, seeds, none)
    for fault, place in itertools.product(FAULTS, PLACES):
        if fault == "nan" and not _any_real(problem.train[0]):
            continue
        faults = [fault_of(problem, fault, place, seed) for seed in seeds]
        faulty = _runs(runner, seeds, faults)
        first, last = span_of(problem, fault, place)
        named = [any(first <= x < last + SOON for x in own.alarms) for own in faulty]
        yield {
            "task": name,
            "fault": fault,
            "place": place,
            "ratio": _mean_loss(faulty) / _mean_loss(clean),
            "named": statistics.fmean(named),
        }


def _runs(
    runner: Runner, seeds: Iterable[int], faults: Sequence[Fault]
) -> list[Curves]:
    return [
        runner(controller.ARBITRARY, seed, fault)
        for seed, fault in zip(seeds, faults, strict=True)
    ]


def _mean_loss(runs: Sequence[Curves]) -> float:
    """Return the mean of the final test losses, infinite if one is not finite."""
    finals = [run.test[-1] for run in runs]
    return statistics.fmean(x if math.isfinite(x) else math.inf for x in finals)


def prepared(task: Task) -> Task:
    """Return a task whose samples are as the model sees them.

    So a fault is not cut down to a pixel's range.
    """
    preprocess = task.recipe.preprocess
    if preprocess is None:
        return task

    def ready(samples: Arrays) -> Arrays:
        inputs = jax.tree.map(np.asarray, preprocess(samples.inputs))
        return Arrays(inputs, samples.targets)

    recipe = task.recipe.with_(
        train=ready(task.recipe.train), test=ready(task.recipe.test), preprocess=None
    )
    return Task(recipe, ready(task.report))


def span_of(problem: Problem, fault: str, place: str) -> tuple[int, int]:
    """Return the first step of a fault, and the first one after it."""
    steps = int(problem.recipe.steps or 0)
    first = {"start": START, "middle": steps // 2, "end": steps - BURST}[place]
    lasting = {"nan": 1, "rate": steps}.get(fault, BURST)
    return first, min(steps, first + lasting)


def clean_of(problem: Problem) -> Fault:
    """Return the fault that is none."""
    steps = int(problem.recipe.steps or 0)

    def one_batch(samples: Any) -> Any:
        return np.asarray(samples[: problem.recipe.batch_size])[None]

    batch = jax.tree.map(one_batch, problem.train)
    more = jax.tree.map(lambda x: np.repeat(x, BURST, 0), batch)
    return Fault(np.full(steps, -1, np.int32), more, np.ones(steps, np.float32))


def fault_of(problem: Problem, fault: str, place: str, seed: int) -> Fault:
    """Return a fault of one run.

    Args:
      problem: the task, with prepared samples.
      fault: of `FAULTS`.
      place: of `PLACES`.
      seed: of the run, which decides its order, and of the fault.
    """
    clean = clean_of(problem)
    first, last = span_of(problem, fault, place)
    if fault == "rate":
        raised = clean.raised.copy()
        raised[first] = HIGHER
        return clean._replace(raised=raised)

    recipe = problem.recipe
    drawn = np.random.default_rng(1000 + seed)
    orders = controller._orders(recipe, len(recipe.train), seed)
    rows = orders.reshape(-1, recipe.batch_size)[first : first + BURST]
    rows = np.resize(rows, (BURST, recipe.batch_size))
    inputs, targets = jax.tree.map(lambda x: np.asarray(x)[rows], problem.train)
    if fault == "labels":
        targets = _mixed(targets, drawn)
    else:
        inputs = jax.tree.map(lambda x: _wrong_inputs(x, fault, drawn), inputs)
    batches = clean.batches.copy()
    batches[first:last] = np.arange(last - first)
    return Fault(batches, (inputs, targets), clean.raised)


def _mixed(targets: Any, drawn: np.random.Generator) -> Any:
    """Return the targets of batches, mixed among the samples of each."""
    batches, size = jax.tree.leaves(targets)[0].shape[:2]
    orders = drawn.random((batches, size)).argsort(1)
    each = np.arange(batches)[:, None]
    return jax.tree.map(lambda x: x[each, orders], targets)


def _wrong_inputs(x: np.ndarray, fault: str, drawn: np.random.Generator) -> np.ndarray:
    """Return inputs of batches that are NaN, or random and large."""
    if not np.issubdtype(x.dtype, np.floating):
        if fault == "nan":
            return x
        return drawn.integers(0, x.max() + 1, x.shape).astype(x.dtype)
    if fault == "nan":
        return np.full_like(x, np.nan)
    return (LOUD * x.std() * drawn.normal(size=x.shape)).astype(x.dtype)


def _any_real(tree: Any) -> bool:
    return any(np.issubdtype(x.dtype, np.floating) for x in jax.tree.leaves(tree))


def false_alarms(campaign: controller.Campaign, tasks: Sequence[str]) -> dict[str, Any]:
    """Return how many clean runs have a decision that claims a fault, and how many.

    Successive steps with such a decision count once.
    """
    runs: list[Curves] = []
    for task in tasks:
        for seed in campaign.seeds:
            try:
                setting = controller.ARBITRARY
                runs.append(campaign.run(task, "adaptive", setting, seed))
            except RecipeError:
                break
        campaign.forget()
    onsets = [sum(x - 1 not in own.alarms for x in own.alarms) for own in runs]
    return {
        "clean runs": len(runs),
        "runs with false alarms": sum(count > 0 for count in onsets),
        "false alarms": sum(onsets),
    }


# ---- figures ----


def summarize(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return aggregates: of all rows, and by fault and place."""
    groups: dict[str, list[Mapping[str, Any]]] = {"all": list(rows)}
    for row in rows:
        groups.setdefault(row["fault"], []).append(row)
        groups.setdefault(row["place"], []).append(row)
    return {name: _group(own) for name, own in groups.items()}


def _group(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    ratios = [row["ratio"] for row in rows]
    return {
        "cases": len(rows),
        "within": statistics.fmean(x <= controller.TOLERANCE for x in ratios),
        "worst": max(ratios),
        "named": statistics.fmean(row["named"] for row in rows),
    }


def _short(value: Any) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    return (
        f"{value['cases']:3} cases, {value['within']:.0%} within 2 %, worst"
        f" {value['worst']:.4g}, {value['named']:.0%} of the runs named"
    )


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each fault and place of a task."""
    return "\n".join(
        f"{row['task']:22} {row['fault']:7} {row['place']:7} {row['ratio']:7.3f}"
        f"  named {row['named']:.0%}"
        for row in rows
    )

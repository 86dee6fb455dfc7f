"""`bench.py controller`: what a controller is worth when the learning rate is not
known.

Five small tasks on real data, each split into three: training, validation (which tunes
the reference's rate and is all that a contestant sees beside its training batches) and
test (whose loss is reported, and decides nothing). A cell is a task, a factor on the
tuned rate, and a seed, which decides initial parameters, dropout and the order of the
samples; every contestant of a cell begins with the same parameters, sees the same
batches and takes the same number of samples.

  adaptive       the task's optimizer under `controllers.adaptive()`
  constant       the task's optimizer at the cell's rate
  cosine         the same, 10 % linear warm-up to the cell's rate, then a cosine to 0; at factor 1 it is the reference
  plateau        the same, `optax.contrib.reduce_on_plateau` on the means of the training loss between two evaluations
  schedule-free  `optax.contrib.schedule_free_adamw`, 10 % warm-up, evaluated at its averaged parameters
  prodigy        `optax.contrib.prodigy` with its documented schedule (1 to 0, linear); it is never told the rate

The reference of a task is cosine at the rate with the least final validation loss (mean
of the seeds), out of a grid of third-decades; its loss is its mean test loss over the
seeds, and a diverged run counts as infinite.

  within 2 %     share of cells whose final test loss is at most 1.02 times the reference's; "mean of seeds" is the same
                 with the seeds of a task and factor averaged first, since single runs differ by more than 2 %; "same seed"
                 is the share of cells at most 1.02 times the reference's loss from the same seed's start and batches
  mean rank      by final test loss among the contestants of a cell, 1 the best, ties shared; mean over the cells
  steps          at factor 1: the first evaluation at which the test loss is at most the reference's final one of the same
                 seed, over the reference's steps; median over tasks and seeds, never reached counts as infinite
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_controller_tasks import EVALUATIONS, TASKS, Task

import lepton_jax as lepton
from lepton_jax import controllers, losses
from lepton_jax.errors import SettingError, nearest
from lepton_jax.step.module import forward, functional

FACTORS = (
    1 / 30,
    1 / 10,
    1 / 3,
    1.0,
    3.0,
    10.0,
    30.0,
)
# rates among which the reference's is tuned: 1e-4 to 1
GRID = tuple(10.0 ** (k / 3) for k in range(-12, 1))
SEEDS = (0, 1, 2)
TOLERANCE = 1.02
WARM_UP = 0.1
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


# ---- the contestants ----


class Signals(NamedTuple):
    """What a contestant sees beside the gradients: scalars."""

    step: Any
    loss: Any
    # on the validation set, at the last evaluation; NaN before the first
    evaluation_loss: Any
    evaluations: Any


class Served(NamedTuple):
    """What `controllers.select_weights` reads of a state."""

    params: Any
    variables: Any
    controller: Any


class Contestant(NamedTuple):
    """A way to train.

    Attributes:
      init: (params, variables) to its state.
      update: (signals, gradients, (params, variables) before the step, variables after
        its forward pass, state) to (params, variables, state).
      evaluated: (params, variables, state) to the (params, variables) that are
        evaluated.
    """

    init: Callable[[Any, Any], Any]
    update: Callable[..., tuple[Any, Any, Any]]
    evaluated: Callable[[Any, Any, Any], tuple[Any, Any]] = (
        lambda params, variables, state: (params, variables)
    )


def _plain(
    optimizer: optax.GradientTransformation, averaged: bool = False
) -> Contestant:
    """An Optax transformation that takes the loss as `value`; `averaged`: evaluated
    where schedule-free says.
    """
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        signals: Signals,
        gradients: Any,
        before: Any,
        after: Any,
        state: Any,
    ) -> tuple[Any, Any, Any]:
        updates, state = optimizer.update(
            gradients, state, before[0], value=signals.loss
        )
        return optax.apply_updates(before[0], updates), after, state

    contestant = Contestant(
        lambda params, variables: optimizer.init(params),
        update,
    )
    if averaged:
        at = optax.contrib.schedule_free_eval_params
        contestant = contestant._replace(
            evaluated=lambda params, variables, state: (at(state, params), variables),
        )
    return contestant


def adaptive(recipe: lepton.Recipe, rate: Any) -> Contestant:
    assert recipe.steps is not None
    controller = controllers.Controller(recipe.with_(controller=controllers.adaptive()))
    known = {"steps": jnp.float32(recipe.steps)}

    def init(params: Any, variables: Any) -> Any:
        optimizer, state = controller.init(params, variables)
        return optimizer, state._replace(
            base=state.base | {"learning_rate": jnp.asarray(rate, jnp.float32)}
        )

    def update(
        signals: Signals,
        gradients: Any,
        before: Any,
        after: Any,
        state: Any,
    ) -> tuple[Any, Any, Any]:
        params, variables = before
        optimizer, held = state
        news = known | {
            "evaluation_loss": signals.evaluation_loss,
            "evaluations": signals.evaluations,
        }
        held = held._replace(
            fed=held.fed | {name: x for name, x in news.items() if name in held.fed}
        )
        pieces, held, _ = controller.update(
            signals.step,
            held,
            controllers.Pieces(params, variables, optimizer),
            after,
            gradients,
            {"loss": signals.loss},
        )
        return pieces.params, pieces.variables, (pieces.optimizer, held)

    def evaluated(
        params: Any,
        variables: Any,
        state: Any,
    ) -> tuple[Any, Any]:
        return controllers.select_weights(
            Served(
                params,
                variables,
                state[1],
            )
        )

    return Contestant(init, update, evaluated)


def constant(recipe: lepton.Recipe, rate: Any) -> Contestant:
    return _plain(recipe.optimizer(rate))


def cosine(recipe: lepton.Recipe, rate: Any) -> Contestant:
    assert recipe.steps is not None
    shape = optax.warmup_cosine_decay_schedule(
        0.0,
        1.0,
        round(recipe.steps * WARM_UP),
        recipe.steps,
    )
    return _plain(recipe.optimizer(lambda count: rate * shape(count)))


def plateau(recipe: lepton.Recipe, rate: Any) -> Contestant:
    every = recipe.evaluate_every or 1
    reduce = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=3, rtol=1e-3, accumulation_size=every
    )
    return _plain(optax.chain(recipe.optimizer(rate), reduce))


def schedule_free(recipe: lepton.Recipe, rate: Any) -> Contestant:
    assert recipe.steps is not None
    options = recipe.optimizer.keywords
    return _plain(
        optax.contrib.schedule_free_adamw(
            rate, warmup_steps=round(recipe.steps * WARM_UP), **options
        ),
        averaged=True,
    )


def prodigy(recipe: lepton.Recipe, rate: Any) -> Contestant:
    assert recipe.steps is not None
    options = recipe.optimizer.keywords
    schedule = optax.linear_schedule(1.0, 0.0, recipe.steps)
    return _plain(
        optax.contrib.prodigy(
            schedule,
            betas=(0.9, options["b2"]),
            weight_decay=options["weight_decay"],
        )
    )


CONTESTANTS: dict[str, Callable[[lepton.Recipe, Any], Contestant]] = {
    "adaptive": adaptive,
    "constant": constant,
    "cosine": cosine,
    "plateau": plateau,
    "schedule-free": schedule_free,
    "prodigy": prodigy,
}
RATE_FREE = ("prodigy",)  # of which a run is the same, to the bit, at any rate


# ---- a run ----


class Curves(NamedTuple):
    """Losses of one run at its evaluations, the last after the last step."""

    train: list[float]
    validation: list[float]
    test: list[float]


class Runner:
    """Runs of one contestant on one task: one compilation, whatever the rate and the
    seed.

    Attributes:
      program: a digest of the lowered program; equal programs give equal curves from
        equal rates and seeds.
    """

    def __init__(
        self,
        task: Task,
        contestant: Callable[[lepton.Recipe, Any], Contestant],
    ):
        self.recipe = task.recipe
        parts = (
            task.recipe.train,
            task.recipe.test,
            task.report,
        )
        self._data = jax.device_put(
            tuple((part.inputs, part.targets) for part in parts)
        )
        self._lowered = jax.jit(
            _program(
                task.recipe,
                contestant,
                self._data[0][0],
            )
        ).lower(*self._arguments(1.0, 0))
        self.program = hashlib.sha256(
            f"{jax.__version__} {self._lowered.as_text()}".encode()
        ).hexdigest()[:16]
        self._compiled: Any = None

    def __call__(
        self,
        rate: float,
        seed: int,
    ) -> Curves:
        self._compiled = self._compiled or self._lowered.compile()
        return Curves(
            *(
                np.asarray(x, np.float64).tolist()
                for x in self._compiled(*self._arguments(rate, seed))
            )
        )

    def _arguments(
        self,
        rate: float,
        seed: int,
    ) -> tuple[Any, ...]:
        return (
            np.float32(rate),
            np.uint32(seed),
            _orders(
                self.recipe,
                len(self.recipe.train),
                seed,
            ),
            *self._data,
        )


def _program(
    recipe: lepton.Recipe,
    contestant: Callable[[lepton.Recipe, Any], Contestant],
    inputs: Any,
) -> Callable[..., Any]:
    """(rate, seed, orders, train, validation, report) to the curves of a whole run,
    evaluations included.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((recipe.batch_size, *x.shape[1:]), x.dtype),
        inputs,
    )
    shapes = jax.eval_shape(recipe.preprocess, shapes) if recipe.preprocess else shapes
    module = functional(recipe.model, shapes)

    def mean_loss(
        params: Any,
        variables: Any,
        batch: Any,
        key: Any,
        training: bool,
    ) -> Any:
        outputs, variables = forward(
            recipe,
            module,
            params,
            variables,
            batch[0],
            key,
            training,
        )
        total, weight = losses.weighted_sum(
            recipe.loss,
            outputs,
            batch[1],
        )
        return total / weight, variables

    def run(
        rate: Any,
        seed: Any,
        orders: Any,
        train: Any,
        validation: Any,
        report: Any,
    ) -> tuple[Any, Any, Any]:
        method = contestant(recipe, rate)
        params, variables = module.init(jax.random.key(seed))
        key = jax.random.fold_in(jax.random.key(seed), 1)

        def step(carry: Any, indices: Any) -> tuple[Any, Any]:
            params, variables, state, count, evaluated = carry
            batch = jax.tree.map(lambda x: x[indices], train)
            gradient = jax.value_and_grad(
                partial(mean_loss, training=True), has_aux=True
            )
            (loss, after), gradients = gradient(
                params,
                variables,
                batch,
                jax.random.fold_in(key, count),
            )
            signals = Signals(count, loss, *evaluated)
            return (
                *method.update(signals, gradients, (params, variables), after, state),
                count + 1,
                evaluated,
            ), loss

        def window(carry: Any, indices: Any) -> tuple[Any, Any]:
            carry, trained = jax.lax.scan(step, carry, indices)
            at = method.evaluated(*carry[:3])
            validated, tested = (
                mean_loss(*at, part, key, False)[0] for part in (validation, report)
            )
            return (*carry[:4], (validated, carry[4][1] + 1)), (
                trained.mean(),
                validated,
                tested,
            )

        start = (
            params,
            variables,
            method.init(params, variables),
            jnp.int32(0),
            (jnp.float32(jnp.nan), jnp.float32(0)),
        )
        return jax.lax.scan(window, start, orders)[1]

    return run


def _orders(
    recipe: lepton.Recipe,
    samples: int,
    seed: int,
) -> np.ndarray:
    """Samples of every batch, int32 (evaluations, steps between them, batch): a new
    permutation for every epoch.
    """
    assert recipe.steps is not None
    random = np.random.default_rng(seed)
    total = recipe.steps * recipe.batch_size
    order = np.concatenate(
        [random.permutation(samples) for _ in range(math.ceil(total / samples))]
    )[:total]
    return order.astype(np.int32).reshape(
        -1, recipe.evaluate_every or 1, recipe.batch_size
    )


# ---- the campaign ----


class Cell(NamedTuple):
    """One run of the campaign; `program` is the `Runner`'s."""

    task: str
    contestant: str
    rate: str  # to six digits, so that it is found again
    seed: int
    program: str


class Campaign:
    """Runs as they are asked for; those that are in the cache, JSON lines, are not made
    again.

    Args:
      data: folder of the data sets.
      cache: the file; None: nothing is kept.
      seeds: of the runs.
      steps: a run's length, in place of each task's own.

    Raises:
      SettingError: the cache holds something else.
    """

    def __init__(
        self,
        data: Path,
        cache: Path | None,
        seeds: Sequence[int],
        steps: int | None = None,
    ):
        self.data = data
        self.cache = cache
        self.seeds = seeds
        self.steps = steps
        self._tasks: dict[str, Task] = {}
        self._runners: dict[tuple[str, str], Runner] = {}
        self._known: dict[Cell, Curves] = {}
        lines = (
            cache.read_text().splitlines()
            if cache is not None and cache.exists()
            else []
        )
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                self._known[Cell(**row["cell"])] = Curves(**row["curves"])
            except (ValueError, TypeError, KeyError) as error:
                # the last line may have been cut off with the process: its run is made
                # again
                if number < len(lines):
                    raise SettingError(
                        "this is no run that the benchmark kept",
                        where=f"{cache}, line {number}",
                        remedy="remove the line, or name another file with --cache",
                    ) from error

    def run(
        self,
        task: str,
        contestant: str,
        rate: float,
        seed: int,
    ) -> Curves:
        runner = self._runner(task, contestant)
        rate = 1.0 if contestant in RATE_FREE else rate
        cell = Cell(
            task,
            contestant,
            f"{rate:.6g}",
            seed,
            runner.program,
        )
        if cell not in self._known:
            self._known[cell] = runner(float(cell.rate), seed)
            if self.cache is not None:
                with self.cache.open("a") as file:
                    file.write(
                        json.dumps(
                            {
                                "cell": cell._asdict(),
                                "curves": self._known[cell]._asdict(),
                            }
                        )
                        + "\n"
                    )
        return self._known[cell]

    def _runner(
        self,
        task: str,
        contestant: str,
    ) -> Runner:
        if (task, contestant) not in self._runners:
            if task not in self._tasks:
                made = TASKS[task](self.data)
                if self.steps is not None:
                    made = made._replace(recipe=_shortened(made.recipe, self.steps))
                self._tasks[task] = made
            self._runners[task, contestant] = Runner(
                self._tasks[task], CONTESTANTS[contestant]
            )
        return self._runners[task, contestant]

    def reference(self, task: str) -> dict[str, Any]:
        """The tuned cosine: its rate, the validation losses of the grid, and its test
        losses by seed.
        """
        tried = {
            rate: statistics.fmean(
                _final(self.run(task, "cosine", rate, seed).validation)
                for seed in self.seeds
            )
            for rate in GRID
        }
        rate = min(tried, key=tried.__getitem__)
        tests = [
            _final(self.run(task, "cosine", rate, seed).test) for seed in self.seeds
        ]
        return {
            "task": task,
            "rate": rate,
            "loss": statistics.fmean(tests),
            "losses": tests,
            "tuned": {f"{rate:.3g}": loss for rate, loss in tried.items()},
        }

    def cells(
        self,
        reference: Mapping[str, Any],
        factors: Sequence[float],
        contestants: Sequence[str],
    ) -> Iterator[dict[str, Any]]:
        """Each contestant's result in each of a task's cells: loss over the
        reference's, rank, steps.
        """
        for contestant in contestants:  # one after the other, since each compiles
            for factor in factors:
                for number, seed in enumerate(self.seeds):
                    test = self.run(
                        reference["task"], contestant, reference["rate"] * factor, seed
                    ).test
                    goal = reference["losses"][number]
                    reached = next(
                        (k for k, loss in enumerate(test, 1) if loss <= goal), math.inf
                    )
                    yield {
                        "task": reference["task"],
                        "contestant": contestant,
                        "factor": factor,
                        "seed": seed,
                        "loss": _final(test),
                        "ratio": _final(test) / reference["loss"],
                        "paired": _final(test) / goal,
                        "steps": reached / len(test),
                    }


def _shortened(recipe: lepton.Recipe, steps: int) -> lepton.Recipe:
    return recipe.with_(
        steps=steps,
        evaluate_every=math.gcd(steps, max(1, steps // EVALUATIONS)),
    )


def _final(losses: Sequence[float]) -> float:
    return losses[-1] if math.isfinite(losses[-1]) else math.inf


# ---- the command ----


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `controller` to the subcommands."""
    parser = commands.add_parser(
        "controller",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help=(
            "final losses where the learning rate is wrong, against rivals with and"
            " without one"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=list(TASKS),
        metavar="NAME",
        help=f"of {', '.join(TASKS)}",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=list(CONTESTANTS),
        metavar="NAME",
        help=f"of {', '.join(CONTESTANTS)}",
    )
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=list(FACTORS),
        metavar="FACTOR",
        help="of the tuned rate (default: 1/30, 1/10, 1/3, 1, 3, 10, 30)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        default=list(SEEDS),
        metavar="SEED",
        help="default: 0 1 2",
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="of every run, in place of each task's own",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="FOLDER",
        help="holds the data sets (default: %(default)s)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="FILE",
        help="keep every finished run there, and go on from it",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Tune the references, run every cell and print the tables.

    Raises:
      SettingError: no such task or contestant, or a factor, seed or number of steps
        that can't be.
      DataError: a data set is not there.
    """
    for flag, known in (("tasks", TASKS), ("contestants", CONTESTANTS)):
        for name in getattr(options, flag):
            if name not in known:
                raise SettingError(
                    f"there is no {flag[:-1]} {name!r}{nearest(name, known)}",
                    where=f"--{flag}",
                    remedy=f"the {flag} are {', '.join(known)}",
                )
    for flag, usable in (
        ("rates", lambda x: math.isfinite(x) and x > 0),
        ("seeds", lambda x: 0 <= x < 2**32),
    ):
        for value in getattr(options, flag):
            if not usable(value):
                raise SettingError(
                    f"--{flag} has {value:g}",
                    where="command line",
                    remedy="give numbers above 0",
                )
    if options.steps is not None and options.steps < EVALUATIONS:
        raise SettingError(
            f"--steps is {options.steps}",
            where="command line",
            remedy=f"give {EVALUATIONS} or more",
        )
    campaign = Campaign(
        options.data,
        options.cache,
        list(dict.fromkeys(options.seeds)),
        options.steps,
    )
    factors = sorted(set(options.rates))
    contestants = list(dict.fromkeys(options.contestants))
    references = []
    cells = []
    for task in dict.fromkeys(options.tasks):
        references.append(campaign.reference(task))
        print(
            f"{task}: the reference is cosine at {references[-1]['rate']:.3g}, test"
            f" loss {references[-1]['loss']:.4g} ({min(references[-1]['losses']):.4g}"
            f" to {max(references[-1]['losses']):.4g} by seed)",
            flush=True,
        )
        cells += list(
            campaign.cells(
                references[-1],
                factors,
                contestants,
            )
        )
        print(
            _ratios([c for c in cells if c["task"] == task], factors),
            flush=True,
        )
    _rank(cells)
    summary = summarize(cells)
    print(_table(summary))
    return {"references": references, "cells": cells, "summary": summary}


# ---- the tables ----


def _rank(cells: Sequence[dict[str, Any]]) -> None:
    """Add to each result its rank among those of its cell; equal losses share the mean
    of their ranks.
    """
    for cell in cells:
        rivals = [
            c["loss"]
            for c in cells
            if all(c[key] == cell[key] for key in ("task", "factor", "seed"))
        ]
        cell["rank"] = (
            sum(x < cell["loss"] for x in rivals)
            + (sum(x == cell["loss"] for x in rivals) + 1) / 2
        )


def summarize(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a contestant, the best mean rank first."""
    rows = []
    for name in dict.fromkeys(c["contestant"] for c in cells):
        own = [c for c in cells if c["contestant"] == name]
        means: dict[tuple[str, float], list[float]] = {}
        for c in own:
            means.setdefault((c["task"], c["factor"]), []).append(c["ratio"])
        worst = sorted(own, key=lambda c: -c["ratio"])[:3]
        rows.append(
            {
                "contestant": name,
                "cells": len(own),
                "within": statistics.fmean(c["ratio"] <= TOLERANCE for c in own),
                "within_by_mean": statistics.fmean(
                    statistics.fmean(r) <= TOLERANCE for r in means.values()
                ),
                "within_by_seed": statistics.fmean(
                    c["paired"] <= TOLERANCE for c in own
                ),
                "rank": statistics.fmean(c["rank"] for c in own),
                "steps": statistics.median(
                    [c["steps"] for c in own if c["factor"] == 1] or [math.inf]
                ),
                "worst": [
                    {key: c[key] for key in ("task", "factor", "seed", "ratio")}
                    for c in worst
                ],
            }
        )
    return sorted(rows, key=lambda r: r["rank"])


def _ratios(cells: Sequence[Mapping[str, Any]], factors: Sequence[float]) -> str:
    """Test loss over the reference's, mean of the seeds, by contestant and factor."""
    lines = [
        f"  {'loss / reference':16}"
        + "".join(f"{f'x {factor:.3g}':>10}" for factor in factors)
    ]
    for name in dict.fromkeys(c["contestant"] for c in cells):
        means = [
            statistics.fmean(
                c["ratio"] for c in cells if (c["contestant"], c["factor"]) == (name, f)
            )
            for f in factors
        ]
        lines.append(
            f"  {name:16}"
            + "".join(
                f"{mean:10.3f}" if mean < 1000 else f"{'>1000':>10}" for mean in means
            )
        )
    return "\n".join(lines)


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'contestant':16} {'cells':>5} {'within 2 %':>10} {'mean of seeds':>13}"
        f" {'same seed':>9} {'mean rank':>9} {'steps':>6}  worst"
    ]
    for r in summary:
        worst = ", ".join(
            f"{c['task']} x {c['factor']:.3g} seed {c['seed']}: {c['ratio']:.3g}"
            for c in r["worst"]
        )
        lines.append(
            f"{r['contestant']:16} {r['cells']:5} {r['within']:10.1%}"
            f" {r['within_by_mean']:13.1%} {r['within_by_seed']:9.1%} {r['rank']:9.2f}"
            f" {r['steps']:6.3g}  {worst}"
        )
    return "\n".join(lines)

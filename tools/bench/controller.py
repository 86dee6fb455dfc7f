"""What a controller is worth when the learning rate is not known.

`tools.bench controller`. Five small tasks on real data, each split into three:
training; validation, which tunes the reference's rate and is all that a contestant sees
next to its training batches; and test, whose loss is reported and decides nothing. A
cell is a task, a factor on the tuned rate, and a seed, which decides initial
parameters, dropout and the order of the samples. Every contestant of a cell begins with
the same parameters, sees the same batches and takes the same number of samples.

  adaptive       the task's optimizer under `controllers.adaptive()`
  constant       the task's optimizer at the cell's rate
  cosine         the same, 10 % linear warm-up to the cell's rate, then a cosine to 0;
                 at factor 1 it is the reference
  plateau        the same, `optax.contrib.reduce_on_plateau` on the means of the
                 training loss between two evaluations
  schedule-free  `optax.contrib.schedule_free_adamw`, 10 % warm-up, evaluated at its
                 averaged parameters
  prodigy        `optax.contrib.prodigy` with its documented schedule (1 to 0, linear);
                 it is never told the rate

The reference of a task is cosine at the rate with the least final validation loss (mean
of the seeds), out of a grid of third-decades. Its loss is its mean test loss over the
seeds. A diverged run counts as infinite.

  within 2 %     share of cells whose final test loss is at most 1.02 times the
                 reference's; "mean of seeds" is the same with the seeds of a task and
                 factor averaged first, since single runs differ by more than 2 %;
                 "same seed" is the share of cells at most 1.02 times the reference's
                 loss from the same seed's start and batches
  mean rank      by final test loss among the contestants of a cell, 1 the best, ties
                 shared; mean over the cells
  steps          at factor 1: the first evaluation at which the test loss is at most the
                 reference's final one of the same seed, divided by the reference's
                 steps; median over tasks and seeds, never reached counts as infinite
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
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

import lepton_jax as lepton
from lepton_jax import controllers, losses
from lepton_jax.errors import SettingError
from lepton_jax.step.module import forward, functional
from tools.bench import options as checks
from tools.bench.controller_tasks import EVALUATIONS, TASKS, Task

# On the tuned rate.
FACTORS = (
    1 / 30,
    1 / 10,
    1 / 3,
    1.0,
    3.0,
    10.0,
    30.0,
)
# Rates among which the reference's is tuned: 1e-4 to 1.
GRID = tuple(10.0 ** (k / 3) for k in range(-12, 1))
SEEDS = (0, 1, 2)
TOLERANCE = 1.02  # of the reference's loss
WARM_UP = 0.1  # of the steps, for those contestants that have one
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
WORST = 3  # cells of a contestant that the table names


# ---- the contestants ----


class Signals(NamedTuple):
    """Scalars that a contestant sees in addition to the gradients.

    Attributes:
      step: from 0.
      loss: of the batch.
      evaluation_loss: on the validation set, at the last evaluation; NaN before.
      evaluations: so far.
    """

    step: Any
    loss: Any
    evaluation_loss: Any
    evaluations: Any


class Served(NamedTuple):
    """The part of a state that `controllers.select_weights` reads."""

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
    """Return an Optax transformation as a contestant; it gets the loss as `value`.

    Args:
      optimizer: the transformation.
      averaged: whether it is evaluated at schedule-free's averages.
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

    def init(params: Any, variables: Any) -> Any:
        return optimizer.init(params)

    def at_averages(
        params: Any,
        variables: Any,
        state: Any,
    ) -> tuple[Any, Any]:
        return optax.contrib.schedule_free_eval_params(state, params), variables

    contestant = Contestant(init, update)
    return contestant._replace(evaluated=at_averages) if averaged else contestant


def adaptive(
    recipe: lepton.Recipe,
    rate: Any,
) -> Contestant:
    """The task's optimizer under `controllers.adaptive()`."""
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
        pieces = controllers.Pieces(params, variables, optimizer)
        held = held._replace(fed=_fed(held.fed, known, signals))
        pieces, held, _ = controller.update(
            signals.step, held, pieces, after, gradients, {"loss": signals.loss}
        )
        return pieces.params, pieces.variables, (pieces.optimizer, held)

    def evaluated(
        params: Any,
        variables: Any,
        state: Any,
    ) -> tuple[Any, Any]:
        return controllers.select_weights(Served(params, variables, state[1]))

    return Contestant(init, update, evaluated)


def _fed(
    fed: Mapping[str, Any], known: Mapping[str, Any], signals: Signals
) -> dict[str, Any]:
    """Return the values that a host feeds to a controller, brought up to date."""
    news = {
        **known,
        "evaluation_loss": signals.evaluation_loss,
        "evaluations": signals.evaluations,
    }
    return {name: news.get(name, value) for name, value in fed.items()}


def constant(
    recipe: lepton.Recipe,
    rate: Any,
) -> Contestant:
    """The task's optimizer at the cell's rate."""
    return _plain(recipe.optimizer(rate))


def cosine(
    recipe: lepton.Recipe,
    rate: Any,
) -> Contestant:
    """Linear warm-up to the cell's rate, then a cosine to 0."""
    assert recipe.steps is not None
    warm_up = round(recipe.steps * WARM_UP)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm_up, recipe.steps)
    return _plain(recipe.optimizer(lambda count: rate * shape(count)))


def plateau(
    recipe: lepton.Recipe,
    rate: Any,
) -> Contestant:
    """Optax's reduction on a plateau, on means of the training loss."""
    every = recipe.evaluate_every or 1
    reduce = optax.contrib.reduce_on_plateau(
        factor=0.5, patience=3, rtol=1e-3, accumulation_size=every
    )
    return _plain(optax.chain(recipe.optimizer(rate), reduce))


def schedule_free(
    recipe: lepton.Recipe,
    rate: Any,
) -> Contestant:
    """Schedule-free AdamW with a warm-up, evaluated at its averages."""
    assert recipe.steps is not None
    optimizer = optax.contrib.schedule_free_adamw(
        rate,
        warmup_steps=round(recipe.steps * WARM_UP),
        **recipe.optimizer.keywords,
    )
    return _plain(optimizer, averaged=True)


def prodigy(
    recipe: lepton.Recipe,
    rate: Any,
) -> Contestant:
    """Prodigy with its documented schedule; the cell's rate is not used."""
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
# Contestants whose runs are the same, to the bit, at any rate.
RATE_FREE = ("prodigy",)


# ---- a run ----


class Curves(NamedTuple):
    """Losses of one run at its evaluations, the last after the last step."""

    train: list[float]
    validation: list[float]
    test: list[float]


class Runner:
    """Runs of one contestant on one task.

    There is one compilation, whatever the rate and the seed.

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
        parts = [(x.inputs, x.targets) for x in (self.recipe.train, self.recipe.test)]
        parts.append((task.report.inputs, task.report.targets))
        self._data = jax.device_put(tuple(parts))

        inputs = self._data[0][0]
        program = jax.jit(_program(task.recipe, contestant, inputs))
        self._lowered = program.lower(*self._arguments(1.0, 0))
        text = f"{jax.__version__} {self._lowered.as_text()}"
        self.program = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._compiled: Any = None

    def __call__(
        self,
        rate: float,
        seed: int,
    ) -> Curves:
        """Train once."""
        self._compiled = self._compiled or self._lowered.compile()
        curves = self._compiled(*self._arguments(rate, seed))
        return Curves(*(np.asarray(x, np.float64).tolist() for x in curves))

    def _arguments(
        self,
        rate: float,
        seed: int,
    ) -> tuple[Any, ...]:
        orders = _orders(self.recipe, len(self.recipe.train), seed)
        return (np.float32(rate), np.uint32(seed), orders, *self._data)


def _program(
    recipe: lepton.Recipe,
    contestant: Callable[[lepton.Recipe, Any], Contestant],
    inputs: Any,
) -> Callable[..., Any]:
    """Return a function of a whole run, evaluations included.

    It takes (rate, seed, orders, train, validation, report), and returns the curves.
    """
    module = functional(recipe.model, _batch_shapes(recipe, inputs))
    mean_loss = _mean_loss(recipe, module)

    def run(
        rate: Any, seed: Any, orders: Any, train: Any, validation: Any, report: Any
    ) -> tuple[Any, Any, Any]:
        method = contestant(recipe, rate)
        params, variables = module.init(jax.random.key(seed))
        key = jax.random.fold_in(jax.random.key(seed), 1)
        step = _step(method, mean_loss, train, key)

        def window(
            carry: Any,
            indices: Any,
        ) -> tuple[Any, Any]:
            """Train up to an evaluation, and evaluate."""
            carry, trained = jax.lax.scan(step, carry, indices)
            at = method.evaluated(*carry[:3])
            validated = mean_loss(*at, validation, key, False)[0]
            tested = mean_loss(*at, report, key, False)[0]
            evaluated = (validated, carry[4][1] + 1)
            return (*carry[:4], evaluated), (trained.mean(), validated, tested)

        start = (
            params,
            variables,
            method.init(params, variables),
            jnp.int32(0),
            (jnp.float32(jnp.nan), jnp.float32(0)),
        )
        return jax.lax.scan(window, start, orders)[1]

    return run


def _batch_shapes(
    recipe: lepton.Recipe,
    inputs: Any,
) -> Any:
    """Return the shapes of a batch, as the model sees it."""

    def batched(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((recipe.batch_size, *x.shape[1:]), x.dtype)

    shapes = jax.tree.map(batched, inputs)
    return jax.eval_shape(recipe.preprocess, shapes) if recipe.preprocess else shapes


def _mean_loss(
    recipe: lepton.Recipe,
    module: Any,
) -> Callable[..., Any]:
    def mean_loss(
        params: Any, variables: Any, batch: Any, key: Any, training: bool
    ) -> Any:
        outputs, variables = forward(
            recipe, module, params, variables, batch[0], key, training
        )
        total, weight = losses.weighted_sum(recipe.loss, outputs, batch[1])
        return total / weight, variables

    return mean_loss


def _step(
    method: Contestant, mean_loss: Callable[..., Any], train: Any, key: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return one train step, as the body of a scan over the samples' indices."""
    training_loss = partial(mean_loss, training=True)
    gradient = jax.value_and_grad(training_loss, has_aux=True)

    def step(
        carry: Any,
        indices: Any,
    ) -> tuple[Any, Any]:
        params, variables, state, count, evaluated = carry
        batch = jax.tree.map(lambda x: x[indices], train)
        (loss, after), gradients = gradient(
            params, variables, batch, jax.random.fold_in(key, count)
        )
        signals = Signals(count, loss, *evaluated)
        before = (params, variables)
        updated = method.update(
            signals,
            gradients,
            before,
            after,
            state,
        )
        return (*updated, count + 1, evaluated), loss

    return step


def _orders(
    recipe: lepton.Recipe,
    samples: int,
    seed: int,
) -> np.ndarray:
    """Return the samples of every batch: a new permutation for every epoch.

    Returns:
      int32 (evaluations, steps between them, batch).
    """
    assert recipe.steps is not None
    random = np.random.default_rng(seed)
    total = recipe.steps * recipe.batch_size
    epochs = math.ceil(total / samples)
    order = np.concatenate([random.permutation(samples) for _ in range(epochs)])
    shape = (-1, recipe.evaluate_every or 1, recipe.batch_size)
    return order[:total].astype(np.int32).reshape(shape)


# ---- the campaign ----


class Cell(NamedTuple):
    """One run of the campaign; `program` is the `Runner`'s."""

    task: str
    contestant: str
    rate: str  # to six digits, so that it is found again
    seed: int
    program: str


class Campaign:
    """Runs, each made once.

    Args:
      data: folder of the data sets.
      cache: a file of JSON lines with the runs that were made; None: nothing is kept.
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
        if cache is not None and cache.exists():
            self._read(cache)

    def run(
        self,
        task: str,
        contestant: str,
        rate: float,
        seed: int,
    ) -> Curves:
        """Return the curves of a run, from the cache if it is there."""
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
            self._keep(cell)
        return self._known[cell]

    def _read(self, cache: Path) -> None:
        lines = cache.read_text().splitlines()
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

    def _keep(self, cell: Cell) -> None:
        if self.cache is None:
            return
        row = {"cell": cell._asdict(), "curves": self._known[cell]._asdict()}
        with self.cache.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _task(self, name: str) -> Task:
        if name not in self._tasks:
            task = TASKS[name](self.data)
            if self.steps is not None:
                task = task._replace(recipe=_shortened(task.recipe, self.steps))
            self._tasks[name] = task
        return self._tasks[name]

    def _runner(
        self,
        task: str,
        contestant: str,
    ) -> Runner:
        key = (task, contestant)
        if key not in self._runners:
            self._runners[key] = Runner(self._task(task), CONTESTANTS[contestant])
        return self._runners[key]

    def reference(self, task: str) -> dict[str, Any]:
        """Return the tuned cosine of a task.

        Returns:
          Its rate, the validation losses of the grid, and its test losses by seed.
        """
        tuned = {rate: self._validation_loss(task, rate) for rate in GRID}
        rate = min(tuned, key=tuned.__getitem__)
        tests = [
            _final(self.run(task, "cosine", rate, seed).test) for seed in self.seeds
        ]
        return {
            "task": task,
            "rate": rate,
            "loss": statistics.fmean(tests),
            "losses": tests,
            "tuned": {f"{rate:.3g}": loss for rate, loss in tuned.items()},
        }

    def _validation_loss(
        self,
        task: str,
        rate: float,
    ) -> float:
        runs = [self.run(task, "cosine", rate, seed) for seed in self.seeds]
        return statistics.fmean(_final(curves.validation) for curves in runs)

    def cells(
        self,
        reference: Mapping[str, Any],
        factors: Sequence[float],
        contestants: Sequence[str],
    ) -> Iterator[dict[str, Any]]:
        """Yield each contestant's result in each of a task's cells."""
        # one contestant after the other, since each compiles
        cells = itertools.product(contestants, factors, enumerate(self.seeds))
        for contestant, factor, (number, seed) in cells:
            rate = reference["rate"] * factor
            test = self.run(reference["task"], contestant, rate, seed).test
            goal = reference["losses"][number]
            yield {
                "task": reference["task"],
                "contestant": contestant,
                "factor": factor,
                "seed": seed,
                "loss": _final(test),
                "ratio": _final(test) / reference["loss"],
                "paired": _final(test) / goal,
                "steps": _first_at_most(goal, test) / len(test),
            }


def _first_at_most(
    goal: float,
    losses: Sequence[float],
) -> float:
    """Return the number of the first loss that reaches a goal; infinity if none."""
    for number, loss in enumerate(losses, 1):
        if loss <= goal:
            return number
    return math.inf


def _shortened(
    recipe: lepton.Recipe,
    steps: int,
) -> lepton.Recipe:
    return recipe.with_(
        steps=steps,
        evaluate_every=math.gcd(steps, max(1, steps // EVALUATIONS)),
    )


def _final(losses: Sequence[float]) -> float:
    return losses[-1] if math.isfinite(losses[-1]) else math.inf


# ---- the command ----


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `controller` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "controller",
        __doc__,
        "final losses where the learning rate is wrong, against rivals with and"
        " without one",
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
    _check(options)
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
        reference = campaign.reference(task)
        least = min(reference["losses"])
        most = max(reference["losses"])
        print(
            f"{task}: the reference is cosine at {reference['rate']:.3g}, test loss"
            f" {reference['loss']:.4g} ({least:.4g} to {most:.4g} by seed)",
            flush=True,
        )
        own = list(campaign.cells(reference, factors, contestants))
        print(_ratios(own, factors), flush=True)
        references.append(reference)
        cells += own
    _rank(cells)
    summary = summarize(cells)
    print(_table(summary))
    return {"references": references, "cells": cells, "summary": summary}


def _check(options: argparse.Namespace) -> None:
    """Raise a SettingError for options that can't be."""
    checks.check_names(options.tasks, TASKS, "--tasks", "task")
    checks.check_names(options.contestants, CONTESTANTS, "--contestants", "contestant")
    unusable = [
        ("rates", rate)
        for rate in options.rates
        if not (math.isfinite(rate) and rate > 0)
    ]
    unusable += [("seeds", seed) for seed in options.seeds if not 0 <= seed < 2**32]
    for flag, value in unusable:
        raise SettingError(
            f"--{flag} has {value:g}",
            where="command line",
            remedy="give numbers above 0",
        )
    if options.steps is not None:
        checks.check_at_least(options, steps=EVALUATIONS)


# ---- the tables ----


def _rank(cells: Sequence[dict[str, Any]]) -> None:
    """Add to each result its rank among those of its cell.

    Equal losses share the mean of their ranks.
    """
    by_cell: dict[tuple, list[float]] = {}
    for cell in cells:
        by_cell.setdefault(_key(cell), []).append(cell["loss"])
    for cell in cells:
        rivals = by_cell[_key(cell)]
        better = sum(loss < cell["loss"] for loss in rivals)
        equal = sum(loss == cell["loss"] for loss in rivals)
        cell["rank"] = better + (equal + 1) / 2


def _key(cell: Mapping[str, Any]) -> tuple:
    return cell["task"], cell["factor"], cell["seed"]


def summarize(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a contestant, the best mean rank first."""
    by_contestant: dict[str, list[Mapping[str, Any]]] = {}
    for cell in cells:
        by_contestant.setdefault(cell["contestant"], []).append(cell)
    rows = [_summary(name, own) for name, own in by_contestant.items()]
    return sorted(rows, key=lambda row: row["rank"])


def _summary(
    name: str,
    cells: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the row of one contestant."""
    by_factor: dict[tuple[str, float], list[float]] = {}
    for cell in cells:
        by_factor.setdefault((cell["task"], cell["factor"]), []).append(cell["ratio"])
    means = [statistics.fmean(ratios) for ratios in by_factor.values()]
    steps = [cell["steps"] for cell in cells if cell["factor"] == 1]
    worst = sorted(cells, key=lambda cell: -cell["ratio"])[:WORST]
    shown = ("task", "factor", "seed", "ratio")
    return {
        "contestant": name,
        "cells": len(cells),
        "within": statistics.fmean(cell["ratio"] <= TOLERANCE for cell in cells),
        "within_by_mean": statistics.fmean(mean <= TOLERANCE for mean in means),
        "within_by_seed": statistics.fmean(
            cell["paired"] <= TOLERANCE for cell in cells
        ),
        "rank": statistics.fmean(cell["rank"] for cell in cells),
        "steps": statistics.median(steps or [math.inf]),
        "worst": [{key: cell[key] for key in shown} for cell in worst],
    }


def _ratios(
    cells: Sequence[Mapping[str, Any]],
    factors: Sequence[float],
) -> str:
    """Return a table: test loss divided by the reference's, means of the seeds."""
    titles = "".join(f"{f'x {factor:.3g}':>10}" for factor in factors)
    lines = [f"  {'loss / reference':16}{titles}"]
    for name in dict.fromkeys(cell["contestant"] for cell in cells):
        own = [cell for cell in cells if cell["contestant"] == name]
        figures = ""
        for factor in factors:
            ratios = [cell["ratio"] for cell in own if cell["factor"] == factor]
            mean = statistics.fmean(ratios)
            figures += f"{mean:10.3f}" if mean < 1000 else f"{'>1000':>10}"
        lines.append(f"  {name:16}{figures}")
    return "\n".join(lines)


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'contestant':16} {'cells':>5} {'within 2 %':>10} {'mean of seeds':>13}"
        f" {'same seed':>9} {'mean rank':>9} {'steps':>6}  worst"
    ]
    for row in summary:
        worst = ", ".join(
            f"{cell['task']} x {cell['factor']:.3g} seed {cell['seed']}:"
            f" {cell['ratio']:.3g}"
            for cell in row["worst"]
        )
        lines.append(
            f"{row['contestant']:16} {row['cells']:5} {row['within']:10.1%}"
            f" {row['within_by_mean']:13.1%} {row['within_by_seed']:9.1%}"
            f" {row['rank']:9.2f} {row['steps']:6.3g}  {worst}"
        )
    return "\n".join(lines)

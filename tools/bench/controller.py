"""What a controller that needs no learning rate is worth on tasks nobody looked at.

`tools.bench controller --half judging`. The tasks are small ones of many kinds
(tools/bench/tasks), split by a seed into two halves. Rules and constants of the
controller are found on the tuning half; the judging half decides, and prints aggregate
figures alone, which are appended to benchmarks/judged-controller.jsonl.

The samples of a task are split into three: training; validation, which tunes the
rivals and is all that a contestant sees next to its training batches; and test, whose
loss is reported and decides nothing. A seed decides initial parameters, dropout and the
order of the samples: every contestant begins with the same parameters, sees the same
batches and takes the same number of steps.

  adaptive       the task's optimizer under `controllers.adaptive()`
  cosine         the reference: the task's optimizer, 10 % linear warm-up to its rate,
                 then a cosine to 0
  constant       the task's optimizer at its rate
  plateau        the same, `optax.contrib.reduce_on_plateau` on the means of the
                 training loss between two evaluations
  schedule-free  `optax.contrib.schedule_free_adamw`, or `schedule_free` around another
                 optimizer, 10 % warm-up, evaluated at its averaged parameters
  prodigy        `optax.contrib.prodigy` with its documented schedule (1 to 0, linear)

Each rival is tuned for itself on each task, by the final validation loss (mean of the
seeds): its rate, among third-decades until both neighbours of the best one are known;
of Prodigy the factor of its estimate, among 0.1, 0.3, 1, 3 and 10. A diverged run
counts as infinite, and so does one that the controller refuses.

  ratio          final test loss divided by the reference's, both means of the seeds
  within 2 %     share of tasks whose ratio is at most 1.02
  mean rank      by final test loss (mean of the seeds) among the contestants of a task,
                 1 the best, ties shared; mean over the tasks
  steps          the first evaluation at which the test loss is at most the reference's
                 final one of the same seed, divided by the reference's steps; median
                 over tasks and seeds, never reached counts as infinite
  noticed        how many of the tasks with a ratio above 1.02, "outside", were noticed
                 in each seed: said by a policy or at the end of the run, or refused;
                 "needless" are those with a lower ratio on which the same was said
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax import losses
from lepton_jax.controller.signals import INPUTS, input_rms
from lepton_jax.errors import RecipeError, SettingError
from lepton_jax.step.module import functional
from lepton_jax.step.training_loss import training_loss
from lepton_jax.train.notices import found_at_the_end
from tools.bench import controller_rivals, history
from tools.bench import options as checks
from tools.bench.controller_contestant import (
    Contestant,
    Driven,
    Maker,
    Signals,
    adaptive,
    controlled,
    has_halted,
    sent_back,
)
from tools.bench.controller_rivals import REFERENCE, RIVALS, tuned
from tools.bench.controller_tasks import Task
from tools.bench.tasks import HALVES, TASKS, source

__all__ = ["Campaign", "Runner", "Task", "adaptive", "controlled", "measure"]

CONTESTANTS: dict[str, Maker] = {"adaptive": adaptive, **RIVALS}
SEEDS = (0, 1, 2)
TOLERANCE = 1.02  # of the reference's loss
ARBITRARY = 1.0  # the base rate of `adaptive`, which cancels
# Halves the time that a program takes to compile; measured on three tasks (digits: 2.7
# to 1.9 s, under `adaptive` 5.6 to 4.2 s), whose runs take as long as without. JAX 0.12
# has no such option.
QUICKLY: dict[str, str | bool] = {}
if jax.__version_info__ < (0, 12):
    QUICKLY["xla_cpu_use_fusion_emitters"] = False
HISTORY = Path("benchmarks", "judged-controller.jsonl")


def _data() -> Path:
    """Return the nearest folder shared/data around the repository."""
    parents = Path(__file__).resolve().parents[3:]
    folders = [parent / "shared" / "data" for parent in parents]
    return next((folder for folder in folders if folder.is_dir()), folders[0])


DATA = _data()


# ---- a run ----


class Curves(NamedTuple):
    """One run.

    Attributes:
      train: means of the training loss between two evaluations.
      validation: losses at the evaluations, the last after the last step.
      test: likewise.
      noticed: 1 if the run was told not to be good, by a policy or at its end; else 0.
      alarms: the steps, from 0, in which it says that something is wrong.
    """

    train: list[float]
    validation: list[float]
    test: list[float]
    noticed: float
    alarms: list[int]


class Fault(NamedTuple):
    """A fault in a run; steps are counted from 0, over all evaluations.

    Attributes:
      batches: number of each step's batch among the faulty ones, int32 (steps,); -1:
        its batch is clean.
      faulty: inputs and targets, (faulty batches, batch, ...).
      raised: factors of the learning rate's base before each step, float32 (steps,).
    """

    batches: Any
    faulty: Any
    raised: Any

    def window(self, number: int, steps: int) -> Fault:
        """Return the part between two evaluations."""
        own = slice(number * steps, (number + 1) * steps)
        return self._replace(batches=self.batches[own], raised=self.raised[own])


class _Quick:
    """A function that is compiled for each shapes of arguments, without long thought.

    Args:
      function: what is compiled.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = jax.jit(function)
        self._programs: dict[Any, Any] = {}

    def __call__(self, *arguments: Any) -> Any:
        """Call the function."""
        leaves, tree = jax.tree.flatten(arguments)
        key = (tree, tuple((np.shape(leaf), leaf.dtype) for leaf in leaves))
        if key not in self._programs:
            lowered = self._function.lower(*arguments)
            self._programs[key] = lowered.compile(compiler_options=QUICKLY)
        return self._programs[key](*arguments)


class Problem:
    """A task with what all its contestants share: its data and compiled programs.

    Args:
      task: the task.

    Attributes:
      recipe: the task's.
      module: the model as pure functions.
      train: training samples on the device, (inputs, targets).
      validation: validation samples.
      report: test samples.
      start: seed to (params, variables), compiled.
      mean_loss: (params, variables, samples) to the loss of an evaluation, compiled.
    """

    def __init__(self, task: Task):
        self.recipe = task.recipe
        parts = [task.recipe.train, task.recipe.test, task.report]
        pairs = [(part.inputs, part.targets) for part in parts]
        self.train, self.validation, self.report = jax.device_put(pairs)
        shapes = _batch_shapes(task.recipe, self.train[0])
        self.module = functional(task.recipe.model, shapes)
        self.start = _Quick(lambda seed: self.module.init(jax.random.key(seed)))
        self.mean_loss = _Quick(_mean_loss(task.recipe, self.module))

    @cached_property
    def digest(self) -> str:
        """A digest of the data and of the recipe's numbers."""
        recipe = self.recipe
        optimizer = getattr(recipe.optimizer, "keywords", {})
        numbers = f"{recipe.steps} {recipe.batch_size} {optimizer}"
        digest = hashlib.sha256(numbers.encode())
        for leaf in jax.tree.leaves((self.train, self.validation, self.report)):
            digest.update(np.asarray(leaf).tobytes())
        return digest.hexdigest()


class Runner:
    """Runs of one contestant on one task.

    There is one compilation, whatever the setting and the seed.

    Args:
      task: the task, or its `Problem`.
      contestant: a function of (recipe, setting).

    Raises:
      RecipeError: the contestant refuses the task.
    """

    def __init__(self, task: Task | Problem, contestant: Maker):
        self.problem = task if isinstance(task, Problem) else Problem(task)
        self.contestant = contestant
        recipe = self.problem.recipe
        self._limits = contestant(recipe, ARBITRARY).limits
        self._begin = jax.jit(
            lambda setting, *pieces: contestant(recipe, setting).init(*pieces)
        )
        self._window = jax.jit(partial(_window, self.problem, contestant))
        self._programs: dict[bool, Any] = {}

    @cached_property
    def program(self) -> str:
        """A digest of programs and data: equal ones give equal curves."""
        first = self._first(ARBITRARY, 0)
        begin = self._begin.lower(np.float32(ARBITRARY), *first[:2])
        digest = hashlib.sha256(jax.__version__.encode())
        digest.update(begin.as_text().encode())
        digest.update(self._lowered(first, None).as_text().encode())
        digest.update(self.problem.digest.encode())
        return digest.hexdigest()[:16]

    def _first(self, setting: float, seed: int) -> Any:
        """Return what goes from step to step, before the first one."""
        pieces = self.problem.start(np.uint32(seed))
        state = self._begin(np.float32(setting), *pieces)
        none = (np.float32(np.nan), np.float32(0))
        return (*pieces, state, np.int32(0), none)

    def _lowered(self, first: Any, fault: Fault | None) -> Any:
        orders = _orders(self.problem.recipe, len(self.problem.recipe.train), 0)
        arguments = (np.float32(ARBITRARY), np.uint32(0), orders[0])
        return self._window.lower(first, *arguments, _part(fault, 0, orders))

    def _program(self, first: Any, fault: Fault | None) -> Any:
        """Return the compiled program of the steps between two evaluations."""
        known = self._programs
        if (fault is None) not in known:
            lowered = self._lowered(first, fault)
            known[fault is None] = lowered.compile(compiler_options=QUICKLY)
        return known[fault is None]

    def __call__(self, setting: float, seed: int, fault: Fault | None = None) -> Curves:
        """Train once.

        Where a controller asks for a rollback, the run goes back to an evaluation and
        on with the data that follows, as `Trainer` does; where it may not, it ends.
        """
        problem = self.problem
        saved = [self._first(setting, seed)]
        program = self._program(saved[0], fault)
        orders = _orders(problem.recipe, len(problem.recipe.train), seed)
        rows: list[Any] = []
        said: list[Any] = []
        back = 0
        while len(saved) <= len(orders):
            number = len(said) % len(orders)
            rates = (np.float32(setting), np.uint32(seed))
            part = _part(fault, number, orders)
            carry, at, trained, heard = program(saved[-1], *rates, orders[number], part)
            said.append(heard)
            if has_halted(carry[2]):
                if back == self._limits.get("rollbacks", 0):
                    rows.append((trained, np.nan, np.nan))
                    break
                saved = self._sent_back(saved, back)
                rows = rows[: len(saved) - 1]
                back += 1
                continue
            validated = problem.mean_loss(*at, problem.validation)
            rows.append((trained, validated, problem.mean_loss(*at, problem.report)))
            saved.append((*carry[:4], (validated, np.float32(len(rows)))))
        return _curves(rows, said, isinstance(carry[2], Driven))

    def _sent_back(self, saved: list[Any], back: int) -> list[Any]:
        """Return the evaluations up to the one that a run goes back to.

        Args:
          saved: what went from step to step at each of them.
          back: rollbacks before this one.
        """
        lost = int(saved[-1][3])
        last_good = lost - self._limits.get("patience", 0)
        good = sum(int(carry[3]) <= last_good for carry in saved)
        kept = saved[: max(1, good - back)]
        params, variables, state, count, evaluated = kept[-1]
        state = sent_back(state, back, lost - int(count), self._limits)
        return [*kept[:-1], (params, variables, state, count, evaluated)]


def _part(fault: Fault | None, number: int, orders: np.ndarray) -> Fault | None:
    """Return the part of a fault in a window, None without a fault."""
    return None if fault is None else fault.window(number, orders.shape[1])


def _curves(rows: Sequence[Any], said: Sequence[Any], driven: bool) -> Curves:
    """Return the curves of a run.

    Args:
      rows: by evaluation, (loss, loss of blank outputs) of each step before it, and
        the losses of validation and test.
      said: `Said` of the steps before each evaluation.
      driven: whether there is a controller, which says something.
    """
    steps = [np.asarray(row[0][0], np.float64) for row in rows]
    validation = [float(row[1]) for row in rows]
    notices = np.concatenate([np.asarray(part.notice) for part in said])
    alarms = np.concatenate([np.asarray(part.alarm) for part in said])
    blanks = np.concatenate([np.asarray(row[0][1]) for row in rows])
    records = {"loss": np.concatenate(steps), "loss_blank": blanks}
    evaluations = [(k, {"loss": loss}) for k, loss in enumerate(validation)]
    at_end = found_at_the_end(len(blanks), records, evaluations, True)
    return Curves(
        [float(part.mean()) for part in steps],
        validation,
        [float(row[2]) for row in rows],
        float(driven and (notices.any() or any(at_end))),
        np.flatnonzero(alarms).tolist(),
    )


def _window(
    problem: Problem,
    contestant: Maker,
    carry: Any,
    setting: Any,
    seed: Any,
    indices: Any,
    fault: Any,
) -> tuple[Any, Any, Any, Any]:
    """Train up to an evaluation.

    Returns:
      What goes on; (params, variables) to evaluate; of each step the loss, and the one
      of blank outputs if it is measured; and what the contestant said in each step.
    """
    recipe = problem.recipe
    method = contestant(recipe, setting)
    key = jax.random.fold_in(jax.random.key(seed), 1)
    loss = training_loss(recipe, problem.module, 1)
    step = _step(method, loss, problem.train, key, fault)
    own = None if fault is None else (fault.batches, fault.raised)
    carry, (trained, said) = jax.lax.scan(step, carry, (indices, own))
    return carry, method.evaluated(*carry[:3]), trained, said


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
    """Return a function of (params, variables, samples) to the evaluation's loss."""

    def mean_loss(params: Any, variables: Any, samples: Any) -> Any:
        inputs, targets = samples
        if recipe.preprocess:
            inputs = recipe.preprocess(inputs)
        key = jax.random.key(0)  # an evaluation draws nothing
        outputs, _, _ = module.apply(params, variables, inputs, key, False)
        total, weight = losses.weighted_sum(recipe.loss, outputs, targets)
        return total / weight

    return mean_loss


def _step(
    method: Contestant,
    loss: Callable[..., Any],
    train: Any,
    key: Any,
    fault: Any,
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return one train step, as the body of a scan over the samples' indices."""
    gradient = jax.grad(loss, has_aux=True)

    def step(
        carry: Any,
        given: Any,
    ) -> tuple[Any, Any]:
        indices, own = given
        params, variables, state, count, evaluated = carry
        validated, evaluations = evaluated
        batch = jax.tree.map(lambda x: x[indices], train)
        raised = jnp.float32(1)
        if fault is not None:
            number, raised = own
            batch = _spoiled(batch, fault.faulty, number)
        gradients, (sums, after) = gradient(
            params,
            variables,
            jax.random.fold_in(key, count),
            *batch,
            method.knobs(state),
        )
        means = {name: total / weight for name, (total, weight) in sums.items()}
        batch_loss = means.pop("loss")
        means[INPUTS] = input_rms(batch[0])
        blank = means.get("loss_blank", jnp.float32(jnp.nan))
        signals = Signals(count, batch_loss, means, validated, evaluations, raised)
        before = (params, variables)
        *updated, said = method.update(
            signals,
            gradients,
            before,
            after,
            state,
        )
        return (*updated, count + 1, evaluated), ((batch_loss, blank), said)

    return step


def _spoiled(batch: Any, faulty: Any, number: Any) -> Any:
    """Return a faulty batch in place of a clean one, unless its number is below 0."""

    def chosen(clean: Any, bad: Any) -> Any:
        return jnp.where(number < 0, clean, bad[jnp.maximum(number, 0)])

    return jax.tree.map(chosen, batch, faulty)


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
    setting: str  # to six digits, so that it is found again
    seed: int
    program: str


class Campaign:
    """Runs, each made once.

    Args:
      data: folder of the data sets.
      cache: a file of JSON lines with the runs that were made; None: nothing is kept.
      seeds: of the runs.
      contestants: name to a function of (recipe, setting), in addition to the usual
        ones.

    Raises:
      SettingError: the cache holds something else.
    """

    def __init__(
        self,
        data: Path,
        cache: Path | None,
        seeds: Sequence[int],
        contestants: Mapping[str, Maker] | None = None,
    ):
        self.data = data
        self.cache = cache
        self.seeds = seeds
        self.contestants = {**CONTESTANTS, **(contestants or {})}
        self._problems: dict[str, Problem] = {}
        self._runners: dict[tuple[str, str], Runner] = {}
        self._known: dict[Cell, Curves] = {}
        if cache is not None and cache.exists():
            self._read(cache)

    def run(
        self,
        task: str,
        contestant: str,
        setting: float,
        seed: int,
    ) -> Curves:
        """Return the curves of a run, from the cache if it is there."""
        runner = self._runner(task, contestant)
        cell = Cell(
            task,
            contestant,
            f"{setting:.6g}",
            seed,
            self._stamp(task, contestant),
        )
        if cell not in self._known:
            self._known[cell] = runner(float(cell.setting), seed)
            self._keep(cell)
        return self._known[cell]

    def _stamp(self, task: str, contestant: str) -> str:
        """Return a digest of all that decides a run.

        A rival's is made of its sources, so that a known run is not traced.
        """
        if contestant not in RIVALS:
            return self._runner(task, contestant).program
        digest = hashlib.sha256(self._problem(task).digest.encode())
        digest.update(f"{jax.__version__} {optax.__version__}".encode())
        for file in (source(task), Path(controller_rivals.__file__)):
            digest.update(file.read_bytes())
        return digest.hexdigest()[:16]

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

    def _problem(self, task: str) -> Problem:
        if task not in self._problems:
            self._problems[task] = Problem(TASKS[task](self.data))
        return self._problems[task]

    def _runner(
        self,
        task: str,
        contestant: str,
    ) -> Runner:
        key = (task, contestant)
        if key not in self._runners:
            maker = self.contestants[contestant]
            self._runners[key] = Runner(self._problem(task), maker)
        return self._runners[key]

    def setting(self, task: str, contestant: str) -> float:
        """Return the setting of a contestant: tuned, if it is a rival."""
        if contestant not in RIVALS:
            return ARBITRARY

        def loss(setting: float, seeds: Sequence[int]) -> float:
            runs = [self.run(task, contestant, setting, seed) for seed in seeds]
            return statistics.fmean(_final(run.validation) for run in runs)

        return tuned(
            contestant,
            partial(loss, seeds=self.seeds[:1]),
            partial(loss, seeds=self.seeds),
        )

    def row(
        self,
        task: str,
        contestant: str,
        goals: Sequence[float] | None = None,
    ) -> dict[str, Any]:
        """Return the results of one contestant on a task.

        Args:
          task: its name.
          contestant: its name.
          goals: the reference's final test loss of each seed; None: its own.
        """
        row = {"task": task, "contestant": contestant, "refused": ""}
        try:
            setting = self.setting(task, contestant)
            runs = [self.run(task, contestant, setting, seed) for seed in self.seeds]
        except RecipeError as error:
            never = [math.inf] * len(self.seeds)
            results = {"setting": math.nan, "losses": never, "steps": never}
            return {**row, **results, "noticed": True, "refused": error.what}
        finals = [_final(run.test) for run in runs]
        pairs = zip(goals or finals, runs, strict=True)
        return {
            **row,
            "setting": setting,
            "losses": finals,
            "steps": [
                _first_at_most(goal, run.test) / len(run.test) for goal, run in pairs
            ],
            "noticed": all(run.noticed > 0 for run in runs),
        }

    def rows(self, task: str, contestants: Sequence[str]) -> list[dict[str, Any]]:
        """Return the results of some contestants on a task, with ratios and ranks."""
        reference = self.row(task, REFERENCE)
        rows = []
        for name in contestants:
            row = self.row(task, name, reference["losses"])
            rows.append(reference if name == REFERENCE else row)
        return compared(rows, reference["losses"])

    def forget(self) -> None:
        """Let go of tasks and programs: what was measured stays."""
        self._problems.clear()
        self._runners.clear()


def measure(
    tasks: Sequence[str],
    contestants: Mapping[str, Maker] | Sequence[str] = ("adaptive",),
    seeds: Sequence[int] = SEEDS,
    cache: Path | None = None,
    data: Path = DATA,
) -> list[dict[str, Any]]:
    """Return the results of contestants on tasks of the tuning half.

    Args:
      tasks: their names.
      contestants: names of the usual ones, or of own ones with their functions, such as
        `{"mine": functools.partial(controlled, policies=controllers.guard())}`.
      seeds: of the runs.
      cache: see `Campaign`.
      data: folder of the data sets.

    Returns:
      A row a task and contestant; see `compared`.
    """
    own = contestants if isinstance(contestants, Mapping) else {}
    campaign = Campaign(data, cache, seeds, own)
    rows = []
    for task in tasks:
        rows += campaign.rows(task, list(contestants))
        campaign.forget()
    return rows


def _first_at_most(
    goal: float,
    losses: Sequence[float],
) -> float:
    """Return the number of the first loss that reaches a goal; infinity if none."""
    for number, loss in enumerate(losses, 1):
        if loss <= goal:
            return number
    return math.inf


def _final(losses: Sequence[float]) -> float:
    return losses[-1] if math.isfinite(losses[-1]) else math.inf


# ---- comparison ----


def compared(
    rows: Sequence[Mapping[str, Any]], goals: Sequence[float]
) -> list[dict[str, Any]]:
    """Add to the results on a task what they are against the reference.

    Args:
      rows: a row a contestant, as `Campaign.row` returns it.
      goals: the reference's final test loss of each seed.

    Returns:
      The rows with "ratio" (means of the seeds), "ratios" (of the same seed each) and
      "rank" among the rows; equal losses share the mean of their ranks.
    """
    reference = statistics.fmean(goals)
    means = [statistics.fmean(row["losses"]) for row in rows]
    results = []
    for row, mean in zip(rows, means, strict=True):
        better = sum(other < mean for other in means)
        equal = sum(other == mean for other in means)
        pairs = zip(row["losses"], goals, strict=True)
        results.append(
            {
                **row,
                "ratio": mean / reference,
                "ratios": [loss / goal for loss, goal in pairs],
                "rank": better + (equal + 1) / 2,
            }
        )
    return results


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the aggregate figures of each contestant, the best mean rank first."""
    by_contestant: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_contestant.setdefault(row["contestant"], []).append(row)
    summary = [_summary(name, own) for name, own in by_contestant.items()]
    return sorted(summary, key=lambda row: row["rank"])


def _summary(
    name: str,
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the aggregate figures of one contestant."""
    outside = [row for row in rows if not row["ratio"] <= TOLERANCE]
    noticed = [row for row in outside if row["noticed"]]
    needless = [row for row in rows if row["noticed"] and row["ratio"] <= TOLERANCE]
    return {
        "contestant": name,
        "tasks": len(rows),
        "within": 1 - len(outside) / len(rows),
        "median": statistics.median(row["ratio"] for row in rows),
        "worst": max(row["ratio"] for row in rows),
        "rank": statistics.fmean(row["rank"] for row in rows),
        "steps": statistics.median(x for row in rows for x in row["steps"]),
        "outside": len(outside),
        "noticed": len(noticed),
        "needless": len(needless),
        "refused": sum(bool(row["refused"]) for row in rows),
    }


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'contestant':16} {'tasks':>5} {'within 2 %':>10} {'median':>7}"
        f" {'worst':>7}"
        f" {'mean rank':>9} {'steps':>6} {'outside':>7} {'noticed':>7} {'needless':>8}"
        f" {'refused':>7}"
    ]
    lines += [
        f"{row['contestant']:16} {row['tasks']:5} {row['within']:10.1%}"
        f" {row['median']:7.3f} {row['worst']:7.3g} {row['rank']:9.2f}"
        f" {row['steps']:6.3g} {row['outside']:7} {row['noticed']:7}"
        f" {row['needless']:8} {row['refused']:7}"
        for row in summary
    ]
    return "\n".join(lines)


def _of_task(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of one task."""
    lines = [f"{rows[0]['task']}"]
    for row in rows:
        ratios = " ".join(f"{ratio:6.3f}" for ratio in row["ratios"])
        steps = " ".join(f"{step:5.2f}" for step in row["steps"])
        lines.append(
            f"  {row['contestant']:16} {row['ratio']:7.3f}  ({ratios})"
            f"  steps {steps}  rank {row['rank']:3.1f}  setting {row['setting']:.3g}"
            f"  loss {statistics.fmean(row['losses']):.4g}{_remark(row)}"
        )
    return "\n".join(lines)


def _remark(row: Mapping[str, Any]) -> str:
    if row["refused"]:
        return f"  refused: {row['refused']}"
    return "  noticed" if row["noticed"] else ""


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
        "final losses without a learning rate, against tuned rivals",
    )
    parser.add_argument(
        "--half",
        choices=list(HALVES),
        default="tuning",
        help="of the tasks (default: %(default)s)",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        metavar="NAME",
        help=f"of the tuning half: {', '.join(HALVES['tuning'])}",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=list(CONTESTANTS),
        metavar="NAME",
        help=f"of {', '.join(CONTESTANTS)}",
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
        "--rates",
        nargs="+",
        type=float,
        default=[],
        metavar="RATE",
        help="base rates from which `adaptive` is to give the same",
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
    """Tune the rivals, run every contestant and print the tables.

    Returns:
      The summary; of the tuning half the rows, too.

    Raises:
      SettingError: no such task or contestant, or a seed that can't be.
      DataError: a data set is not there.
    """
    _check(options)
    judging = options.half == "judging"
    based = {f"adaptive, {rate:g}": partial(_from, rate) for rate in options.rates}
    campaign = Campaign(
        options.data,
        options.cache,
        list(dict.fromkeys(options.seeds)),
        based,
    )
    contestants = [*dict.fromkeys(options.contestants), *based]
    rows = []
    for task in dict.fromkeys(options.tasks or HALVES[options.half]):
        own = campaign.rows(task, contestants)
        campaign.forget()
        rows += own
        if not judging:
            print(_of_task(own), flush=True)
    summary = summarize(rows)
    print(_table(summary))
    if judging:
        if {*contestants} == {*CONTESTANTS}:
            history.append(HISTORY, {"seeds": campaign.seeds, "contestants": summary})
        return {"summary": summary}
    return {"rows": rows, "summary": summary}


def _from(base: float, recipe: lepton.Recipe, setting: Any) -> Contestant:
    """Return `adaptive` from a base rate of its own."""
    return adaptive(recipe, base)


def _check(options: argparse.Namespace) -> None:
    """Raise a SettingError for options that can't be."""
    if options.half == "judging" and options.tasks:
        raise SettingError(
            "the tasks of the judging half are not run one by one",
            where="--tasks",
            remedy="leave --tasks out, or name tasks of the tuning half",
        )
    checks.check_names(options.tasks or (), HALVES["tuning"], "--tasks", "task")
    checks.check_names(options.contestants, CONTESTANTS, "--contestants", "contestant")
    unusable = [("seeds", seed) for seed in options.seeds if not 0 <= seed < 2**32]
    unusable += [
        ("rates", rate)
        for rate in options.rates
        if not (math.isfinite(rate) and rate > 0)
    ]
    for flag, value in unusable:
        raise SettingError(
            f"--{flag} has {value:g}",
            where="command line",
            remedy="give numbers above 0",
        )

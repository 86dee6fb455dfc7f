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
  noticed        share of the tasks with a ratio above 1.02 on which the controller said
                 so in each seed (a policy's column `notice`)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import lepton_jax as lepton
from lepton_jax import losses
from lepton_jax.errors import RecipeError, SettingError
from lepton_jax.step.module import functional
from lepton_jax.step.training_loss import training_loss
from tools.bench import history
from tools.bench import options as checks
from tools.bench.controller_rivals import (
    CONTESTANTS,
    REFERENCE,
    RIVALS,
    Contestant,
    Maker,
    Signals,
    adaptive,
    tuned,
)
from tools.bench.controller_tasks import Task
from tools.bench.tasks import HALVES, TASKS

__all__ = ["Campaign", "Runner", "Task", "adaptive", "measure"]

SEEDS = (0, 1, 2)
TOLERANCE = 1.02  # of the reference's loss
ARBITRARY = 1.0  # the base rate of `adaptive`, which cancels
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
      noticed: the most that a controller said at once of not being good on the task.
      alarms: the steps, from 0, in which it says that something is wrong.
    """

    train: list[float]
    validation: list[float]
    test: list[float]
    noticed: float
    alarms: list[int]


class Fault(NamedTuple):
    """A fault in a run.

    Attributes:
      batches: index of each of its batches among the faulty ones, int32 (steps,); -1:
        the step's batch is clean.
      faulty: inputs and targets, (faulty batches, batch, ...).
      raised: factors of the learning rate before each step, float32 (steps,).
    """

    batches: Any
    faulty: Any
    raised: Any


class Runner:
    """Runs of one contestant on one task.

    There is one compilation, whatever the setting and the seed.

    Args:
      task: the task.
      contestant: a function of (recipe, setting).

    Attributes:
      program: a digest of the lowered program and the data; equal ones give equal
        curves from equal settings and seeds.

    Raises:
      RecipeError: the contestant refuses the task.
    """

    def __init__(self, task: Task, contestant: Maker):
        self.recipe = task.recipe
        parts = [(x.inputs, x.targets) for x in (self.recipe.train, self.recipe.test)]
        parts.append((task.report.inputs, task.report.targets))
        self._data = jax.device_put(tuple(parts))

        inputs = self._data[0][0]
        program = jax.jit(_program(task.recipe, contestant, inputs))
        self._lowered = program.lower(*self._arguments(1.0, 0, None))
        digest = hashlib.sha256(jax.__version__.encode())
        digest.update(self._lowered.as_text().encode())
        for leaf in jax.tree.leaves(self._data):
            digest.update(np.asarray(leaf).tobytes())
        self.program = digest.hexdigest()[:16]
        self._compiled: Any = None

    def __call__(self, setting: float, seed: int, fault: Fault | None = None) -> Curves:
        """Train once."""
        self._compiled = self._compiled or self._lowered.compile()
        out = self._compiled(*self._arguments(setting, seed, fault))
        train, validation, test, notice, alarm = map(np.asarray, out)
        return Curves(
            train.astype(np.float64).tolist(),
            validation.astype(np.float64).tolist(),
            test.astype(np.float64).tolist(),
            float(notice.max()),
            np.flatnonzero(alarm).tolist(),
        )

    def _arguments(
        self,
        setting: float,
        seed: int,
        fault: Fault | None,
    ) -> tuple[Any, ...]:
        orders = _orders(self.recipe, len(self.recipe.train), seed)
        return (np.float32(setting), np.uint32(seed), orders, *self._data)


def _program(
    recipe: lepton.Recipe,
    contestant: Maker,
    inputs: Any,
) -> Callable[..., Any]:
    """Return a function of a whole run, evaluations included.

    It takes (setting, seed, orders, train, validation, report), and returns the losses
    of training, validation and test, and what the contestant said.
    """
    module = functional(recipe.model, _batch_shapes(recipe, inputs))
    mean_loss = _mean_loss(recipe, module)

    def run(
        setting: Any, seed: Any, orders: Any, train: Any, validation: Any, report: Any
    ) -> tuple[Any, ...]:
        method = contestant(recipe, setting)
        params, variables = module.init(jax.random.key(seed))
        key = jax.random.fold_in(jax.random.key(seed), 1)
        step = _step(method, training_loss(recipe, module, 1), train, key)

        def window(
            carry: Any,
            indices: Any,
        ) -> tuple[Any, Any]:
            """Train up to an evaluation, and evaluate."""
            carry, (trained, said) = jax.lax.scan(step, carry, indices)
            at = method.evaluated(*carry[:3])
            validated = mean_loss(*at, validation)
            tested = mean_loss(*at, report)
            evaluated = (validated, carry[4][1] + 1)
            return (*carry[:4], evaluated), (
                trained.mean(),
                validated,
                tested,
                *said,
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
    method: Contestant, loss: Callable[..., Any], train: Any, key: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Return one train step, as the body of a scan over the samples' indices."""
    gradient = jax.grad(loss, has_aux=True)

    def step(
        carry: Any,
        indices: Any,
    ) -> tuple[Any, Any]:
        params, variables, state, count, evaluated = carry
        batch = jax.tree.map(lambda x: x[indices], train)
        gradients, (sums, after) = gradient(
            params,
            variables,
            jax.random.fold_in(key, count),
            *batch,
            method.knobs(state),
        )
        means = {name: total / weight for name, (total, weight) in sums.items()}
        batch_loss = means.pop("loss")
        validated, evaluations = evaluated
        signals = Signals(
            count,
            batch_loss,
            means,
            validated,
            evaluations,
            jnp.float32(1),
        )
        before = (params, variables)
        *updated, said = method.update(
            signals,
            gradients,
            before,
            after,
            state,
        )
        return (*updated, count + 1, evaluated), (batch_loss, said)

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
        self._tasks: dict[str, Task] = {}
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
            runner.program,
        )
        if cell not in self._known:
            self._known[cell] = runner(float(cell.setting), seed)
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
            self._tasks[name] = TASKS[name](self.data)
        return self._tasks[name]

    def _runner(
        self,
        task: str,
        contestant: str,
    ) -> Runner:
        key = (task, contestant)
        if key not in self._runners:
            maker = self.contestants[contestant]
            self._runners[key] = Runner(self._task(task), maker)
        return self._runners[key]

    def setting(self, task: str, contestant: str) -> float:
        """Return the setting of a contestant: tuned, if it is a rival."""
        if contestant not in RIVALS:
            return ARBITRARY

        def validation_loss(setting: float) -> float:
            runs = [self.run(task, contestant, setting, seed) for seed in self.seeds]
            return statistics.fmean(_final(run.validation) for run in runs)

        return tuned(contestant, validation_loss)

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
        self._tasks.clear()
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
    return {
        "contestant": name,
        "tasks": len(rows),
        "within": 1 - len(outside) / len(rows),
        "worst": max(row["ratio"] for row in rows),
        "rank": statistics.fmean(row["rank"] for row in rows),
        "steps": statistics.median(x for row in rows for x in row["steps"]),
        "outside": len(outside),
        "noticed": len(noticed),
        "refused": sum(bool(row["refused"]) for row in rows),
    }


def _table(summary: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        f"{'contestant':16} {'tasks':>5} {'within 2 %':>10} {'worst':>7}"
        f" {'mean rank':>9} {'steps':>6} {'outside':>7} {'noticed':>7} {'refused':>7}"
    ]
    lines += [
        f"{row['contestant']:16} {row['tasks']:5} {row['within']:10.1%}"
        f" {row['worst']:7.3g} {row['rank']:9.2f} {row['steps']:6.3g}"
        f" {row['outside']:7} {row['noticed']:7} {row['refused']:7}"
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
    campaign = Campaign(options.data, options.cache, list(dict.fromkeys(options.seeds)))
    contestants = list(dict.fromkeys(options.contestants))
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
        history.append(HISTORY, {"seeds": campaign.seeds, "contestants": summary})
        return {"summary": summary}
    return {"rows": rows, "summary": summary}


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
    for seed in options.seeds:
        if not 0 <= seed < 2**32:
            raise SettingError(
                f"--seeds has {seed}",
                where="command line",
                remedy="give numbers from 0 to 2**32 - 1",
            )

"""What a fault in the middle of a run costs it, with a controller and without.

`tools.bench faults`. The runs are `Trainer.fit` on tasks of `tools.bench controller`,
and digits with a small MLP. Batches come in a fixed order by seed, so that all runs of
a task and seed see the same ones. A fault sets in after 40 % of the steps:

  nan         the inputs of one batch are NaN; not for a task whose inputs are integers
  burst       20 batches of random inputs and labels, the inputs 50 times as large as
              the data's
  mild        the same, the inputs as large as the data's; integers are random in both
  window-20, window-50, window-80
              20, 50 or 80 % of the labels are wrong for a tenth of the run, then none
  lasting-20, lasting-50
              20 or 50 % of the labels are wrong from then on
  rate        a person sets a learning rate 1000 times as high while the run goes on

A wrong label is one of the others, all equally likely; a wrong rating is another
sample's. The contestants:

  plain       the task's optimizer at its tuned rate under a cosine
  guard       the same with `controllers.guard()` and `controllers.label_noise()`
  adaptive    `controllers.adaptive()`, whatever the rate
  bound       plain, by somebody who knows which labels are wrong, and leaves these
              samples out beforehand: whole batches of the others, and the cosine over
              the fewer steps that they make; for tasks with one label a sample
  share       plain, by somebody who knows the share of wrong labels of each step, but
              not which: trained by the likelihood of the labels as they come (forward
              correction, Patrini et al. 2017)

The last two show what the data leaves to be had. They run on request, and on wrong
labels only.

Each figure is the final loss on clean test data divided by that of the same
contestant's clean run of the same seed: the mean of the seeds, their least and largest.
"clean" has the contestants' clean losses, their spread over the seeds to compare with,
and in brackets their ratio to the plain clean run's. A run that ends with an error
counts as infinite.

With --half, tasks of one half of `tools.bench controller` are run under `adaptive()`
alone, with faults at the start, in the middle and at the end: see judged_faults.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.errors import DivergedError
from lepton_jax.hosts import mailbox
from tools.bench import judged_faults
from tools.bench import options as checks
from tools.bench.controller import DATA, _orders
from tools.bench.controller_tasks import Task
from tools.bench.tasks import TASKS

# Learning rates, tuned by `tools.bench controller` (digits: for the small MLP).
RATES = {
    "digits": 3e-3,
    "mnist": 0.01,
    "adult": 0.01,
    "shakespeare": 0.01,
    "movielens": 0.0215,
}
FAULTS = (
    "nan",
    "burst",
    "mild",
    "window-20",
    "window-50",
    "window-80",
    "lasting-20",
    "lasting-50",
    "rate",
)
AT = 0.4  # share of the steps before the fault
WINDOW = 0.1  # share of the steps of a fault that passes
BURST = 20  # batches
LOUD = 50  # how many times as large the inputs of a burst are
HIGHER = 1000  # how many times as high a rate a person sets
TOLERANCE = 0.01  # above 1, of ratios that count as unharmed
SAVES = 12  # checkpoints of a run
LEAST = 1e-30  # probability, so that its logarithm is finite
CONTESTANTS: dict[str, Callable[[], Any]] = {
    "plain": tuple,
    "guard": lambda: (controllers.guard(), controllers.label_noise()),
    "adaptive": controllers.adaptive,
    "bound": tuple,
    "share": tuple,
}


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `faults` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "faults",
        __doc__,
        "what faults cost a run, with a controller and without",
    )
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["digits", "mnist", "shakespeare"],
        metavar="NAME",
        help=f"of {', '.join(RATES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--faults",
        nargs="+",
        default=list(FAULTS),
        metavar="NAME",
        help="(default: all)",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["plain", "guard", "adaptive"],
        metavar="NAME",
        help=f"of {', '.join(CONTESTANTS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=3,
        metavar="N",
        help="how many (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=DATA,
        metavar="FOLDER",
        help="that holds the data sets",
    )
    judged_faults.add_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs, task by task, and print each task's table.

    With --half it is `judged_faults.run` instead.

    Raises:
      SettingError: no such task, fault or contestant, or no seed.
    """
    if options.half:
        return judged_faults.run(options)
    checks.check_names(options.tasks, RATES, "--tasks", "task")
    checks.check_names(options.faults, FAULTS, "--faults", "fault")
    checks.check_names(options.contestants, CONTESTANTS, "--contestants", "contestant")
    checks.check_at_least(options, seeds=1)

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        _remember_programs(Path(folder, "programs"))
        for name in dict.fromkeys(options.tasks):
            task = made(name, options.data)
            own = compared(_runs(name, task, options, Path(folder)))
            print(table(name, summarize(own)), flush=True)
            rows += own
    summary = summarize(rows)
    print(overall(summary))
    return {"runs": rows, "summary": summary}


def _runs(
    name: str, task: Task, options: argparse.Namespace, folder: Path
) -> list[dict[str, Any]]:
    """Make all runs of a task."""
    rows = []
    for contestant in dict.fromkeys(options.contestants):
        faults = ["clean"]
        for fault in dict.fromkeys(options.faults):
            if possible(task, fault, contestant):
                faults.append(fault)
        for fault, seed in itertools.product(faults, range(options.seeds)):
            run_dir = folder / f"{name}-{contestant}-{fault}-{seed}"
            row = {
                "task": name,
                "contestant": contestant,
                "fault": fault,
                "seed": seed,
            }
            outcome = final(
                task,
                RATES[name],
                contestant,
                fault,
                seed,
                run_dir,
            )
            rows.append(row | outcome)
    return rows


def made(name: str, data: Path) -> Task:
    """Return a task; digits with an MLP, which trains in a second."""
    task = TASKS[name](data)
    if name != "digits":
        return task
    recipe = task.recipe.with_(
        model=partial(lepton.models.MLP, (64, 64, 10)),
        steps=500,
        batch_size=50,
        evaluate_every=100,
        preprocess=_flat,
    )
    return task._replace(recipe=recipe)


def _flat(pixels: Any) -> Any:
    return pixels.reshape(pixels.shape[0], -1).astype("float32") / 16


def _remember_programs(folder: Path) -> None:
    """Let runs that differ in their data or seed alone be compiled once."""
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


# ---- a run ----


def final(
    task: Task,
    rate: float,
    contestant: str,
    fault: str,
    seed: int,
    folder: Path,
) -> dict[str, Any]:
    """Make one run.

    Returns:
      The final test loss, and how many steps were skipped; an infinite loss where the
      run ended with an error.
    """
    recipe = task.recipe
    train, preprocess = spoiled(recipe, fault, seed, contestant == "bound")
    steps = len(train[1]) // recipe.batch_size
    test = (task.report.inputs, task.report.targets)
    if contestant == "share":
        recipe, train, test = _with_shares(recipe, fault, train, test)
    if preprocess is not recipe.preprocess:
        test = (_prepared(recipe, test[0]), test[1])

    asks: tuple[Any, ...] = ()
    if fault == "rate":
        mailbox.POLL_SECONDS = 0.0  # so that it acts at the same step in each run
        asks = (_Person(folder, int(AT * steps), HIGHER * rate),)
    cosine = optax.cosine_decay_schedule(rate, steps)
    recipe = recipe.with_(
        train=train,
        test=test,
        shuffle=False,
        seed=seed,
        preprocess=preprocess,
        controller=CONTESTANTS[contestant](),
        steps=steps,
        evaluate_every=steps,
        save_every=steps // SAVES,
        log_every=10,
        learning_rate=rate if contestant == "adaptive" else cosine,
    )
    run_dir = folder if fault == "rate" else None
    trainer = lepton.Trainer(recipe, devices=1, run_dir=run_dir, sinks=asks)
    try:
        history = trainer.fit()
    except DivergedError as error:
        return {"loss": math.inf, "error": error.what}
    skips = [history[name].sum() for name in history.names if name.endswith(":skip")]
    return {
        "loss": float(history.metrics["loss"]),
        "skips": sum(float(count) for count in skips),
    }


def _with_shares(
    recipe: lepton.Recipe, fault: str, train: Any, test: Any
) -> tuple[lepton.Recipe, Any, Any]:
    """Give the loss of each sample the share of wrong labels in its step."""
    classes = int(train[1].max()) + 1
    recipe = recipe.with_(loss=partial(_likelihood, classes=classes), metrics={})
    inputs, labels = train
    shares = share_of_wrong(recipe, fault, labels)
    train = (inputs, {"label": labels, "share": shares})

    inputs, labels = test
    none = np.zeros(labels.shape, np.float32)
    return recipe, train, (inputs, {"label": labels, "share": none})


class _Person:
    """A sink that sets a learning rate once, as tools/control.py would."""

    def __init__(
        self,
        folder: Path,
        step: int,
        rate: float,
    ):
        self.folder = folder
        self.step = step
        self.rate = rate
        self.asked = False

    def event(self, event: Mapping[str, Any]) -> None:
        """Ask once the step is reached."""
        if self.asked or event["kind"] != "steps" or event["last"] < self.step:
            return
        self.asked = True
        request = {
            "do": "set",
            "settings": {"learning_rate": f"{self.rate:g}"},
            "until": time.time() + 99,
        }
        # it is read under its final name only
        part = self.folder / "control" / "1.part"
        part.write_text(json.dumps(request))
        part.rename(part.with_suffix(".request"))

    def close(self) -> None:
        """Do nothing."""


def spoiled(
    recipe: lepton.Recipe,
    fault: str,
    seed: int,
    known: bool = False,
) -> tuple[Any, Any]:
    """Return the samples of a run in their order, with the fault among them.

    Args:
      recipe: of the task.
      fault: one of `FAULTS`, or "clean".
      seed: of the order and of the fault.
      known: leave out the samples whose labels are wrong, for "bound".

    Returns:
      (inputs, targets) and the preprocessing for them.
    """
    size = recipe.batch_size
    rows = _orders(recipe, len(recipe.train), seed).ravel()
    random = np.random.default_rng(1000 + seed)
    given = (recipe.train.inputs, recipe.train.targets)
    inputs, targets = jax.tree.map(lambda x: np.asarray(x)[rows], given)

    if fault in ("nan", "burst", "mild"):
        inputs = _prepared(recipe, inputs)
        first = int(AT * int(recipe.steps or 0)) * size
        batches = 1 if fault == "nan" else BURST
        span = slice(first, first + batches * size)
        _spoil_inputs(inputs, span, fault, random)
        if fault != "nan":
            shuffled = random.permutation(targets[span].ravel())
            targets[span] = shuffled.reshape(targets[span].shape)
        return (inputs, targets), None
    if not fault.startswith(("window", "lasting")):
        return (inputs, targets), recipe.preprocess

    wrong, other = _wrong_labels(recipe, fault, targets, random)
    if known:
        right = np.flatnonzero(~wrong)
        right = right[: len(right) // size * size]
        kept = jax.tree.map(lambda x: x[right], (inputs, targets))
        return kept, recipe.preprocess
    targets = np.where(wrong, other, targets).astype(targets.dtype)
    return (inputs, targets), recipe.preprocess


def _spoil_inputs(
    inputs: Any, span: slice, fault: str, random: np.random.Generator
) -> None:
    """Overwrite a span of the inputs with NaN or random values."""
    for part in jax.tree.leaves(inputs):
        shape = part[span].shape
        if fault == "nan":
            part[span] = np.nan
        elif _real(part):
            scale = (LOUD if fault == "burst" else 1) * part.std()
            part[span] = scale * random.normal(size=shape)
        else:
            part[span] = random.integers(0, part.max() + 1, shape)


def _wrong_labels(
    recipe: lepton.Recipe,
    fault: str,
    targets: np.ndarray,
    random: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return which labels are wrong, and a wrong label for each sample."""
    percent = int(fault.partition("-")[2])
    first, last = _span_of_wrong(recipe, fault)
    wrong = random.random(targets.shape) < percent / 100
    wrong[:first] = False
    wrong[last:] = False
    if _real(targets):
        return wrong, random.permutation(targets)
    classes = int(targets.max()) + 1
    shift = random.integers(1, classes, targets.shape)
    return wrong, (targets + shift) % classes


def _span_of_wrong(
    recipe: lepton.Recipe,
    fault: str,
) -> tuple[int, int]:
    """Return the first sample that may have a wrong label, and the first after them."""
    steps = int(recipe.steps or 0)
    first = int(AT * steps)
    last = first + int(WINDOW * steps) if fault.startswith("window") else steps
    return first * recipe.batch_size, last * recipe.batch_size


def share_of_wrong(
    recipe: lepton.Recipe, fault: str, targets: np.ndarray
) -> np.ndarray:
    """Return the share of wrong labels in each sample's step.

    Returns:
      float32, in the shape of the targets.
    """
    shares = np.zeros(targets.shape, np.float32)
    if fault.startswith(("window", "lasting")):
        first, last = _span_of_wrong(recipe, fault)
        shares[first:last] = int(fault.partition("-")[2]) / 100
    return shares


def _likelihood(
    outputs: Any,
    targets: Mapping[str, Any],
    classes: int,
) -> Any:
    """Return the cross-entropy of labels of which a share is one of the others.

    With p the model's probability of the label as it comes and s the share,
    -log((1 - s) p + s (1 - p) / (classes - 1)).
    """
    plain = lepton.losses.cross_entropy(outputs, targets["label"])
    share = targets["share"]
    right = jnp.exp(-plain)
    wrong = share * (1 - right) / (classes - 1)
    noisy = -jnp.log((1 - share) * right + wrong + LEAST)
    return jnp.where(share > 0, noisy, plain)


def possible(
    task: Task,
    fault: str,
    contestant: str,
) -> bool:
    """Return whether a contestant's run of a task can have a fault.

    Integers are never NaN; "bound" can't leave out a part of a sample with several
    labels, nor "share" handle quantities.
    """
    labels = task.recipe.train.targets
    of_labels = fault.startswith(("window", "lasting"))
    if contestant in ("bound", "share") and not of_labels:
        return False
    if contestant == "share" and _real(labels):
        return False
    if contestant == "bound" and np.ndim(labels) > 1:
        return False
    if fault != "nan":
        return True
    first = jax.tree.map(lambda x: x[:1], task.recipe.train.inputs)
    return _real(jax.eval_shape(task.recipe.preprocess or (lambda x: x), first))


def _real(tree: Any) -> bool:
    leaves = jax.tree.leaves(tree)
    return all(np.issubdtype(leaf.dtype, np.floating) for leaf in leaves)


def _prepared(
    recipe: lepton.Recipe,
    inputs: Any,
) -> Any:
    """Return inputs as the model sees them.

    So a fault is not cut down to a pixel's range.
    """
    if recipe.preprocess:
        inputs = recipe.preprocess(inputs)
    return jax.tree.map(np.array, inputs)


# ---- the tables ----


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add to each run its ratio to its contestant's clean run, and to the plain one's.

    Both are those of the same seed.
    """
    clean = {
        (row["contestant"], row["seed"]): row["loss"]
        for row in rows
        if row["fault"] == "clean"
    }
    with_ratios = []
    for row in rows:
        own = clean[row["contestant"], row["seed"]]
        plain = clean.get(("plain", row["seed"]), math.nan)
        ratios = {"ratio": row["loss"] / own, "to_plain": row["loss"] / plain}
        with_ratios.append({**row, **ratios})
    return with_ratios


def summarize(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row a task, contestant and fault, over the seeds."""
    by_key: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["contestant"], row["fault"])
        by_key.setdefault(key, []).append(row)
    return [_summary(key, own) for key, own in by_key.items()]


def _summary(
    key: tuple[str, str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return means, least and largest of the seeds."""
    task, contestant, fault = key
    ratios = [row["ratio"] for row in rows]
    losses = [row["loss"] for row in rows]
    mean = statistics.fmean(losses)
    spread = statistics.pstdev(losses) / mean if math.isfinite(mean) else math.nan
    return {
        "task": task,
        "contestant": contestant,
        "fault": fault,
        "loss": mean,
        "ratio": statistics.fmean(ratios),
        "least": min(ratios),
        "largest": max(ratios),
        "to_plain": statistics.fmean(row["to_plain"] for row in rows),
        "spread": spread,
        "skips": statistics.fmean(row.get("skips", math.nan) for row in rows),
    }


def table(
    task: str,
    summary: Sequence[Mapping[str, Any]],
) -> str:
    """Return a table of a task: means of the ratios (least to largest)."""
    names = list(dict.fromkeys(row["contestant"] for row in summary))
    lines = [f"{task:14}" + "".join(f"{name:>24}" for name in names)]
    for fault in dict.fromkeys(row["fault"] for row in summary):
        rows = {row["contestant"]: row for row in summary if row["fault"] == fault}
        cells = [_cell(rows[name]) if name in rows else "-" for name in names]
        lines.append(f"  {fault:12}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    if row["fault"] == "clean":
        return f"{row['loss']:.4g} +-{row['spread']:.1%} ({row['to_plain']:.3f})"
    bounds = f"{_short(row['least'])} to {_short(row['largest'])}"
    return f"{_short(row['ratio'])} ({bounds})"


def overall(summary: Sequence[Mapping[str, Any]]) -> str:
    """Return by contestant in how many of the faults the mean is within 1 %."""
    lines = []
    for name in dict.fromkeys(row["contestant"] for row in summary):
        own = [
            row
            for row in summary
            if row["contestant"] == name and row["fault"] != "clean"
        ]
        outside = [
            f"{row['task']} {row['fault']} {_short(row['ratio'])}"
            for row in own
            if not row["ratio"] <= 1 + TOLERANCE
        ]
        line = f"{name}: {len(own) - len(outside)} of {len(own)} within 1 %"
        lines.append(f"{line}; not {', '.join(outside)}" if outside else line)
    return "\n".join(lines)


def _short(ratio: float) -> str:
    if math.isinf(ratio):
        return "error"
    return f"{ratio:.3f}" if ratio < 100 else ">100"

"""`bench.py faults`: what a fault in the middle of a run costs it, with a controller
and without.

The runs are `Trainer.fit` on tasks of `bench.py controller`, and digits with a small
MLP. Batches come in a fixed order by seed, so that all runs of a task and seed see the
same ones; a fault sets in after 40 % of the steps:

  nan        the inputs of one batch are NaN; not of a task whose inputs are integers
  burst      20 batches of random inputs and labels, the inputs 50 times as large as the data's
  mild       the same, the inputs as large as the data's; integers are random in both
  window-20, window-50, window-80   20, 50 or 80 % of the labels are wrong for a tenth of the run, then none
  lasting-20, lasting-50            20 or 50 % of the labels are wrong from then on
  rate       a person sets a learning rate 1000 times as high, through the run's own door

A wrong label is one of the others, all alike; a wrong rating is another sample's. The
contestants:

  plain      the task's optimizer at its tuned rate under a cosine
  guard      the same with `controllers.guard()` and `controllers.label_noise()`
  adaptive   `controllers.adaptive()`, whatever the rate
  bound      plain, by somebody who knows which labels are wrong, and leaves these samples out beforehand: whole batches of the
             others, and the cosine over the fewer steps that they make. Of tasks with one label a sample
  share      plain, by somebody who knows the share of wrong labels of each step, but not which: trained by the likelihood of
             the labels as they come (forward correction, Patrini et al. 2017)

The last two show what the data leaves to be had; they run on request, and on wrong
labels only.

Each figure is the final loss on clean test data over that of the same contestant's
clean run of the same seed; the mean of the seeds, their least and largest. "clean" has
the contestants' clean losses. "to plain" is over the plain clean run's, and the spread
of the clean losses over the seeds is there to compare with. A run that ends with an
error counts as infinite.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from bench_controller import DATA, _orders
from bench_controller_tasks import TASKS, Task

import lepton_jax as lepton
from lepton_jax import controllers
from lepton_jax.errors import DivergedError, SettingError, nearest
from lepton_jax.hosts import mailbox

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
AT = 0.4
WINDOW = 0.1
BURST = 20
TOLERANCE = 0.01
CONTESTANTS: dict[str, Callable[[], Any]] = {
    "plain": tuple,
    "guard": lambda: (controllers.guard(), controllers.label_noise()),
    "adaptive": controllers.adaptive,
    "bound": tuple,
    "share": tuple,
}


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add `faults` to the subcommands."""
    parser = commands.add_parser(
        "faults",
        parents=[shared],
        allow_abbrev=False,
        description=__doc__,
        help="what faults cost a run, with a controller and without",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Make the runs, task by task, and print each task's table.

    Raises:
      SettingError: no such task, fault or contestant, or no seed.
    """
    for names, known, flag in (
        (options.tasks, RATES, "--tasks"),
        (options.faults, FAULTS, "--faults"),
        (options.contestants, CONTESTANTS, "--contestants"),
    ):
        for name in names:
            if name not in known:
                raise SettingError(
                    f"{name!r} is not known{nearest(name, known)}",
                    where=flag,
                    remedy=f"give some of {', '.join(known)}",
                )
    if options.seeds < 1:
        raise SettingError(
            "there is nothing to measure",
            where="--seeds",
            remedy="give a number of at least 1",
        )
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        _remember_programs(Path(folder, "programs"))
        for name in dict.fromkeys(options.tasks):
            task = made(name, options.data)
            found = []
            for contestant in dict.fromkeys(options.contestants):
                for fault in (
                    "clean",
                    *(
                        f
                        for f in dict.fromkeys(options.faults)
                        if possible(task, f, contestant)
                    ),
                ):
                    for seed in range(options.seeds):
                        runs = Path(folder, f"{name}-{contestant}-{fault}-{seed}")
                        found.append(
                            {
                                "task": name,
                                "contestant": contestant,
                                "fault": fault,
                                "seed": seed,
                                **final(
                                    task, RATES[name], contestant, fault, seed, runs
                                ),
                            }
                        )
            rows += compared(found)
            print(
                table(name, summarize([row for row in rows if row["task"] == name])),
                flush=True,
            )
    summary = summarize(rows)
    print(overall(summary))
    return {"runs": rows, "summary": summary}


def made(name: str, data: Path) -> Task:
    """A task; digits with an MLP, which trains in a second."""
    task = TASKS[name](data)
    if name != "digits":
        return task
    return task._replace(
        recipe=task.recipe.with_(
            model=partial(lepton.models.MLP, (64, 64, 10)),
            steps=500,
            batch_size=50,
            evaluate_every=100,
            preprocess=_flat,
        )
    )


def _flat(pixels: Any) -> Any:
    return pixels.reshape(pixels.shape[0], -1).astype("float32") / 16


def _remember_programs(folder: Path) -> None:
    """Runs that differ in their data or seed alone are compiled once."""
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
    """Final test loss of one run, the steps it skipped, and the rollbacks it made; an
    infinite loss where it ended in error.
    """
    recipe = task.recipe
    train, preprocess = spoiled(
        recipe,
        fault,
        seed,
        contestant == "bound",
    )
    steps = len(train[1]) // recipe.batch_size
    test = (task.report.inputs, task.report.targets)
    if contestant == "share":
        classes = int(train[1].max()) + 1
        recipe = recipe.with_(
            loss=partial(_likelihood, classes=classes),
            metrics={},
        )
        train = (
            train[0],
            {
                "label": train[1],
                "share": share_of_wrong(
                    recipe,
                    fault,
                    train[1],
                ),
            },
        )
        test = (
            test[0],
            {"label": test[1], "share": np.zeros(test[1].shape, np.float32)},
        )
    test = (
        test
        if preprocess is recipe.preprocess
        else (_prepared(recipe, test[0]), test[1])
    )
    asks: tuple[Any, ...] = ()
    if fault == "rate":
        mailbox.POLL_SECONDS = 0.0  # so that it acts at the same step in each run
        asks = (
            _Person(
                folder,
                int(AT * steps),
                1000 * rate,
            ),
        )
    trainer = lepton.Trainer(
        recipe.with_(
            train=train,
            test=test,
            shuffle=False,
            seed=seed,
            preprocess=preprocess,
            controller=CONTESTANTS[contestant](),
            steps=steps,
            evaluate_every=steps,
            save_every=steps // 12,
            log_every=10,
            learning_rate=(
                rate
                if contestant == "adaptive"
                else optax.cosine_decay_schedule(rate, steps)
            ),
        ),
        devices=1,
        run_dir=folder if fault == "rate" else None,
        sinks=asks,
    )
    try:
        history = trainer.fit()
    except DivergedError as error:
        return {"loss": math.inf, "error": error.what}
    skips = sum(
        float(history[name].sum()) for name in history.names if name.endswith(":skip")
    )
    return {"loss": float(history.metrics["loss"]), "skips": skips}


class _Person:
    """Sets a learning rate while the run goes on, once, as tools/control.py would."""

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
        if not self.asked and event["kind"] == "steps" and event["last"] >= self.step:
            self.asked = True
            request = {
                "do": "set",
                "settings": {"learning_rate": f"{self.rate:g}"},
                "until": time.time() + 99,
            }
            part = self.folder / "control" / "1.part"
            part.write_text(json.dumps(request))
            part.rename(part.with_suffix(".request"))

    def close(self) -> None:
        pass


def spoiled(
    recipe: lepton.Recipe,
    fault: str,
    seed: int,
    known: bool = False,
) -> tuple[Any, Any]:
    """All samples of a run in their order, the fault among them, and the preprocessing
    for it; `known` for "bound".
    """
    steps = int(recipe.steps or 0)
    size = recipe.batch_size
    rows = _orders(recipe, len(recipe.train), seed).ravel()
    random = np.random.default_rng(1000 + seed)
    given = recipe.train.inputs, recipe.train.targets
    inputs, targets = jax.tree.map(lambda x: np.asarray(x)[rows], given)
    at = int(AT * steps)
    preprocess = recipe.preprocess
    kind, _, percent = fault.partition("-")
    if fault in ("nan", "burst", "mild"):
        span = slice(at * size, (at + (1 if fault == "nan" else BURST)) * size)
        inputs = _prepared(recipe, inputs)
        preprocess = None
        for part in jax.tree.leaves(inputs):
            if fault == "nan":
                part[span] = np.nan
            elif _real(part):
                part[span] = (
                    (50 if fault == "burst" else 1)
                    * part.std()
                    * random.normal(size=part[span].shape)
                )
            else:
                part[span] = random.integers(
                    0,
                    part.max() + 1,
                    part[span].shape,
                )
        if fault != "nan":
            targets[span] = random.permutation(targets[span].ravel()).reshape(
                targets[span].shape
            )
    elif kind in ("window", "lasting"):
        until = at + int(WINDOW * steps) if kind == "window" else steps
        wrong = random.random(targets.shape) < int(percent) / 100
        wrong[: at * size], wrong[until * size :] = False, False
        classes = 0 if _real(targets) else int(targets.max()) + 1
        other = (
            (targets + random.integers(1, classes, targets.shape)) % classes
            if classes
            else random.permutation(targets)
        )
        if known:
            right = np.flatnonzero(~wrong)
            return (
                jax.tree.map(
                    lambda x: x[right[: len(right) // size * size]], (inputs, targets)
                ),
                preprocess,
            )
        targets = np.where(wrong, other, targets).astype(targets.dtype)
    return (inputs, targets), preprocess


def share_of_wrong(
    recipe: lepton.Recipe, fault: str, targets: np.ndarray
) -> np.ndarray:
    """Of the labels of each sample's step, float32, in the shape of the targets."""
    steps = int(recipe.steps or 0)
    shares = np.zeros(targets.shape, np.float32)
    kind, _, percent = fault.partition("-")
    if kind in ("window", "lasting"):
        first = int(AT * steps)
        until = first + int(WINDOW * steps) if kind == "window" else steps
        shares[first * recipe.batch_size : until * recipe.batch_size] = (
            int(percent) / 100
        )
    return shares


def _likelihood(
    outputs: Any,
    targets: Mapping[str, Any],
    classes: int,
) -> Any:
    """Cross-entropy of labels of which a share is another one, all alike."""
    plain = lepton.losses.cross_entropy(outputs, targets["label"])
    share = targets["share"]
    right = jnp.exp(-plain)
    noisy = -jnp.log((1 - share) * right + share * (1 - right) / (classes - 1) + 1e-30)
    return jnp.where(share > 0, noisy, plain)


def possible(
    task: Task,
    fault: str,
    contestant: str,
) -> bool:
    """Whether a task can have a fault: integers are never NaN, and a row of many labels
    is not exchanged for some of them.
    """
    labels = task.recipe.train.targets
    if contestant in ("bound", "share") and not fault.startswith(("window", "lasting")):
        return False
    if (
        _real(labels)
        if contestant == "share"
        else contestant == "bound" and np.ndim(labels) > 1
    ):
        return False
    inputs = jax.eval_shape(
        task.recipe.preprocess or (lambda x: x),
        jax.tree.map(lambda x: x[:1], task.recipe.train.inputs),
    )
    return fault != "nan" or _real(inputs)


def _real(tree: Any) -> bool:
    return all(np.issubdtype(leaf.dtype, np.floating) for leaf in jax.tree.leaves(tree))


def _prepared(recipe: lepton.Recipe, inputs: Any) -> Any:
    """Inputs as the model sees them, so that a fault is not cut down to a pixel's
    range.
    """
    return jax.tree.map(
        np.array, recipe.preprocess(inputs) if recipe.preprocess else inputs
    )


# ---- the tables ----


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each run with its loss over that of its contestant's clean run, and over the
    plain clean run's, of the same seed.
    """
    clean = {
        (r["contestant"], r["seed"]): r["loss"] for r in rows if r["fault"] == "clean"
    }
    return [
        {
            **r,
            "ratio": r["loss"] / clean[r["contestant"], r["seed"]],
            "to_plain": r["loss"] / clean.get(("plain", r["seed"]), math.nan),
        }
        for r in rows
    ]


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a task, contestant and fault: means, least and largest over the seeds."""
    summary = []
    for key in dict.fromkeys((r["task"], r["contestant"], r["fault"]) for r in rows):
        own = [r for r in rows if (r["task"], r["contestant"], r["fault"]) == key]
        ratios = [r["ratio"] for r in own]
        losses = [r["loss"] for r in own]
        mean = statistics.fmean(losses)
        summary.append(
            {
                "task": key[0],
                "contestant": key[1],
                "fault": key[2],
                "loss": mean,
                "ratio": statistics.fmean(ratios),
                "least": min(ratios),
                "largest": max(ratios),
                "to_plain": statistics.fmean(r["to_plain"] for r in own),
                "spread": (
                    statistics.pstdev(losses) / mean
                    if math.isfinite(mean)
                    else math.nan
                ),
                "skips": statistics.fmean(r.get("skips", math.nan) for r in own),
            }
        )
    return summary


def table(task: str, summary: Sequence[Mapping[str, Any]]) -> str:
    """A task's faults by contestant: the mean of the ratios (least to largest)."""
    names = list(dict.fromkeys(r["contestant"] for r in summary))
    lines = [f"{task:14}" + "".join(f"{name:>24}" for name in names)]
    for fault in dict.fromkeys(r["fault"] for r in summary):
        row = {r["contestant"]: r for r in summary if r["fault"] == fault}
        if fault == "clean":
            cells = [
                f"{row[n]['loss']:.4g} +-{row[n]['spread']:.1%}"
                f" ({row[n]['to_plain']:.3f})"
                for n in names
            ]
        else:
            three = {
                n: [_short(r[key]) for key in ("ratio", "least", "largest")]
                for n, r in row.items()
            }
            cells = [
                "{} ({} to {})".format(*three[n]) if n in three else "-" for n in names
            ]
        lines.append(f"  {fault:12}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def overall(summary: Sequence[Mapping[str, Any]]) -> str:
    """By contestant: in how many of the task's faults the mean is within 1 % of the
    clean run.
    """
    lines = []
    for name in dict.fromkeys(r["contestant"] for r in summary):
        own = [r for r in summary if r["contestant"] == name and r["fault"] != "clean"]
        outside = [
            f"{r['task']} {r['fault']} {_short(r['ratio'])}"
            for r in own
            if not r["ratio"] <= 1 + TOLERANCE
        ]
        lines.append(
            f"{name}: {len(own) - len(outside)} of {len(own)} within 1 %"
            + (f"; not {', '.join(outside)}" if outside else "")
        )
    return "\n".join(lines)


def _short(ratio: float) -> str:
    return "error" if math.isinf(ratio) else f"{ratio:.3f}" if ratio < 100 else ">100"

"""How much smaller models get, and what it costs them.

`tools.bench shrink --data FOLDER [--case mnist ...]`. FOLDER holds `mnist/` (four idx
files), `rt_polarity/sentence_polarity.zip` and `adult/` (two files). The cases:

- mnist, encoder, table: a CNN, a Transformer encoder and an MLP, trained briefly, and
  quantized in each way: the metric on the test rows, bytes of weights, milliseconds of
  a batch.
- prune: the MNIST CNN with half of its channels cut, all of them and where that is
  quicker on this device, and trained for one pass more, next to the whole one trained
  for the same pass.
- distil: an MLP that learns 2,000 rows from the MNIST CNN's artifact, and the same one
  by itself, on three seeds.

No setting was chosen by these test rows. The student's was chosen on 10,000 of the
training rows, with another teacher.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import lepton_jax as lepton
from lepton_jax.cli.settings import load
from lepton_jax.ship import Artifact, shrink
from tools.bench import options as checks

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
BATCHES = (1, 64)  # rows of the batches that are timed
SECONDS = 1.0  # of a timing
ROWS = 200  # stored in an artifact
SEEDS = (0, 1, 2)
STUDENT = (784, 64, 10)  # widths of the student, an MLP
STUDENT_ROWS = 2000  # of the 60,000: where labels are few, a teacher knows more
STUDENT_EPOCHS = 20.0
SHARE = 0.5  # of the channels that are cut
RATE = 1e-3  # for the pass after the cut: a third of the recipe's peak


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `shrink` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "shrink",
        __doc__,
        "how much smaller models get, and what it costs them",
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="folder of the public data sets",
    )
    parser.add_argument(
        "--case",
        nargs="+",
        default=list(CASES),
        metavar="CASE",
        help=f"of {', '.join(CASES)} (default: all)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the cases that were asked for; return their figures."""
    checks.check_names(options.case, CASES, "--case", "case")
    results = {}
    models = Models(options.data)
    for name in options.case:
        began = time.perf_counter()
        results[name] = CASES[name](models)
        results[name]["seconds"] = round(time.perf_counter() - began, 1)
    return results


class Models:
    """The trained models, each trained once.

    Args:
      data: folder of the data sets.
    """

    def __init__(self, data: Path):
        self._data = data
        self._trained: dict[str, lepton.Trainer] = {}

    def get(
        self,
        name: str,
    ) -> lepton.Trainer:
        """Return a trained model by its name."""
        if name not in self._trained:
            recipe = getattr(self, f"_{name}")()
            trainer = lepton.Trainer(recipe, devices=1)
            trainer.fit()
            print(f"{name}: {_figures(trainer.evaluate())}", flush=True)
            self._trained[name] = trainer
        return self._trained[name]

    def _mnist(self) -> lepton.Recipe:
        recipe = load(RECIPES / "mnist_cnn.py")
        return recipe(data=self._data / "mnist", epochs=1, augment=False)

    def _encoder(self) -> lepton.Recipe:
        recipe = load(RECIPES / "text_classifier.py")
        file = self._data / "rt_polarity" / "sentence_polarity.zip"
        return recipe(data=file, model="encoder", folds=10, fold=0, epochs=2)

    def _table(self) -> lepton.Recipe:
        recipe = load(RECIPES / "csv_mlp.py")
        folder = self._data / "adult"
        return recipe(
            data=folder / "adult.data.gz",
            test=folder / "adult.test.gz",
            test_skip=1,
            label="column_15",
            label_end=".",
            epochs=1,
        )


def quantized(
    models: Models,
    name: str,
) -> dict[str, Any]:
    """Quantize a model in each way."""
    trainer = models.get(name)
    smaller = {kind: shrink.quantize(trainer, kind) for kind in shrink.KINDS}
    whole = measured(trainer)
    figures: dict[str, Any] = {"as it is": whole}
    for kind, model in smaller.items():
        small = measured(model)
        small["points"] = 100 * (small["accuracy"] - whole["accuracy"])
        small["share"] = small["bytes"] / whole["bytes"]
        small["file_share"] = small["file_bytes"] / whole["file_bytes"]
        figures[kind] = small
    _time(figures, [trainer, *smaller.values()])
    for kind in smaller:
        small = figures[kind]
        print(
            f"  {name} {kind}: {small['points']:+.2f} points,"
            f" {100 * small['file_share']:.1f} % of the weights' file, {_times(small)}",
            flush=True,
        )
    return figures


def pruned(models: Models) -> dict[str, Any]:
    """Cut half of the channels of the MNIST CNN, and train it for one pass more."""
    trainer = models.get("mnist")
    settings = {"learning_rate": RATE, "controller": ()}
    groups = [group.name for group in shrink.channels(trainer)]
    only = shrink.quicker(trainer, SHARE)
    trained = {
        "whole": trainer.with_module(trainer.module(), **settings),
        "half of all channels": shrink.cut(trainer, SHARE, **settings),
        "half where it is quicker": shrink.cut(trainer, SHARE, only=only, **settings),
    }
    figures: dict[str, Any] = {}
    for name, model in trained.items():
        before = float(model.evaluate().accuracy)
        model.fit(epochs=1)
        figures[name] = {"before_training": before, **measured(model)}
    _time(figures, list(trained.values()))
    whole = figures["whole"]
    for name, own in figures.items():
        own["points"] = 100 * (own["accuracy"] - whole["accuracy"])
        own["share"] = own["bytes"] / whole["bytes"]
        for rows in BATCHES:
            milliseconds = f"milliseconds_{rows}"
            own[f"speed_up_{rows}"] = whole[milliseconds] / own[milliseconds]
        print(
            f"  {name}: {own['accuracy']:.4f}, {own['points']:+.2f} points,"
            f" {100 * own['share']:.1f} % of the weights, {_times(own)},"
            f" {own['speed_up_64']:.2f} times as fast with 64 rows",
            flush=True,
        )
    left = [name for name in groups if name not in only]
    return figures | {"left_whole_where_quicker": left}


def distilled(models: Models) -> dict[str, Any]:
    """Train a small model by itself, and from the CNN's artifact."""
    teacher = models.get("mnist")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "teacher.lepton"
        Artifact.of(teacher, rows=0).save(place)
        artifact = Artifact.open(place)
        alone = student(teacher.recipe)
        taught = shrink.distilled(alone, artifact)
    figures: dict[str, Any] = {"teacher": float(teacher.evaluate().accuracy)}
    for seed in SEEDS:
        pair = {}
        for name, recipe in (("alone", alone), ("distilled", taught)):
            trainer = lepton.Trainer(recipe.with_(seed=seed), devices=1)
            trainer.fit()
            pair[name] = float(trainer.evaluate().accuracy)
        figures[f"seed {seed}"] = pair
        print(f"  distil, seed {seed}: {pair}", flush=True)
    return figures


def student(recipe: lepton.Recipe) -> lepton.Recipe:
    """Return the recipe of a small MLP, on few of the rows."""
    few = recipe.train.take(np.arange(STUDENT_ROWS))
    return recipe.with_(
        model=partial(lepton.models.MLP, STUDENT),
        train=lepton.data.Arrays(*few),
        learning_rate=3e-3,
        batch_size=64,
        epochs=STUDENT_EPOCHS,
    )


def measured(trainer: lepton.Trainer) -> dict[str, Any]:
    """Return accuracy and bytes of a model."""
    with tempfile.TemporaryDirectory() as folder:
        place = Artifact.of(trainer, rows=ROWS).save(Path(folder) / "model.lepton")
        file = (place / "weights.safetensors").stat().st_size
        program = (place / "program.stablehlo").stat().st_size
    return {
        "accuracy": float(trainer.evaluate().accuracy),
        "bytes": shrink.size_of(trainer),
        "file_bytes": file,
        "program_bytes": program,
    }


def _time(figures: dict[str, Any], trainers: list[lepton.Trainer]) -> None:
    """Add the milliseconds of models that are called in turns."""
    for rows in BATCHES:
        times = shrink.latencies_of(trainers, rows, SECONDS)
        for own, milliseconds in zip(figures.values(), times, strict=True):
            own[f"milliseconds_{rows}"] = milliseconds


def _times(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{figures[f'milliseconds_{rows}']:.2f} ms for {rows}" for rows in BATCHES
    )


def _figures(evaluation: Any) -> str:
    pairs = evaluation._asdict().items()
    return ", ".join(f"{name} {value:.4f}" for name, value in pairs)


CASES: dict[str, Callable[[Models], dict[str, Any]]] = {
    "mnist": partial(quantized, name="mnist"),
    "encoder": partial(quantized, name="encoder"),
    "table": partial(quantized, name="table"),
    "prune": pruned,
    "distil": distilled,
}

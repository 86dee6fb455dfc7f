"""How fast data come, and how long a step waits for them.

`tools.bench data` measures three things:

- "wait": the share of the steps' time in which `Trainer.fit` waits for data, for the
  CNN of MNIST, the language model of `recipes/lm.py`, and a CNN that learns cats and
  dogs from JPEG files: as it is by default, where decoded pictures are held in memory
  as long as the budget allows, and "anew", where each step decodes its own.
- "alone": batches a second of the feed alone, over those of a Grain pipeline that was
  tuned by hand: for each, the best of several numbers of threads, of what is read ahead
  and of worker processes is looked for first. Both put the batches on the device.
- "mixture": threads and memory of a process that reads 35 mixed sources, over those of
  one that reads 2 with as many bytes in all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import lepton_jax as lepton
from lepton_jax.errors import SettingError
from recipes import lm, mnist_cnn
from tools.bench import data_rivals
from tools.bench import options as checks
from tools.bench.timing import seconds_of, spread, spread_of_ratios

PARTS = ("wait", "alone", "mixture")
REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

# Of the pictures: pixels a side, and how many a step takes.
SIDE = 64
BATCH = 32

# Length of a slice of the feed alone, in seconds. Assumption: long enough for threads
# to be added, and short enough that both sides meet the same disturbances.
SLICE_SECONDS = 2.0
# Batches that either side has read ahead at most: `readahead.MOST_AHEAD`, and Grain's
# 500 samples.
MOST_READ_AHEAD = 64
WARM_STEPS = 20  # before a wait is measured: compiled, and as many threads as it takes
NEVER = 10**9  # steps between evaluations

# Of the mixture: rows in all, and columns of each.
ROWS = 420_000
COLUMNS = 64
MANY = 35
FEW = 2
MIXTURE_BATCHES = 400


class Case(NamedTuple):
    """A data set as this library and as Grain read it.

    Attributes:
      train: for the feed.
      rival: options of Grain to an iterator of batches on the device.
      batch_size: samples of a batch.
    """

    train: Any
    rival: Callable[[data_rivals.Options], Iterator[Any]]
    batch_size: int


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `data` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "data",
        __doc__,
        "how fast data come, and how long a step waits for them",
    )
    checks.add_timing(parser, rounds=7, seconds=SLICE_SECONDS)
    parser.add_argument(
        "--data",
        type=Path,
        default=REAL_DATA,
        metavar="FOLDER",
        help="mnist/, tinyshakespeare/, cats_dogs_subset/ (default: %(default)s)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=list(PARTS),
        metavar="PART",
        help=f"of {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=200,
        metavar="N",
        help="steps over which a wait is measured (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure what is asked for, and print a line for each figure.

    Raises:
      SettingError: no such part, or no such folder.
    """
    checks.check_names(options.only, PARTS, "--only", "part")
    checks.check_positive(options, "rounds", "seconds", "steps")
    if not options.data.is_dir():
        raise SettingError(
            "there is no such folder",
            where=options.data,
            remedy="name a folder of real data: --data FOLDER",
        )
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if "wait" in options.only or "alone" in options.only:
            _unpack(options.data, work)
        if "wait" in options.only:
            results["wait"] = _waits(
                options.data,
                work,
                options.steps,
            )
        if "alone" in options.only:
            cases = _cases(options.data, work)
            results["alone"] = {
                name: _alone(
                    name,
                    case,
                    options.rounds,
                    options.seconds,
                )
                for name, case in cases.items()
            }
        if "mixture" in options.only:
            results["mixture"] = _mixtures(work)
    return results


def _unpack(
    data: Path,
    work: Path,
) -> None:
    archive = data / "cats_dogs_subset" / "cats_dogs_600.tar"
    with tarfile.open(archive) as tar:
        tar.extractall(work / "pictures", filter="data")


# ---- how long a step waits ----


def _waits(
    data: Path,
    work: Path,
    steps: int,
) -> dict[str, Any]:
    recipes = {
        "mnist-cnn": mnist_cnn.recipe(data=data / "mnist"),
        "lm": lm.recipe(text=data / "tinyshakespeare" / "input.txt"),
        "cats-dogs": _cats_and_dogs(_pictures(work)),
        "cats-dogs anew": _cats_and_dogs(_forgetful(work)),
    }
    results = {}
    for name, recipe in recipes.items():
        results[name] = _wait(recipe, steps)
        share = results[name]["share"]
        print(f"wait     {name:14} {share:7.3%} of the steps' time", flush=True)
    return results


def _wait(
    recipe: lepton.Recipe,
    steps: int,
) -> dict[str, Any]:
    """Return the share of the steps' time that the second fit of a trainer waits."""
    plain = recipe.with_(
        test=None,
        evaluate_every=NEVER,
        save_every=NEVER,
    )
    trainer = lepton.Trainer(plain, devices=1)
    trainer.fit(steps=WARM_STEPS)
    history = trainer.fit(steps=steps)
    return {
        "share": history.data_wait_share,
        "wait_seconds": history.data_wait,
        "steps_seconds": history.window_seconds,
        "steps": history.steps,
    }


def _cats_and_dogs(pictures: Any) -> lepton.Recipe:
    return lepton.Recipe(
        name="cats_dogs",
        model=partial(
            lepton.models.CNN,
            2,
            size=(SIDE, SIDE, 3),
            widths=(32, 64, 64),
        ),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        preprocess=lambda pixels: pixels.astype("float32") / 255,
        optimizer=optax.adamw,
        learning_rate=1e-3,
        train=pictures.augment(
            _flip,
            batched=True,
        ),
        batch_size=BATCH,
        steps=NEVER,
    )


def _flip(
    keys: np.ndarray,
    pixels: np.ndarray,
    labels: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Mirror half of the pictures."""
    mirrored = (
        lepton.data.uniform(
            keys,
            1,
        )[:, 0]
        < 0.5
    )
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    return pixels, labels


def _pictures(work: Path) -> Any:
    """Return the pictures as a source."""
    return lepton.data.pictures(
        work / "pictures",
        SIDE,
        SIDE,
    )


def _forgetful(work: Path) -> Any:
    """Return the pictures as a source that holds none of them in memory."""
    source = _pictures(work)
    source.data.is_held = False
    return source


# ---- the feed alone ----


def _cases(
    data: Path,
    work: Path,
) -> dict[str, Case]:
    pixels = lepton.data.read_idx(data / "mnist" / "train-images-idx3-ubyte.gz")
    labels = lepton.data.read_idx(data / "mnist" / "train-labels-idx1-ubyte.gz")
    data_rivals.write_rows(work, pixels, labels)
    recipe = lm.recipe(text=data / "tinyshakespeare" / "input.txt")
    files = sorted((work / "pictures").rglob("*.jpg"))
    classes = [int(file.parent.name == "dog") for file in files]
    return {
        "mnist-cnn": Case(
            lepton.data.shards(
                work / "parquet",
                inputs="pixels",
                target="label",
            ),
            partial(data_rivals.records, work / "mnist.arrayrecord"),
            128,
        ),
        "lm": Case(
            recipe.train,
            partial(
                data_rivals.windows,
                recipe.train.inputs,
                recipe.train.targets,
            ),
            recipe.batch_size,
        ),
        "cats-dogs": Case(
            _forgetful(work),
            partial(data_rivals.jpegs, files, classes, SIDE),
            BATCH,
        ),
    }


def _alone(
    name: str,
    case: Case,
    rounds: int,
    seconds: float,
) -> dict[str, Any]:
    """Return batches a second of both sides, and their ratio."""
    feed = lepton.data.open_feed(
        case.train,
        batch_size=case.batch_size,
        steps=1,
        sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        shuffle=True,
    )
    tuned = _tuned(case)
    rival = case.rival(tuned)
    runs = {
        "lepton": partial(_pull, feed),
        "grain": partial(
            _pull,
            rival,
        ),
    }
    for pull in runs.values():
        _seconds_a_batch(pull, seconds)  # threads are added
    took = {name: _seconds_a_batch(pull, seconds / 2) for name, pull in runs.items()}
    steps = {name: max(1, round(seconds / each)) for name, each in took.items()}
    pause = MOST_READ_AHEAD * max(took.values())
    ms = _in_rounds(runs, steps, rounds, pause)
    measured = feed.measured()
    feed.close()
    rival.close()

    ratios = spread_of_ratios(ms["grain"], ms["lepton"])
    rate = case.batch_size * 1e3 / statistics.median(ms["lepton"])
    print(
        f"alone    {name:10} {ratios['median']:6.2f} times Grain's samples/s"
        f" ({ratios['min']:.2f}-{ratios['max']:.2f}); {rate:,.0f} samples/s;"
        f" Grain with {tuned}",
        flush=True,
    )
    return {
        "ratio": ratios,
        "ms_a_batch": {contender: spread(values) for contender, values in ms.items()},
        "batch_size": case.batch_size,
        "grain": tuned._asdict(),
        "lepton": measured,
    }


def _in_rounds(
    runs: dict[str, Callable[[int], None]],
    steps: dict[str, int],
    rounds: int,
    pause: float,
) -> dict[str, list[float]]:
    """Return milliseconds a batch of each side in each round.

    Before a slice the other side fills its buffers, so that it does not read meanwhile;
    what this side has read ahead does not count.

    Args:
      runs: pull a number of batches.
      steps: batches of a slice.
      rounds: how many.
      pause: seconds in which buffers are filled.
    """
    ms: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds):
        names = list(runs) if number % 2 else list(runs)[::-1]
        for name in names:
            time.sleep(pause)
            runs[name](MOST_READ_AHEAD)
            seconds = seconds_of(runs[name], steps[name])
            ms[name].append(seconds / steps[name] * 1e3)
    return ms


def _tuned(case: Case) -> data_rivals.Options:
    """Return the options with which Grain is fastest."""
    rates = {}
    for options in data_rivals.CANDIDATES:
        batches = case.rival(options)
        pull = partial(_pull, batches)
        _seconds_a_batch(pull, SLICE_SECONDS / 2)
        rates[options] = _seconds_a_batch(pull, SLICE_SECONDS / 2)
        batches.close()
    return min(rates, key=rates.__getitem__)


def _pull(
    batches: Iterator[Any],
    count: int,
) -> None:
    for batch in islice(batches, count):
        jax.block_until_ready(batch)


def _seconds_a_batch(
    pull: Callable[[int], None],
    seconds: float,
) -> float:
    pull(MOST_READ_AHEAD)
    began = time.perf_counter()
    count = 0
    while time.perf_counter() - began < seconds:
        pull(4)
        count += 4
    return (time.perf_counter() - began) / count


# ---- many sources ----


def _mixtures(work: Path) -> dict[str, Any]:
    results = {}
    for count in (FEW, MANY):
        folder = work / f"mixture-{count}"
        data_rivals.write_sources(folder, count, ROWS, COLUMNS)
        results[str(count)] = _in_a_process(folder)
    few, many = results[str(FEW)], results[str(MANY)]
    ratios = {key: many[key] / few[key] for key in ("threads", "bytes")}
    print(
        f"mixture  {MANY} to {FEW} sources: {ratios['threads']:.2f} times the threads"
        f" ({many['threads']}), {ratios['bytes']:.3f} times the memory"
        f" ({many['bytes'] / 2**20:.0f} MiB),"
        f" {many['seconds'] / few['seconds']:.2f} times the time",
        flush=True,
    )
    return {**results, "ratio": ratios}


def _in_a_process(folder: Path) -> dict[str, Any]:
    """Return threads, memory and seconds of a process that reads mixed sources."""
    command = [sys.executable, "-m", "tools.bench.data_mixture", str(folder)]
    done = subprocess.run(
        [*command, str(MIXTURE_BATCHES)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    return json.loads(done.stdout.splitlines()[-1])

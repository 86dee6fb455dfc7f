"""How near generated pictures come to real ones.

`tools.bench generation RUN --data FOLDER`. RUN is the run of a recipe whose model has a
method `samples`, trained on the idx files of FOLDER. A small CNN learns the classes
from the training file first. In its last features, 64 numbers a picture, the Fréchet
distance is computed (Heusel et al. 2017, "GANs trained by a two time-scale update
rule", section 3): between the two halves of the test file, which is the floor, and
between as many generated pictures and a half. As many training pictures and a half show
what a generator can reach that learned the training file perfectly. Then

- how many of the generated pictures the CNN takes for each class, and chi-square of
  these counts against those of the test file;
- how near the nearest training picture is, to a generated one and to one of the test
  file: much nearer is a sign of pictures that were learned by heart.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import lepton_jax as lepton
from lepton_jax.cli import settings
from tools.bench import options as checks

SPLITS = 5  # of the test file into halves
JUDGE_EPOCHS = 3  # of the CNN in whose features distances are taken
CHUNK = 500  # pictures that are made, or looked at, in one call
NEIGHBOURS = 500  # pictures of which the nearest training picture is found
SEED = 0


def add(
    commands: Any,
    shared: argparse.ArgumentParser,
) -> None:
    """Add `generation` to the subcommands."""
    parser = checks.add_command(
        commands,
        shared,
        "generation",
        __doc__,
        "how near generated pictures come to real ones",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="the four idx files that it was trained on",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Judge a run; print and return the figures."""
    train, test = lepton.data.idx(options.data)
    judge = _judge(train, test)
    half = len(test) // 2
    made = generated(options.folder, options.data, half)
    results = {
        "pictures": half,
        **_distances(judge, made, train, test),
        **_classes(judge, made, test),
        **_nearest(made, train, test),
    }
    for name, value in results.items():
        print(f"{name:28} {value}")
    return results


def generated(folder: Path, data: Path, count: int) -> np.ndarray:
    """Return pictures of a run's model, (count, height, width, channels), 0 to 1.

    Args:
      folder: of the run, whose recipe is called again with its settings.
      data: folder of idx files.
      count: of pictures.
    """
    record = json.loads((folder / "recipe.json").read_text())
    recipe = settings.load(Path(record["file"]))
    given = record["settings"] | {"data": data}
    module = lepton.Trainer(settings.call(recipe, given)).load(folder).module()
    graph, state = nnx.split(module)

    @jax.jit
    def make(state: Any, key: Any) -> Any:
        return nnx.merge(graph, state).samples(key, CHUNK)

    keys = jax.random.split(jax.random.key(SEED), -(-count // CHUNK))
    return np.concatenate([np.asarray(make(state, key)) for key in keys])[:count]


def frechet_distance(left: np.ndarray, right: np.ndarray) -> float:
    """Return the Fréchet distance of two normal distributions fitted to features.

        |m - n|^2 + trace(C + D - 2 (C D)^(1/2))

    for means m and n and covariances C and D. The trace of the square root is the sum
    of the square roots of the eigenvalues of C D, which are real and not negative.

    Args:
      left: features, (pictures, features).
      right: features of other pictures, likewise.
    """
    left = np.asarray(left, np.float64)
    right = np.asarray(right, np.float64)
    apart = np.square(left.mean(0) - right.mean(0)).sum()
    first = np.cov(left.T)
    second = np.cov(right.T)
    values = np.linalg.eigvals(first @ second).real.clip(0)
    common = np.sqrt(values).sum()
    return float(apart + np.trace(first) + np.trace(second) - 2 * common)


def _judge(train: Any, test: Any) -> Any:
    """Train a small CNN; return a function of pictures to (features, labels)."""
    size = train.inputs.shape[1:]
    steps = JUDGE_EPOCHS * len(train) // 128
    trainer = lepton.Trainer(
        model=partial(lepton.models.CNN, 10, size=size, padding="VALID"),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        preprocess=partial(lepton.data.divided, by=255),
        optimizer=optax.adam,
        learning_rate=optax.cosine_decay_schedule(2e-3, steps),
        train=train,
        test=test,
        seed=SEED,
    )
    trainer.fit(steps=steps)
    print(f"judge: accuracy {trainer.evaluate().accuracy:.4f}", flush=True)
    module = trainer.module()
    output = module.out
    module.out = nnx.data(_Same())
    graph, state = nnx.split((module, output))

    @jax.jit
    def look(state: Any, pictures: Any) -> tuple[Any, Any]:
        module, output = nnx.merge(graph, state)
        features = module(pictures)
        return features, output(features).argmax(-1)

    def judge(pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            look(state, pictures[begin : begin + CHUNK])
            for begin in range(0, len(pictures), CHUNK)
        ]
        features = [np.asarray(part[0]) for part in parts]
        labels = [np.asarray(part[1]) for part in parts]
        return np.concatenate(features), np.concatenate(labels)

    return judge


class _Same(nnx.Module):
    """The identity, in place of the layer that makes logits of features."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def _distances(
    judge: Any,
    made: np.ndarray,
    train: Any,
    test: Any,
) -> dict[str, float]:
    """Return the mean distances to halves of the test file, over SPLITS of them."""
    count = len(made)
    generator = np.random.default_rng(SEED)
    chosen = np.random.default_rng(SEED).choice(len(train), count, replace=False)
    features = {
        "training": judge(_levels(train)[chosen])[0],
        "generated": judge(made)[0],
    }
    real = judge(_levels(test))[0]
    distances: dict[str, list[float]] = {"real_halves": []}
    distances |= {name: [] for name in features}
    for _ in range(SPLITS):
        order = generator.permutation(len(real))
        half = real[order[:count]]
        other = real[order[count:]]
        distances["real_halves"].append(frechet_distance(half, other))
        for name, looked in features.items():
            distances[name].append(frechet_distance(looked, half))

    means = {name: float(np.mean(found)) for name, found in distances.items()}
    floor = means["real_halves"]
    return {f"distance_of_{name}": mean for name, mean in means.items()} | {
        f"times_the_floor_{name}": means[name] / floor for name in features
    }


def _classes(judge: Any, made: np.ndarray, test: Any) -> dict[str, Any]:
    counts = np.bincount(judge(made)[1], minlength=10)
    shares = np.bincount(np.asarray(test.targets), minlength=10) / len(test)
    expected = shares * len(made)
    return {
        "of_each_class": counts.tolist(),
        "chi_square_of_9": float(((counts - expected) ** 2 / expected).sum()),
    }


def _nearest(made: np.ndarray, train: Any, test: Any) -> dict[str, float]:
    known = _levels(train).reshape(len(train), -1)
    squares = np.square(known).sum(1)

    def median(pictures: np.ndarray) -> float:
        some = pictures[:NEIGHBOURS].reshape(min(NEIGHBOURS, len(pictures)), -1)
        square = np.square(some).sum(1)[:, None] + squares - 2 * some @ known.T
        return float(np.median(np.sqrt(square.min(1).clip(0))))

    return {
        "nearest_to_generated": median(made),
        "nearest_to_test": median(_levels(test)),
    }


def _levels(data: Any) -> np.ndarray:
    """Return pictures as float32 from 0 to 1."""
    return np.asarray(data.inputs, np.float32) / 255

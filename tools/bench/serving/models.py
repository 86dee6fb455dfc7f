"""Artifacts to serve: of networks that are trained for two steps on noise.

What a request costs does not depend on what a network has learned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optax

import lepton_jax as lepton

ROWS = 256
CLASSES = 10
SEED = 0


@dataclass(frozen=True)
class Case:
    """A model to serve.

    Attributes:
      about: what it is.
      model: builds it.
      row: extents of an input's row, float32.
    """

    about: str
    model: Callable[..., Any]
    row: tuple[int, ...]


CASES = {
    "digits": Case(
        "recipes/digits_cnn's network: 8x8 pixels, 3 convolutions",
        partial(
            lepton.models.CNN,
            CLASSES,
            size=(8, 8, 1),
            widths=(32, 64, 64),
            dense=64,
            batch_norm=True,
        ),
        (8, 8, 1),
    ),
    "mnist": Case(
        "recipes/mnist_cnn's network: 28x28 pixels, 3 convolutions",
        partial(lepton.models.CNN, CLASSES),
        (28, 28, 1),
    ),
    "mlp": Case(
        "784 inputs, 3 layers of 4096: weights that one row reads as 64 do",
        partial(lepton.models.MLP, (784, 4096, 4096, 4096, CLASSES)),
        (784,),
    ),
}


def make(name: str, place: Path) -> None:
    """Write the artifact of a case."""
    case = CASES[name]
    draw = np.random.default_rng(SEED)
    inputs = draw.normal(size=(ROWS, *case.row)).astype(np.float32)
    targets = draw.integers(0, CLASSES, ROWS).astype(np.int32)
    trainer = lepton.Trainer(
        lepton.Recipe(
            name=name,
            model=case.model,
            loss=lepton.losses.cross_entropy,
            optimizer=optax.sgd,
            learning_rate=1e-3,
            train=(inputs, targets),
            batch_size=64,
            steps=2,
        ),
        devices=1,
    )
    trainer.fit()
    lepton.Artifact.of(trainer, name, rows=64).save(place)

"""Handwritten digits with a convolutional network."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import optax

import lepton_jax as lepton

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

from recipes import _digits

EPOCHS = {False: 5, True: 40}  # of many images, and of few; assumption
WARMUP = 0.1  # share of the steps in which the learning rate rises; assumption

# Turns of 10 degrees, moves of 2 of 28 pixels and a tenth in size: what people's hands
# differ by (assumption).
CHANGES = (
    lepton.augment.Affine(
        degrees=10,
        shift=2 / 28,
        zoom=(0.9, 1.1),
    ),
)


def recipe(
    data: Path | None = None,
    prepared: Path | None = None,
    width: int = 32,
    dropout: float = 0.3,
    augment: bool = True,
    learning_rate: float = 3e-3,
    batch_size: int = 128,
    epochs: float | None = None,
    steps: int | None = None,
    micro_batches: int | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """MNIST with a small CNN: 32-64-64 convolutions and 64 dense units.

    It gets 99.36 % of MNIST's test images right (median of three seeds: 99.40, 99.34
    and 99.36 %), where the nearest neighbours get 96.7 %. Batch norm, small random
    turns, moves and zooms, and a learning rate that rises first are what it has over a
    plain network, which gets 99.2 %. It takes some three minutes of one CPU core:

        python tools/launch.py recipes/mnist_cnn.py --data FOLDER

    Without `data` it learns scikit-learn's 1,797 digits of 8x8 pixels, enlarged to
    28x28: 99.7 % of a held-out fifth, where the nearest neighbours get 98.6 %:

        python tools/launch.py recipes/mnist_cnn.py

    Args:
      data: folder with the four idx files of MNIST, or of a set like it with 28x28
        images and ten classes.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      width: channels of the first convolution; the others, and the dense layer, have
        twice as many.
      dropout: share of the units dropped before and after the dense layer.
      augment: turn, move and zoom the training images a little, at random.
      learning_rate: of AdamW at its peak; it rises over the first tenth of the run and
        falls as a cosine to zero.
      batch_size: images per step, over all devices.
      epochs: passes over the training images; if left out, 5, or 40 where there are
        less than 10,000.
      steps: length of the run in steps, instead of epochs.
      micro_batches: parts in which a batch passes through the model.
      precision: dtype that the model computes in.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout and the order of the images.
    """
    digits = _digits.load(data, "recipes/mnist_cnn.py", prepared)
    train = digits.train
    epochs = epochs or EPOCHS[len(train) < _digits.FEW]
    total = steps or math.ceil(epochs * len(train) / batch_size)
    preprocess = lepton.augment.Augmented(
        CHANGES if augment else (),
        partial(lepton.data.grey, by=255),
    )

    return lepton.Recipe(
        name="mnist_cnn",
        model=partial(
            lepton.models.CNN,
            10,
            size=(*train.inputs.shape[1:3], 1),
            widths=(width, 2 * width, 2 * width),
            dense=2 * width,
            padding="VALID",
            batch_norm=True,
            dropout=dropout,
        ),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        metrics={"accuracy": lepton.metrics.accuracy},
        baseline=lepton.baselines.nearest,
        preprocess=preprocess,
        optimizer=optax.adamw,
        learning_rate=optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, round(WARMUP * total), total
        ),
        train=train,
        test=digits.test,
        preparation=digits.serving,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        micro_batches=micro_batches,
        precision=precision,
        save_every=save_every,
        seed=seed,
    )

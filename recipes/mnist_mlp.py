"""Handwritten digits with a multi-layer perceptron."""

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

EPOCHS = {False: 10, True: 400}  # of many images, and of few; assumption
# What few images are varied by, in training: as in recipes/mnist_cnn.py.
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
    hidden: int = 128,
    dropout: float = 0.0,
    learning_rate: float = 2e-3,
    batch_size: int = 128,
    epochs: float | None = None,
    steps: int | None = None,
    micro_batches: int | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """MNIST with a 784-128-10 perceptron.

    It gets 97.9 % of MNIST's test images right, in 9 seconds on two CPU cores, starting
    and compiling included:

        python tools/launch.py recipes/mnist_mlp.py --data FOLDER

    Without `data` it learns scikit-learn's 1,797 digits of 8x8 pixels, enlarged to
    28x28, turned, moved and zoomed a little at random: 98.6 % of a held-out fifth,
    as the nearest neighbours do.

    Args:
      data: folder with the four idx files of MNIST, or of a set like it with 28x28
        images and ten classes.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      hidden: units of the hidden layer.
      dropout: share of the hidden units dropped.
      learning_rate: of AdamW at the start; it falls as a cosine to zero.
      batch_size: images per step, over all devices.
      epochs: passes over the training images; if left out, 10, or 400 where there are
        less than 10,000.
      steps: length of the run in steps, instead of epochs.
      micro_batches: parts in which a batch passes through the model.
      precision: dtype that the model computes in.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout and the order of the images.
    """
    digits = _digits.load(data, "recipes/mnist_mlp.py", prepared)
    train = digits.train
    are_few = len(train) < _digits.FEW
    epochs = epochs or EPOCHS[are_few]
    pixels = math.prod(train.inputs.shape[1:])
    total = steps or math.ceil(epochs * len(train) / batch_size)

    return lepton.Recipe(
        name="mnist_mlp",
        model=partial(
            lepton.models.MLP,
            (pixels, hidden, 10),
            dropout=dropout,
        ),
        loss=optax.softmax_cross_entropy_with_integer_labels,
        metrics={"accuracy": lepton.metrics.accuracy},
        baseline=lepton.baselines.nearest,
        preprocess=lepton.augment.Augmented(
            CHANGES if are_few else (),
            partial(lepton.data.grey, by=255),
        ),
        optimizer=optax.adamw,
        learning_rate=optax.cosine_decay_schedule(learning_rate, total),
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

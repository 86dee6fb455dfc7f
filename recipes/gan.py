"""New pictures from a generator and a discriminator."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

import optax

import lepton_jax as lepton
from lepton_jax.models.gan import adversarial_loss

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

from recipes import _pictures

SECOND_DECAY = 0.99  # of Adam; Huang et al. 2024, "The GAN is dead", appendix


def recipe(
    data: Path | None = None,
    size: int = 32,
    prepared: Path | None = None,
    latent: int = 64,
    width: int = 32,
    penalty: float = 1.0,
    learning_rate: float = 1e-3,
    judge_rate: float = 1.0,
    first_decay: float = 0.5,
    batch_size: int = 64,
    epochs: float = 60,
    steps: int | None = None,
    average: float = 0.999,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Learn to make pictures like those that are given, by two players.

    Both know the class of a picture, and new pictures have classes as often as the
    given ones.

    With MNIST, five epochs take 15 to 21 minutes on a CPU core. 5,000 new pictures are
    1.70 times as far from half of the test file as its halves are from each other, by
    the Fréchet distance in the features of a small CNN. As many training pictures are
    1.58 times as far:

        python tools/launch.py recipes/gan.py --data FOLDER --epochs 5 --run-dir RUN
        python -m tools.bench generation RUN --data FOLDER

    Args:
      data: a folder with the four idx files of MNIST, or of a set like it; or a folder
        or an archive with a folder of images for each class. If left out,
        scikit-learn's digits of 8x8 pixels.
      size: height and width that images get, in pixels; idx files keep their own.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      latent: length of the noise that a picture is made from.
      width: channels of the layers nearest to the pictures, of both players.
      penalty: weight of the discriminator's squared slopes.
      learning_rate: of Adam, for the generator; it falls to zero in the second half.
      judge_rate: the discriminator's rate as a multiple of it.
      first_decay: of Adam's mean of the gradients.
      batch_size: pictures per step, over all devices.
      epochs: passes over the training pictures.
      steps: length of the run in steps, instead of epochs.
      average: decay of the moving average of the parameters that is sampled from.
      precision: dtype that the model computes in.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, the noise and the order of the pictures.
    """
    pictures = _pictures.load(data, size, "recipes/gan.py", prepared, True)
    total = steps or math.ceil(epochs * len(pictures.train) / batch_size)
    half = total // 2
    adam = partial(_adam, first_decay=first_decay)

    return lepton.Recipe(
        name="gan",
        model=partial(
            lepton.models.GAN,
            pictures.size,
            shares=pictures.shares,
            latent=latent,
            width=width,
        ),
        loss=partial(adversarial_loss, penalty=penalty),
        preprocess=partial(_pictures.between_one, brightest=pictures.brightest),
        optimizer=lepton.optimizers.by_part(
            {
                "generator/*": adam,
                "discriminator/*": partial(adam, times=judge_rate),
            }
        ),
        learning_rate=optax.linear_schedule(
            learning_rate,
            0.0,
            total - half,
            transition_begin=half,
        ),
        controller=lepton.controllers.averaging(average),
        train=pictures.train,
        test=pictures.test,
        preparation=pictures.serving,
        batch_size=batch_size,
        steps=total,
        precision=precision,
        save_every=save_every,
        seed=seed,
    )


def _adam(
    learning_rate: Any,
    first_decay: float,
    times: float = 1.0,
) -> optax.GradientTransformation:
    """Return Adam for one of the players."""
    adam = optax.adam(learning_rate, b1=first_decay, b2=SECOND_DECAY)
    return optax.chain(adam, optax.scale(times))

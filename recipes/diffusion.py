"""New pictures from noise, step by step."""

from __future__ import annotations

import math
import sys
from functools import partial
from pathlib import Path
from typing import Literal

import optax

import lepton_jax as lepton
from lepton_jax.models.diffusion import direction_loss

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

from recipes import _pictures


def recipe(
    data: Path | None = None,
    size: int = 32,
    prepared: Path | None = None,
    width: int = 32,
    blocks: int = 1,
    dropout: float = 0.0,
    sampling_steps: int = 15,
    guidance: float = 1.6,
    learning_rate: float = 2e-3,
    batch_size: int = 64,
    epochs: float = 40,
    steps: int | None = None,
    average: float = 0.999,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Learn to make pictures like those that are given, by taking noise away.

    Args:
      data: a folder with the four idx files of MNIST, or of a set like it; or a folder
        or an archive with a folder of images for each class. If left out,
        scikit-learn's digits of 8x8 pixels.
      size: height and width that images get, in pixels; idx files keep their own.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      width: channels at half of the resolution; at a quarter there are twice as many.
      blocks: of the U-Net, on each way at each resolution.
      dropout: share of the units dropped in each block.
      sampling_steps: from noise to a picture.
      guidance: how far a picture goes the way of its class, as a multiple of how far
        that is from the way of any class.
      learning_rate: of Adam at the start; it falls as a cosine to zero.
      batch_size: pictures per step, over all devices.
      epochs: passes over the training pictures.
      steps: length of the run in steps, instead of epochs.
      average: decay of the moving average of the parameters that is sampled from.
      precision: dtype that the model computes in.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, the noise and the order of the pictures.
    """
    pictures = _pictures.load(data, size, "recipes/diffusion.py", prepared, True)
    total = steps or math.ceil(epochs * len(pictures.train) / batch_size)
    preprocess = partial(_pictures.between_one, brightest=pictures.brightest)

    return lepton.Recipe(
        name="diffusion",
        model=partial(
            lepton.models.Diffusion,
            pictures.size,
            shares=pictures.shares,
            width=width,
            blocks=blocks,
            dropout=dropout,
            steps=sampling_steps,
            guidance=guidance,
        ),
        loss=direction_loss,
        metrics={"error": direction_loss},
        baseline=partial(
            lepton.baselines.normal_direction,
            preprocess=preprocess,
            pictures="images",
        ),
        preprocess=preprocess,
        optimizer=optax.adam,
        learning_rate=optax.cosine_decay_schedule(learning_rate, total),
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

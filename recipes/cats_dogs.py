"""Cats and dogs: the image classifier with what small data needs."""

from __future__ import annotations

import sys
from pathlib import Path

import lepton_jax as lepton

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

from recipes import image_classifier

EPOCHS = 150  # passes over a few hundred images; assumption
MADE_UP_EPOCHS = 60  # over the embedded shapes, which are easier


def recipe(
    data: Path | None = None,
    size: int = 64,
    width: int = 32,
    epochs: float | None = None,
    steps: int | None = None,
    learning_rate: float = 3e-3,
    folds: int | None = 5,
    fold: int = 0,
    split_seed: int = 0,
    prepared: Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Tell cats from dogs by a few hundred pictures, without pre-training.

    It is `image_classifier` with strong augmentation, a small network, few pixels, a
    long run, a moving average of the parameters, and predictions averaged over an image
    and its mirror image: what is known to help where data is scarce. Outside of
    training images are larger by a fifth, as random crops have shown things larger.

    With 300 cats and 300 dogs it gets 76.3 % right over five folds (79.2, 76.7, 76.7,
    72.5 and 76.7 %; no setting was chosen by them). There the nearest neighbours get
    53 to 63 %, and logistic regression 53 %. A fold takes two and a half minutes of one
    CPU core:

        python tools/launch.py recipes/cats_dogs.py --data cats_dogs_600.tar --folds 5

    Without `data` it learns the made-up shapes of `image_classifier`.

    Args:
      data: a folder or an archive with a folder of images for each class.
      size: height and width that the model sees, in pixels.
      width: channels of the first convolution.
      epochs: passes over the training images; if left out, 150, or 60 without `data`.
      steps: length of the run in steps, instead of epochs.
      learning_rate: of AdamW at its peak.
      folds: parts of the images, of which one is for testing; if left out, a fifth is.
      fold: which part, from 0.
      split_seed: of the parts.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, augmentation and the order of the images.
    """
    if epochs is None:
        epochs = EPOCHS if data is not None else MADE_UP_EPOCHS
    made = image_classifier.recipe(
        data=data,
        size=size,
        width=width,
        augment="strong",
        average=0.99,
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        folds=folds,
        fold=fold,
        split_seed=split_seed,
        prepared=prepared,
        save_every=save_every,
        seed=seed,
    )
    return made.with_(name="cats_dogs")

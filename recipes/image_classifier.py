"""Images and their classes: cats and dogs, say."""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

import lepton_jax as lepton

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

from recipes import _images

Model = Literal["cnn", "resnet18", "resnet50", "vit", "convnext"]
Augment = Literal["none", "light", "strong"]

# Stored images are larger than what the model sees by this factor where crops are
# scaled, so that a crop has details of its own. Assumption.
MARGIN = 1.5
# Crops of 35 to 100 % of an image, scaled to one size, show things larger than a whole
# image does, by 1 / sqrt(0.67) on average: a whole image is that much larger outside of
# training (Touvron et al. 2019, "Fixing the train-test resolution discrepancy").
CROPS = (0.35, 1.0)
ENLARGED = 1.22
WARMUP = 0.1  # share of the steps in which the learning rate rises; assumption
VIT_PATCH = 16  # pixels, for images that are too large for the compact form
COMPACT = 96  # largest side for which the compact ViT is made; see `vit_size`
SHIFT = 1 / 8  # of the side, by which light augmentation moves: 4 of CIFAR's 32 pixels
# Side up to which the cnn's first convolution keeps all pixels. With a stride of 2 a
# network of twice the width takes 0.6 times as long at 64 pixels (grad on one core).
WHOLE = 48
EVALUATIONS = 15  # of a run at most, so that a long one of few images is not all tests
BASELINE = 32  # side of the images that cheap methods see; assumption


def recipe(
    data: Path | None = None,
    labels: Path | None = None,
    file_column: str | None = None,
    label: str = "label",
    model: Model = "cnn",
    size: int = 32,
    fit: Literal["crop", "pad", "stretch"] = "stretch",
    broken: Literal["error", "drop"] = "drop",
    augment: Augment = "light",
    mirror: bool = True,
    class_weights: bool = False,
    width: int = 16,
    dropout: float = 0.1,
    smoothing: float = 0.0,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.05,
    average: float | None = None,
    batch_size: int = 32,
    epochs: float = 8,
    steps: int | None = None,
    folds: int | None = None,
    fold: int = 0,
    split_seed: int = 0,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    prepared: Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Classify images.

    Without `data` it learns to tell circles, diamonds and squares apart, 200 made-up
    images of each; it gets all of a held-out fifth right, with 40 seconds of a CPU
    core, where the nearest neighbours get 73 % and logistic regression 56 %:

        python tools/launch.py recipes/image_classifier.py

    With your own images, a folder for each class, or a table of files and labels:

        python tools/launch.py recipes/image_classifier.py --data FOLDER --size 64
        python tools/launch.py recipes/image_classifier.py --data TABLE.csv --size 64

    Args:
      data: a folder or an archive with a folder of images for each class; or a table of
        files and labels, next to the files; or a folder of idx files, which keep their
        own size.
      labels: table of files and labels for the images in `data`.
      file_column: of the table, with the files' names; if left out, the usual names are
        looked for.
      label: column of the table with the classes.
      model: cnn (four convolutions), resnet18, resnet50, vit or convnext.
      size: height and width that the model sees, in pixels.
      fit: whether an image of another aspect is cropped, padded or stretched.
      broken: what is done about files that are no whole image, and folders without any:
        an error, or they are left out and counted.
      augment: random changes in training: none; light moves and mirrors; strong crops,
        scales, mirrors, changes colours and mixes images in pairs.
      mirror: also mirror images, in training and to average predictions; not for
        letters and digits.
      class_weights: weigh classes alike, however many images each has.
      width: of a cnn, channels of the first convolution; of a resnet, a quarter of
        those of the first stage; vit and convnext have widths of their own.
      dropout: share of the features dropped.
      smoothing: share of each label that is spread over all classes.
      learning_rate: of AdamW at its peak; it rises over the first tenth of the run and
        falls as a cosine to zero.
      weight_decay: of AdamW.
      average: decay of the moving average of the parameters that is evaluated and
        served; if left out, there is none.
      batch_size: images per step, over all devices.
      epochs: passes over the training images.
      steps: length of the run in steps, instead of epochs.
      folds: parts of the images, of which one is for testing; if left out, a fifth is.
      fold: which part, from 0.
      split_seed: of the parts.
      precision: dtype that the model computes in.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout, augmentation and the images' order.
    """
    stored = round(size * MARGIN) if augment == "strong" else size
    images = _images.load(
        _images.Asked(
            data,
            stored,
            labels=labels,
            file_column=file_column,
            label=label,
            fit=fit,
            broken=broken,
            folds=folds,
            fold=fold,
            split_seed=split_seed,
            folder=prepared,
        )
    )
    height, width_seen, channels = images.shape
    if (height, width_seen) == (stored, stored):
        height = size
        width_seen = size
    shape = (height, width_seen, channels)
    train = images.train
    total = steps or math.ceil(epochs * len(train) / batch_size)
    weights = images.balanced() if class_weights else None
    made = _model(model, len(images.classes), shape, width, dropout)
    if mirror:
        views = (lepton.models.unchanged, lepton.models.mirrored)
        made = partial(lepton.models.averaged_views, made, views)
    averaging = () if average is None else lepton.controllers.averaging(average)

    return lepton.Recipe(
        name="image_classifier",
        model=made,
        loss=_loss(weights, smoothing),
        metrics={"accuracy": lepton.metrics.accuracy},
        decode=partial(jnp.argmax, axis=-1),
        preprocess=_preprocess(augment, mirror, shape, takes_any=model != "vit"),
        optimizer=partial(optax.adamw, weight_decay=weight_decay),
        learning_rate=optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, round(WARMUP * total), total
        ),
        controller=averaging,
        baseline=(_small(lepton.baselines.logistic), _small(lepton.baselines.nearest)),
        train=train,
        test=images.test,
        preparation=images.serving,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        precision=precision,
        evaluate_every=max(math.ceil(len(train) / batch_size), total // EVALUATIONS),
        save_every=save_every,
        seed=seed,
    )


def _model(
    name: str,
    classes: int,
    shape: tuple[int, int, int],
    width: int,
    dropout: float,
) -> Callable[..., Any]:
    """Return the factory of a model for images of a shape."""
    models = lepton.models
    channels = shape[2]
    side = min(shape[:2])
    given: dict[str, Any] = {"dropout": dropout}
    if name == "cnn":
        given |= {
            "size": shape,
            "widths": (width, 2 * width, 4 * width, 8 * width),
            "stride": 1 if side <= WHOLE else 2,
            "dense": 0,
            "batch_norm": True,
        }
        return partial(models.CNN, classes, **given)
    given |= {"channels": channels, "size": shape[:2]}
    if name in ("resnet18", "resnet50"):
        layers = models.resnet_size(int(name.removeprefix("resnet")))
        return partial(models.ResNet, classes, width=4 * width, **layers, **given)
    if name == "vit":
        kind = "compact" if side <= COMPACT else "tiny"
        given |= models.vit_size(kind)
        if kind == "tiny":
            given["patch"] = VIT_PATCH
        return partial(models.ViT, classes, **given)
    # a stage halves the image: small ones begin with small patches
    given["patch"] = 4 if side > COMPACT else 2
    return partial(models.ConvNeXt, classes, **models.convnext_size("atto"), **given)


def _loss(
    weights: tuple[float, ...] | None,
    smoothing: float,
) -> Callable[..., Any]:
    if weights is None and not smoothing:
        return lepton.losses.cross_entropy
    return partial(
        lepton.losses.weighted_cross_entropy,
        weights=weights,
        smoothing=smoothing,
    )


def _preprocess(
    augment: str,
    mirror: bool,
    shape: tuple[int, int, int],
    takes_any: bool,
) -> lepton.augment.Augmented:
    """Return the way from pixels to the model's inputs, with random changes.

    Args:
      augment: as in the recipe.
      mirror: likewise.
      shape: of the images that the model is trained on.
      takes_any: whether the model takes images of other sizes than that.
    """
    changes = lepton.augment
    size = shape[:2]
    outside = size
    if augment == "strong" and takes_any:
        outside = (round(ENLARGED * size[0]), round(ENLARGED * size[1]))
    steps: list[Any] = []
    if augment == "light":
        steps = [changes.Crop(round(SHIFT * min(size)), edge="reflect")]
    if augment == "strong":
        steps = [changes.ResizedCrop(size, scale=CROPS)]
    if augment == "strong" and shape[2] == 3:
        steps.append(changes.ColourJitter(0.3, 0.3, 0.3))
    if mirror and augment != "none":
        steps.append(changes.Flip())
    if augment == "strong":
        steps.append(changes.Mixup(0.2))
    return changes.Augmented(
        steps,
        partial(lepton.data.grey, by=255),
        outside=partial(changes.resized, size=outside),
    )


def _small(baseline: Callable[..., Any]) -> Callable[..., Any]:
    """Return a cheap method that sees images of at most BASELINE pixels a side."""

    @functools.wraps(baseline)
    def seeing_small(
        train: Any,
        test: Any,
    ) -> Any:
        return baseline(_shrunken(train), _shrunken(test))

    return seeing_small


def _shrunken(samples: Any) -> Any:
    height, width = samples.inputs.shape[1:3]
    if max(height, width) <= BASELINE:
        return samples
    images = np.asarray(samples.inputs, np.float32)
    images = images.reshape(*images.shape[:3], -1)
    small = lepton.augment.resized(images, (BASELINE, BASELINE))
    pixels = np.asarray(small).round().astype(np.uint8)
    return dataclasses.replace(samples, inputs=pixels)

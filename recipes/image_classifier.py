"""Images and their classes, a folder each: cats and dogs, say."""

from __future__ import annotations

import io
import math
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import optax

import lepton_jax as lepton

# `recipes` is found wherever this file was started from
sys.path.append(str(Path(__file__).resolve().parents[1]))

# The embedded images: a circle, a square or a diamond, bright on a dark ground.
SHAPES = ("circle", "diamond", "square")
IMAGES = 200  # of each shape
PIXELS = 32  # height and width

TEST_SHARE = 0.2  # of the images


def recipe(
    data: Path | None = None,
    size: int = 64,
    fit: Literal["crop", "pad", "stretch"] = "stretch",
    broken: Literal["error", "drop"] = "drop",
    width: int = 16,
    dropout: float = 0.3,
    learning_rate: float = 1e-3,
    batch_size: int = 32,
    epochs: float = 8,
    steps: int | None = None,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    prepared: Path | None = None,
    save_every: int | None = None,
    seed: int = 0,
) -> lepton.Recipe:
    """Classify images with a small CNN.

    Without `data` it learns to tell circles, diamonds and squares apart, 200 made-up
    images of each; it gets all of a held-out fifth right, with 30 seconds of a CPU
    core's time:

        python tools/launch.py recipes/image_classifier.py

    With 300 cats and 300 dogs, it gets 71 % of a held-out fifth right; more needs more
    images, or a model that has seen some:

        python tools/launch.py recipes/image_classifier.py --data cats_dogs_600.tar

    Args:
      data: a folder or an archive with a folder of images for each class.
      size: height and width that all images get, in pixels.
      fit: whether an image of another aspect is cropped, padded or stretched.
      broken: what to do about files that are no whole image: an error, or their rows
        are dropped and counted.
      width: channels of the first convolution; each of the others has twice as many as
        the one before.
      dropout: share of the units dropped before and after the dense layer.
      learning_rate: of AdamW at the start; it falls as a cosine to zero.
      batch_size: images per step, over all devices.
      epochs: passes over the training images.
      steps: length of the run in steps, instead of epochs.
      precision: dtype that the model computes in.
      prepared: folder for the prepared rows, with a manifest of all that was done; if
        left out, they are removed at the end.
      save_every: steps between checkpoints; each evaluation if left out.
      seed: of the initial parameters, dropout and the order of the images.
    """
    from lepton_jax.data import prepare
    from lepton_jax.data.readers import reader_of
    from recipes import _tables

    with tempfile.TemporaryDirectory() as made:
        if data is None:
            data = _drawn(Path(made))
        source = reader_of(data, format="images")
        preparation = prepare.Preparation(
            {"images": source},
            [
                prepare.Split(test=TEST_SHARE, stratify="label"),
                prepare.Images(
                    "bytes",
                    size=(size, size),
                    fit=fit,
                    broken=broken,
                ),
                prepare.Classes("label"),
            ],
            inputs=["bytes"],
            target="label",
        )
        serving = _tables.prepared(
            preparation,
            "bytes",
            prepared,
            {},
        )
        print(
            _tables.twice(
                {"images": source},
                but=["path"],
            ),
            file=sys.stderr,
        )
    train = serving.split("train")
    total = steps or math.ceil(epochs * len(train) / batch_size)

    return lepton.Recipe(
        name="image_classifier",
        model=partial(
            lepton.models.CNN,
            len(serving.words),
            size=(size, size, 3),
            widths=(width, 2 * width, 4 * width, 8 * width),
            dense=4 * width,
            batch_norm=True,
            dropout=dropout,
        ),
        loss=lepton.losses.cross_entropy,
        metrics={"accuracy": lepton.metrics.accuracy},
        preprocess=partial(
            lepton.data.divided,
            by=255,
        ),
        optimizer=optax.adamw,
        learning_rate=optax.cosine_decay_schedule(learning_rate, total),
        train=train,
        test=serving.split("test"),
        preparation=serving,
        batch_size=batch_size,
        epochs=epochs,
        steps=steps,
        precision=precision,
        save_every=save_every,
        seed=seed,
    )


def _drawn(folder: Path) -> Path:
    """Write the embedded images as files, a folder for each shape."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for shape in SHAPES:
        (folder / shape).mkdir()
        for number in range(IMAGES):
            buffer = io.BytesIO()
            Image.fromarray(_image(shape, generator)).save(
                buffer,
                "PNG",
            )
            (folder / shape / f"{number:03}.png").write_bytes(buffer.getvalue())
    return folder


def _image(
    shape: str,
    generator: np.random.Generator,
) -> np.ndarray:
    """Return a shape on a noisy ground, uint8 (PIXELS, PIXELS, 3)."""
    radius = generator.uniform(6, 12)
    middle = generator.uniform(
        radius,
        PIXELS - radius,
        size=2,
    )
    places = np.indices((PIXELS, PIXELS)).transpose(
        1,
        2,
        0,
    )
    away = np.abs(places - middle)
    distance = {
        "circle": np.sqrt((away**2).sum(-1)),
        "diamond": away.sum(-1),
        "square": away.max(-1),
    }[shape]
    ground = generator.uniform(0, 80, size=3)
    colour = generator.uniform(150, 255, size=3)
    image = np.where(
        (distance <= radius)[..., None],
        colour,
        ground,
    )
    noise = generator.normal(0, 12, image.shape)
    return np.clip(
        image + noise,
        0,
        255,
    ).astype(np.uint8)

"""Pictures without a question, for the recipes that learn to make more of them.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import RecipeError

TEST_SHARE = 0.1  # of the pictures, where no file says which are for testing
GRAY_LEVELS = 16  # of scikit-learn's digits: 0 is white, 16 is black


class Pictures(NamedTuple):
    """Pictures to learn from.

    Attributes:
      train: the inputs are uint8 (n, height, width) or (n, height, width, channels), or
        a dict of these "images" and their "classes". The targets are the classes.
      test: likewise.
      size: (height, width, channels).
      brightest: the greatest level of a pixel.
      shares: share of the training pictures that each class has.
      serving: the way from raw rows to these; None for the embedded pictures.
    """

    train: Any
    test: Any
    size: tuple[int, int, int]
    brightest: float
    shares: tuple[float, ...]
    serving: Any = None


def load(
    data: Path | None,
    size: int,
    recipe: str,
    prepared: Path | None = None,
    with_classes: bool = False,
) -> Pictures:
    """Return pictures.

    Args:
      data: a folder with the four idx files of MNIST, or of a set like it; or a folder
        or an archive with a folder of images for each class. None: scikit-learn's
        digits of 8x8 pixels.
      size: height and width that images get; idx files keep their own.
      recipe: the file that asks, for messages.
      prepared: folder for what is prepared; None: it is removed at the end.
      with_classes: let the inputs be a dict of "images" and "classes".

    Raises:
      RecipeError: the height or width can't be halved twice.
    """
    if data is None:
        return _embedded(recipe, with_classes)
    if data.is_dir() and any("idx" in file.name for file in data.iterdir()):
        pictures = _from_idx(data, recipe, prepared, with_classes)
    else:
        pictures = _from_images(data, size, prepared, with_classes)
    height, width, _ = pictures.size
    if height % 4 or width % 4:
        raise RecipeError(
            f"pictures of {height}x{width} can't be halved twice",
            where=data,
            remedy="give pictures whose height and width divide by 4, or set --size",
        )
    return pictures


def between_one(x: Any, brightest: float) -> Any:
    """Return pictures as float32 (batch, height, width, channels) from -1 to 1.

    Args:
      x: levels from 0 to `brightest`, (batch, height, width) or with channels; or a
        dict of such "images" and of "classes", which stay.
      brightest: the greatest level.
    """
    if isinstance(x, Mapping):
        return {**x, "images": between_one(x["images"], brightest)}
    if x.ndim == 3:
        x = x[..., None]
    return x.astype("float32") * (2 / brightest) - 1


def _embedded(recipe: str, with_classes: bool) -> Pictures:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RecipeError(
            "scikit-learn, which holds the default pictures, is not installed",
            where=recipe,
            remedy=(
                "pip install -e '.[recipes]', or give --data, a folder of pictures"
            ),
        ) from error

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype("uint8")
    x, x_test, y, y_test = train_test_split(
        images, labels, test_size=TEST_SHARE, stratify=labels, random_state=0
    )
    return Pictures(
        lepton.data.Arrays(_inputs(x, y, with_classes), y),
        lepton.data.Arrays(_inputs(x_test, y_test, with_classes), y_test),
        (8, 8, 1),
        GRAY_LEVELS,
        _shares(y),
    )


def _inputs(images: Any, classes: Any, with_classes: bool) -> Any:
    return {"images": images, "classes": classes} if with_classes else images


def _from_idx(
    data: Path,
    recipe: str,
    prepared: Path | None,
    with_classes: bool,
) -> Pictures:
    from recipes import _digits

    columns = _inputs("image", "label", with_classes)
    digits = _digits.load(data, recipe, prepared, columns)
    images = digits.train.inputs["images"] if with_classes else digits.train.inputs
    height, width = images.shape[1:3]
    return Pictures(
        digits.train,
        digits.test,
        (height, width, 1),
        255,
        _shares(digits.train.targets),
        digits.serving,
    )


def _from_images(
    data: Path,
    size: int,
    prepared: Path | None,
    with_classes: bool,
) -> Pictures:
    # only here: the embedded pictures need no library that reads files
    from lepton_jax.data import prepare
    from lepton_jax.data.readers import reader_of
    from recipes import _tables

    source = reader_of(data, format="images")
    preparation = prepare.Preparation(
        {"images": source},
        [
            prepare.Split(test=TEST_SHARE, stratify="label"),
            prepare.Images("bytes", size=(size, size), fit="crop", broken="drop"),
            prepare.Classes("label"),
        ],
        inputs=["bytes"],
        target="label",
    )
    columns = _inputs("bytes", "label", with_classes)
    serving = _tables.prepared(preparation, columns, prepared, {})
    print(_tables.twice({"images": source}, but=["path"]), file=sys.stderr)
    train = serving.split("train")
    return Pictures(
        train,
        serving.split("test"),
        (size, size, 3),
        255,
        _shares(train.targets),
        serving,
    )


def _shares(classes: Any) -> tuple[float, ...]:
    """Return the share of each class, (classes,), of classes (n,) from 0."""
    return tuple((np.bincount(classes) / len(classes)).tolist())

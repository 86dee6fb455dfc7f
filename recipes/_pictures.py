"""Pictures without a question, for the recipes that learn to make more of them.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import lepton_jax as lepton
from lepton_jax.errors import RecipeError

TEST_SHARE = 0.1  # of the pictures, where no file says which are for testing
GRAY_LEVELS = 16  # of scikit-learn's digits: 0 is white, 16 is black


class Pictures(NamedTuple):
    """Pictures to learn from.

    Attributes:
      train: uint8 (n, height, width) or (n, height, width, channels). The targets are
        their classes, which are not used.
      test: likewise.
      size: (height, width, channels).
      brightest: the greatest level of a pixel.
      serving: the way from raw rows to these; None for the embedded pictures.
    """

    train: Any
    test: Any
    size: tuple[int, int, int]
    brightest: float
    serving: Any = None


def load(
    data: Path | None,
    size: int,
    recipe: str,
    prepared: Path | None = None,
) -> Pictures:
    """Return pictures.

    Args:
      data: a folder with the four idx files of MNIST, or of a set like it; or a folder
        or an archive with a folder of images for each class. None: scikit-learn's
        digits of 8x8 pixels.
      size: height and width that images get; idx files keep their own.
      recipe: the file that asks, for messages.
      prepared: folder for what is prepared; None: it is removed at the end.

    Raises:
      RecipeError: the height or width can't be halved twice.
    """
    if data is None:
        return _embedded(recipe)
    if data.is_dir() and any("idx" in file.name for file in data.iterdir()):
        pictures = _from_idx(data, recipe, prepared)
    else:
        pictures = _from_images(data, size, prepared)
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
      x: levels from 0 to `brightest`, (batch, height, width) or with channels.
      brightest: the greatest level.
    """
    if x.ndim == 3:
        x = x[..., None]
    return x.astype("float32") * (2 / brightest) - 1


def _embedded(recipe: str) -> Pictures:
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
        lepton.data.Arrays(x, y),
        lepton.data.Arrays(x_test, y_test),
        (8, 8, 1),
        GRAY_LEVELS,
    )


def _from_idx(data: Path, recipe: str, prepared: Path | None) -> Pictures:
    from recipes import _digits

    digits = _digits.load(data, recipe, prepared)
    height, width = digits.train.inputs.shape[1:3]
    return Pictures(
        digits.train,
        digits.test,
        (height, width, 1),
        255,
        digits.serving,
    )


def _from_images(data: Path, size: int, prepared: Path | None) -> Pictures:
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
    serving = _tables.prepared(preparation, "bytes", prepared, {})
    print(_tables.twice({"images": source}, but=["path"]), file=sys.stderr)
    return Pictures(
        serving.split("train"),
        serving.split("test"),
        (size, size, 3),
        255,
        serving,
    )

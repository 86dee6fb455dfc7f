"""Handwritten digits of 28x28 pixels, for the MNIST recipes.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import RecipeError

GRAY_LEVELS = 16  # of scikit-learn's digits: 0 is white, 16 is black
ENLARGED = 3  # 8x8 pixels become 24x24
FEW = 10_000  # training images; with less of them, recipes pass over them more often
MARGIN = 2  # white pixels around them, for MNIST's 28x28


class Digits(NamedTuple):
    """Images of digits.

    Attributes:
      train: to train on, uint8 (n, 28, 28) or (n, 28, 28, 1).
      test: to test on.
      serving: the way from raw rows to these; None for the embedded digits.
    """

    train: lepton.data.Arrays
    test: lepton.data.Arrays
    serving: Any = None


def load(
    folder: Path | None,
    recipe: str,
    prepared: Path | None = None,
    columns: Any = "image",
) -> Digits:
    """Return the digits.

    Args:
      folder: holds the four idx files of MNIST, or of a set like it. None:
        scikit-learn's digits, enlarged; a stratified fifth is for testing.
      recipe: the file that asks, for messages.
      prepared: folder for what is prepared; None: it is removed at the end.
      columns: of "image" and "label", those that are the inputs; or a dict of them.
    """
    if folder is not None:
        return _prepared(folder, prepared, columns)

    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise RecipeError(
            "scikit-learn, which holds the default data, is not installed",
            where=recipe,
            remedy=(
                "pip install -e '.[recipes]', or give --data, a folder of idx files"
            ),
        ) from error

    images, labels = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(
        _enlarged(images), labels, test_size=0.2, stratify=labels, random_state=0
    )
    return Digits(
        lepton.data.Arrays(x, y),
        lepton.data.Arrays(x_test, y_test),
    )


def _prepared(
    folder: Path,
    out: Path | None,
    columns: Any,
) -> Digits:
    """Read and prepare idx files; those whose names begin with t10k are for testing."""
    # only here: the embedded digits need no library that reads files
    from lepton_jax.data import prepare
    from lepton_jax.data.readers import reader_of
    from recipes import _tables

    if not folder.is_dir():
        lepton.data.idx(folder)  # which says what is needed
    source = reader_of(folder)
    names = [column.name for column in source.columns()]
    if names != ["image", "label", "part"]:
        lepton.data.idx(folder)
    preparation = prepare.Preparation(
        {"digits": source},
        [
            prepare.Derive(prepare.SPLIT, '"train" if part == "train" else "test"'),
            prepare.Classes("label"),
        ],
        inputs=["image"],
        target="label",
    )
    serving = _tables.prepared(
        preparation,
        columns,
        out,
        {},
    )
    return Digits(
        serving.split("train"),
        serving.split("test"),
        serving,
    )


def _enlarged(images: np.ndarray) -> np.ndarray:
    """Enlarge images (n, 64) of 16 gray levels to uint8 (n, 28, 28, 1)."""
    gray = images.reshape(
        -1,
        8,
        8,
    ) * (255 / GRAY_LEVELS)
    block = np.ones((1, ENLARGED, ENLARGED))
    large = np.kron(
        gray,
        block,
    ).astype(np.uint8)

    margin = (MARGIN, MARGIN)
    return np.pad(
        large,
        ((0, 0), margin, margin),
    )[..., None]

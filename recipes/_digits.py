"""Handwritten digits of 28x28 pixels, for the MNIST recipes.

This is not a recipe itself: a name that begins with an underscore says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

import lepton_jax as lepton
from lepton_jax.errors import RecipeError

GRAY_LEVELS = 16  # of scikit-learn's digits: 0 is white, 16 is black
ENLARGED = 3  # 8x8 pixels become 24x24
MARGIN = 2  # white pixels around them, for MNIST's 28x28


def load(
    folder: Path | None,
    recipe: str,
) -> tuple[lepton.data.Arrays, lepton.data.Arrays]:
    """Return the digits to train on and to test on, uint8 (n, 28, 28, 1) each.

    Args:
      folder: holds the four idx files of MNIST, or of a set like it. None:
        scikit-learn's digits, enlarged; a stratified fifth is for testing.
      recipe: the file that asks, for messages.
    """
    if folder is not None:
        return lepton.data.idx(folder)

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
    return lepton.data.Arrays(x, y), lepton.data.Arrays(x_test, y_test)


def _enlarged(images: np.ndarray) -> np.ndarray:
    """Enlarge images (n, 64) of 16 gray levels to uint8 (n, 28, 28, 1)."""
    gray = images.reshape(-1, 8, 8) * (255 / GRAY_LEVELS)
    block = np.ones((1, ENLARGED, ENLARGED))
    large = np.kron(gray, block).astype(np.uint8)

    margin = (MARGIN, MARGIN)
    return np.pad(large, ((0, 0), margin, margin))[..., None]

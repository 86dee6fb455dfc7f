"""What a recipe does to inputs on the devices, as functions with names.

A saved model finds a named function again; a lambda it can't (see `Trainer.open`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np


def divided(x: Any, by: float) -> Any:
    """Return whole numbers as float32, divided: pixels by 255, say."""
    return x.astype("float32") / by


def standardized(
    x: Any,
    mean: Sequence[float],
    spread: Sequence[float],
) -> Any:
    """Return (x - mean) / spread of features (batch, features); 0 for a NaN."""
    center = np.array(mean, np.float32)
    scale = np.array(spread, np.float32)
    return jnp.nan_to_num((x - center) / scale)


def grey(x: Any, by: float) -> Any:
    """Return grey images as float32 (batch, height, width, 1), divided.

    Args:
      x: whole numbers (batch, height, width), or with a last dim of 1.
      by: the brightest level.
    """
    pixels = divided(x, by)
    return pixels[..., None] if pixels.ndim == 3 else pixels

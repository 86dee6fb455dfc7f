"""Brightness, contrast, saturation and hue, changed at random.

Each takes keys (batch,) and images float (batch, height, width, channels) of values
from 0 to 1, and returns images of such values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from lepton_jax.augment.draws import (
    by_row,
    check_images,
    check_least,
    check_share,
    uniform,
)
from lepton_jax.errors import RecipeError

# Weights of red, green and blue in the brightness (ITU-R BT.601-7, section 2.5.1).
LUMA = (0.299, 0.587, 0.114)
# From RGB to brightness and two axes of colour, of the television standard NTSC
# (FCC 1953, 47 CFR 73.682).
YIQ = (
    (0.299, 0.587, 0.114),
    (0.596, -0.274, -0.322),
    (0.211, -0.523, 0.312),
)


@dataclass(frozen=True)
class ColourJitter:
    """Change brightness, contrast, saturation and hue, in this order.

    Attributes:
      brightness: greatest change of the factor from 1, either way.
      contrast: the same, of the distance from the image's mean.
      saturation: the same, of the distance from grey.
      hue: greatest turn of the colours either way, as a share of the whole circle.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        check_least(
            "ColourJitter",
            0,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.saturation,
        )
        check_share("ColourJitter", hue=self.hue)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("ColourJitter", images)
        draws = uniform(keys, 4, -1, 1)
        brighter, contrast, colour, turn = (by_row(draw, 4) for draw in draws)
        if self.brightness:
            images = images * _factor(brighter, self.brightness)
        if self.contrast:
            images = blended(
                mean_grey(images), images, _factor(contrast, self.contrast)
            )
        if self.saturation:
            images = blended(grey(images), images, _factor(colour, self.saturation))
        if self.hue:
            images = _turned(images, turn[:, 0, 0, 0] * (self.hue * 2 * math.pi))
        return jnp.clip(images, 0, 1)


def blended(
    left: jax.Array,
    right: jax.Array,
    share: jax.Array,
) -> jax.Array:
    """Return left + share (right - left); a share above 1 goes beyond the right."""
    return left + share * (right - left)


def grey(images: jax.Array) -> jax.Array:
    """Return the brightness of images, (batch, height, width, 1)."""
    channels = images.shape[-1]
    if channels != 3:
        return images.mean(-1, keepdims=True)
    return (images * np.array(LUMA, images.dtype)).sum(-1, keepdims=True)


def mean_grey(images: jax.Array) -> jax.Array:
    """Return the mean brightness of each image, (batch, 1, 1, 1)."""
    return grey(images).mean((1, 2), keepdims=True)


# ---- internals ----


def _factor(
    draw: jax.Array,
    strength: float,
) -> jax.Array:
    return jnp.maximum(1 + draw * strength, 0)


def _turned(
    images: jax.Array,
    angle: jax.Array,
) -> jax.Array:
    """Return images whose colours are turned by an angle, radians (batch,)."""
    if images.shape[-1] != 3:
        raise RecipeError(
            f"images of {images.shape[-1]} channels have no hue",
            where="augment.ColourJitter",
            remedy="leave hue at 0",
        )
    to_axes = np.array(YIQ, np.float32)
    back = np.linalg.inv(to_axes).astype(np.float32)
    cos = jnp.cos(angle)
    sin = jnp.sin(angle)
    one = jnp.ones_like(cos)
    zero = jnp.zeros_like(cos)
    rows = (
        jnp.stack([one, zero, zero], -1),
        jnp.stack([zero, cos, -sin], -1),
        jnp.stack([zero, sin, cos], -1),
    )
    turn = jnp.stack(rows, 1)
    matrix = jnp.einsum("ij,bjk,kl->bil", back, turn, to_axes)
    return jnp.einsum("bhwl,bil->bhwi", images, matrix.astype(images.dtype))

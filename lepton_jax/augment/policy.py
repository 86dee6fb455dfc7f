"""RandAugment: a few of many changes, drawn for each image.

An image needs one of the changes only, but a compiled program computes the same for
all. So each kind of change is written as one formula with numbers for each image, among
which are those that change nothing: all turns, moves and shears are one affine map, and
brightness, contrast, colour and sharpness are one step away from a degenerate image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lepton_jax.augment.colour import blended, grey, mean_grey
from lepton_jax.augment.draws import (
    by_row,
    check_images,
    check_least,
    check_share,
    folded,
    uniform,
)
from lepton_jax.augment.geometry import warped

KINDS = (
    "identity",
    "autocontrast",
    "solarize",
    "posterize",
    "brightness",
    "contrast",
    "colour",
    "sharpness",
    "turn",
    "shear_down",
    "shear_right",
    "shift_down",
    "shift_right",
)
# The greatest strengths, as in the authors' code for ImageNet (Cubuk et al. 2019,
# tensorflow/tpu, models/official/efficientnet/autoaugment.py): degrees, shear, share of
# the side, factor away from 1, bits that are lost.
MOST_DEGREES = 30.0
MOST_SHEAR = 0.3
MOST_SHIFT = 0.45
MOST_FACTOR = 0.9
MOST_BITS = 4.0
LEVELS = 256  # of a pixel


@dataclass(frozen=True)
class RandAugment:
    """Apply some changes drawn for each image (Cubuk et al. 2019, "RandAugment").

    Of the paper's fourteen changes, equalizing the histogram is left out: it would
    sort all pixels of each image. Half of the changes that have a direction go the
    other way.

    Attributes:
      count: changes of an image, one after the other.
      strength: 0 to 1 of the greatest; the paper's magnitude by 10.
      share: of the images that are changed.
    """

    count: int = 2
    strength: float = 0.5
    share: float = 1.0

    def __post_init__(self) -> None:
        check_least("RandAugment", 1, count=self.count)
        check_share("RandAugment", strength=self.strength, share=self.share)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("RandAugment", images)
        changed = images
        for number in range(self.count):
            changed = self._once(folded(keys, number), changed)
        if self.share == 1:
            return changed
        (draw,) = uniform(folded(keys, self.count), 1)
        is_changed = by_row(draw < self.share, images.ndim)
        return jnp.where(is_changed, changed, images)

    def _once(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        which, way = uniform(keys, 2)
        kind = (which * len(KINDS)).astype(jnp.int32)
        signed = jnp.where(way < 0.5, -self.strength, self.strength)
        images = _toned(images, kind, self.strength)
        images = _stepped_away(images, kind, 1 + signed * MOST_FACTOR)
        images = _moved(images, kind, signed)
        return jnp.clip(images, 0, 1)


# ---- internals ----


def _is(
    kind: jax.Array,
    name: str,
) -> jax.Array:
    return kind == KINDS.index(name)


def _toned(
    images: jax.Array,
    kind: jax.Array,
    strength: float,
) -> jax.Array:
    """Stretch the contrast, invert bright pixels, or drop bits."""
    low = images.min((1, 2), keepdims=True)
    high = images.max((1, 2), keepdims=True)
    stretched = (images - low) / jnp.where(high > low, high - low, 1)
    is_stretched = by_row(_is(kind, "autocontrast"), 4)
    images = jnp.where(is_stretched, stretched, images)

    is_inverted = by_row(_is(kind, "solarize"), 4) & (images > 1 - strength)
    images = jnp.where(is_inverted, 1 - images, images)

    # Whole levels: 2, 4, ... of the 256 become one.
    step = 2.0 ** round(strength * MOST_BITS) / LEVELS
    coarse = jnp.floor(images / step) * step
    return jnp.where(by_row(_is(kind, "posterize"), 4), coarse, images)


def _stepped_away(
    images: jax.Array,
    kind: jax.Array,
    factor: jax.Array,
) -> jax.Array:
    """Change brightness, contrast, colour or sharpness by a factor (batch,)."""
    degenerate: Any = images
    kinds = {
        "brightness": jnp.zeros_like(images[:, :1, :1, :1]),
        "contrast": mean_grey(images),
        "colour": grey(images),
        "sharpness": _smooth(images),
    }
    for name, other in kinds.items():
        degenerate = jnp.where(by_row(_is(kind, name), 4), other, degenerate)
    share = by_row(factor, 4).astype(images.dtype)
    return blended(degenerate, images, share)


def _smooth(images: jax.Array) -> jax.Array:
    """Return means of 3x3 pixels, the middle one weighing 5, as Pillow's SMOOTH."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
    across = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    block = across[:, :, :-2] + across[:, :, 1:-1] + across[:, :, 2:]
    return (block + 4 * images) / 13


def _moved(
    images: jax.Array,
    kind: jax.Array,
    signed: jax.Array,
) -> jax.Array:
    """Turn, shear or shift by a share (batch,) of the greatest amount, -1 to 1."""
    height, width = images.shape[1:3]

    def amount(
        name: str,
        most: float,
    ) -> jax.Array:
        return jnp.where(_is(kind, name), signed * most, 0)

    angle = amount("turn", math.radians(MOST_DEGREES))
    cos = jnp.cos(angle)
    sin = jnp.sin(angle)
    matrix = (
        cos,
        amount("shear_down", MOST_SHEAR) - sin,
        amount("shear_right", MOST_SHEAR) + sin,
        cos,
    )
    moves = (
        amount("shift_down", MOST_SHIFT * height),
        amount("shift_right", MOST_SHIFT * width),
    )
    return warped(images, matrix, moves, "nearest")

"""Rectangles of an image that are blanked."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lepton_jax.augment.draws import (
    by_row,
    check_images,
    check_least,
    check_range,
    check_share,
    uniform,
)


@dataclass(frozen=True)
class Erase:
    """Blank a rectangle (Zhong et al. 2020, "Random Erasing Data Augmentation").

    Attributes:
      share: of the images that are changed.
      area: least and greatest share of the image.
      ratio: least and greatest height by width.
      fill: the value that it gets.
    """

    share: float = 0.25
    area: tuple[float, float] = (0.02, 0.33)
    ratio: tuple[float, float] = (0.3, 3.3)
    fill: float = 0.0

    def __post_init__(self) -> None:
        check_share("Erase", share=self.share)
        check_range("Erase", 0, area=self.area)
        check_share("Erase", area=self.area[1])
        check_range("Erase", 1e-3, ratio=self.ratio)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("Erase", images)
        height, width = images.shape[1:3]
        is_chosen, size, aspect, down, right = uniform(keys, 5)
        low, high = self.area
        area = low + size * (high - low)
        low, high = (math.log(bound) for bound in self.ratio)
        stretch = jnp.exp((low + aspect * (high - low)) / 2)
        tall = jnp.minimum(jnp.sqrt(area) * stretch, 1) * height
        wide = jnp.minimum(jnp.sqrt(area) / stretch, 1) * width
        top = down * (height - tall)
        left = right * (width - wide)
        mask = rectangle(images, (top, left), (top + tall, left + wide))
        mask = mask & by_row(is_chosen < self.share, images.ndim)
        return jnp.where(mask, self.fill, images).astype(images.dtype)


@dataclass(frozen=True)
class Cutout:
    """Blank a square whose middle is anywhere (DeVries & Taylor 2017, section 3.1).

    Attributes:
      pixels: its side.
      fill: the value that it gets.
    """

    pixels: int = 8
    fill: float = 0.0

    def __post_init__(self) -> None:
        check_least("Cutout", 1, pixels=self.pixels)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("Cutout", images)
        height, width = images.shape[1:3]
        down, right = uniform(keys, 2)
        top = jnp.floor(down * height) - self.pixels // 2
        left = jnp.floor(right * width) - self.pixels // 2
        ends = (top + self.pixels, left + self.pixels)
        mask = rectangle(images, (top, left), ends)
        return jnp.where(mask, self.fill, images).astype(images.dtype)


def rectangle(
    images: jax.Array,
    starts: tuple[jax.Array, jax.Array],
    ends: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """Return which pixels' middles lie in a rectangle of each image.

    Args:
      images: (batch, height, width, channels).
      starts: first row and column, in pixels, (batch,) each.
      ends: those after the last.

    Returns:
      bool (batch, height, width, 1).
    """
    height, width = images.shape[1:3]
    top, left = (start[:, None] for start in starts)
    bottom, right = (end[:, None] for end in ends)
    y = jnp.arange(height) + 0.5
    x = jnp.arange(width) + 0.5
    rows = (y >= top) & (y < bottom)
    columns = (x >= left) & (x < right)
    return rows[:, :, None, None] & columns[:, None, :, None]

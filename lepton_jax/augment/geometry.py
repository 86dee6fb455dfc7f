"""Crops, flips, rotations: changes of the place that a pixel comes from.

Each takes keys (batch,) and images float (batch, height, width, channels), and returns
images. Nothing is random but what the keys say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

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
from lepton_jax.errors import RecipeError

EDGES = ("reflect", "nearest", "zero")


@dataclass(frozen=True)
class Flip:
    """Mirror images left to right, or top to bottom.

    Attributes:
      share: of the images that are mirrored, 0 to 1.
      vertical: top to bottom.
    """

    share: float = 0.5
    vertical: bool = False

    def __post_init__(self) -> None:
        check_share("Flip", share=self.share)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("Flip", images)
        (draw,) = uniform(keys, 1)
        is_mirrored = by_row(draw < self.share, images.ndim)
        axis = 1 if self.vertical else 2
        mirrored = jnp.flip(images, axis)
        return jnp.where(is_mirrored, mirrored, images)


def resized(
    images: Any,
    size: tuple[int, int],
) -> Any:
    """Return images scaled to (height, width), as `ResizedCrop` scales a whole one."""
    before = images.shape[1:3]
    if before == tuple(size):
        return images
    rows, columns = map(_whole, before, size)
    return _scaled(images, rows, columns)


@dataclass(frozen=True)
class Crop:
    """Pad images, and cut out their own size at a random place.

    It is what is usual for CIFAR (He et al. 2016, section 4.2).

    Attributes:
      padding: pixels at each side.
      edge: what the padding holds: "zero", or the image "reflect"ed.
    """

    padding: int = 4
    edge: Literal["reflect", "zero"] = "zero"

    def __post_init__(self) -> None:
        check_least("Crop", 0, padding=self.padding)
        _check_edge("Crop", self.edge, ("reflect", "zero"))

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("Crop", images)
        _, height, width, channels = images.shape
        if self.edge == "reflect" and self.padding >= min(height, width):
            raise RecipeError(
                f"padding is {self.padding}, images are {height}x{width}",
                where="augment.Crop",
                remedy="pad by less than the image, or with edge='zero'",
            )
        amount = (self.padding, self.padding)
        mode = "reflect" if self.edge == "reflect" else "constant"
        none = (0, 0)
        padded = jnp.pad(images, (none, amount, amount, none), mode)
        most = 2 * self.padding
        places = uniform(keys, 2, 0, most + 1)
        top, left = (place.astype(jnp.int32) for place in places)

        def cut(
            image: jax.Array,
            top: jax.Array,
            left: jax.Array,
        ) -> jax.Array:
            sizes = (height, width, channels)
            return jax.lax.dynamic_slice(image, (top, left, 0), sizes)

        return jax.vmap(cut)(padded, top, left)


@dataclass(frozen=True)
class ResizedCrop:
    """Cut out a random rectangle, and scale it to one size.

    It is what is usual for ImageNet (Szegedy et al. 2015, "Going deeper with
    convolutions", section 6). It scales by triangles that are as wide as an output
    pixel, as `jax.image.resize` does, by one matrix product for each direction.

    Attributes:
      size: (height, width) of the result; None: that of the images.
      scale: least and greatest share of the area.
      ratio: least and greatest width by height, of the rectangle by that of the image.
    """

    size: tuple[int, int] | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        check_range("ResizedCrop", 0, scale=self.scale, ratio=self.ratio)
        check_share("ResizedCrop", scale=self.scale[1])
        least = (self.scale[0], self.ratio[0])
        if not all(bound > 0 for bound in least):
            raise RecipeError(
                f"scale is {self.scale!r}, ratio is {self.ratio!r}",
                where="augment.ResizedCrop",
                remedy="give pairs (low, high) of numbers above 0",
            )
        if self.size is not None:
            object.__setattr__(self, "size", tuple(self.size))
            check_least("ResizedCrop", 1, size=min(self.size))

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("ResizedCrop", images)
        height, width = images.shape[1:3]
        size = self.size or (height, width)
        share, aspect, across, along = uniform(keys, 4)
        low, high = self.scale
        area = low + share * (high - low)
        low, high = map(math.log, self.ratio)
        logarithm = low + aspect * (high - low)
        stretch = jnp.exp(logarithm / 2)
        tall = jnp.sqrt(area) / stretch
        tall = jnp.minimum(tall, 1)
        wide = jnp.sqrt(area) * stretch
        wide = jnp.minimum(wide, 1)

        top = across * (1 - tall)
        rows = _triangles(top, tall, height, size[0])
        left = along * (1 - wide)
        columns = _triangles(left, wide, width, size[1])
        return _scaled(images, rows, columns)


@dataclass(frozen=True)
class Affine:
    """Turn, move, zoom and shear images about their middle.

    Values between pixels are interpolated bilinearly.

    Attributes:
      degrees: greatest angle either way.
      shift: greatest move as a share of height and width.
      zoom: least and greatest factor of the size.
      shear: greatest shear either way, degrees.
      edge: what lies outside the image: "reflect" mirrors it, "nearest" repeats its
        edge, "zero" is black.
    """

    degrees: float = 0.0
    shift: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    edge: Literal["reflect", "nearest", "zero"] = "zero"

    def __post_init__(self) -> None:
        check_least("Affine", 0, degrees=self.degrees, shear=self.shear)
        check_share("Affine", shift=self.shift)
        check_range("Affine", 1e-3, zoom=self.zoom)
        _check_edge("Affine", self.edge, EDGES)

    def __call__(
        self,
        keys: jax.Array,
        images: jax.Array,
    ) -> jax.Array:
        check_images("Affine", images)
        height, width = images.shape[1:3]
        turn, down, right, size, slant = uniform(keys, 5, -1, 1)
        angle = turn * math.radians(self.degrees)
        slant = slant * math.radians(self.shear)
        shear = jnp.tan(slant)
        low, high = map(math.log, self.zoom)
        share = (size + 1) / 2
        logarithm = low + share * (high - low)
        factor = jnp.exp(-logarithm)

        cos = jnp.cos(angle) * factor
        sin = jnp.sin(angle) * factor
        matrix = (cos, cos * shear - sin, sin, sin * shear + cos)
        moves = (
            down * self.shift * height,
            right * self.shift * width,
        )
        return warped(images, matrix, moves, self.edge)


def warped(
    images: jax.Array,
    matrix: tuple[Any, Any, Any, Any],
    moves: tuple[Any, Any],
    edge: str,
) -> jax.Array:
    """Return images whose pixels come from other places, by bilinear interpolation.

    Args:
      images: float (batch, height, width, channels).
      matrix: (a, b, c, d), float (batch,) each: the pixel at (y, x) from the middle
        comes from (a y + b x, c y + d x).
      moves: pixels down and right that are added to that, float (batch,) each.
      edge: as in `Affine`.
    """
    _, height, width, _ = images.shape
    y, x = jnp.indices((height, width), dtype=jnp.float32)
    middle_y = (height - 1) / 2
    middle_x = (width - 1) / 2
    y = (y - middle_y)[None]
    x = (x - middle_x)[None]
    a, b, c, d = (value[:, None, None] for value in matrix)
    down, right = (move[:, None, None] for move in moves)
    from_y = a * y + b * x + down + middle_y
    from_x = c * y + d * x + right + middle_x
    return _interpolated(images, from_y, from_x, edge)


# ---- internals ----


def _check_edge(
    name: str,
    edge: str,
    known: tuple[str, ...],
) -> None:
    if edge not in known:
        raise RecipeError(
            f"edge is {edge!r}",
            where=f"augment.{name}",
            remedy=f"use one of {', '.join(known)}",
        )


def _whole(
    pixels: int,
    wanted: int,
) -> jax.Array:
    """Return the weights of all pixels of a side: (1, wanted, pixels)."""
    start = jnp.zeros(1)
    share = jnp.ones(1)
    return _triangles(start, share, pixels, wanted)


def _scaled(
    images: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
) -> jax.Array:
    """Return weighted means of the rows and columns of images.

    Args:
      images: (batch, height, width, channels).
      rows: weights (batch or 1, wanted, height).
      columns: weights (batch or 1, wanted, width).
    """
    rows = rows.astype(images.dtype)
    columns = columns.astype(images.dtype)
    if len(rows) == 1:
        shorter = jnp.einsum("ih,bhwc->biwc", rows[0], images)
        return jnp.einsum("jw,biwc->bijc", columns[0], shorter)
    shorter = jnp.einsum("bih,bhwc->biwc", rows, images)
    return jnp.einsum("bjw,biwc->bijc", columns, shorter)


def _triangles(
    start: jax.Array,
    share: jax.Array,
    pixels: int,
    wanted: int,
) -> jax.Array:
    """Return the weights of pixels in a stretch of them that is scaled.

    Args:
      start: where the stretch begins, as a share of all pixels, (batch,).
      share: its length, (batch,).
      pixels: how many there are.
      wanted: how many there are to be.

    Returns:
      float32 (batch, wanted, pixels), whose rows add up to 1.
    """
    step = share[:, None] * (pixels / wanted)
    middles = (jnp.arange(wanted) + 0.5) * step
    middles = middles + start[:, None] * pixels - 0.5
    away = middles[:, :, None] - jnp.arange(pixels)
    away = jnp.abs(away)
    reach = jnp.maximum(step, 1)
    weights = 1 - away / reach[:, :, None]
    weights = jnp.maximum(weights, 0)
    return weights / weights.sum(-1, keepdims=True)


def _interpolated(
    images: jax.Array,
    y: jax.Array,
    x: jax.Array,
    edge: str,
) -> jax.Array:
    """Return values of images between their pixels.

    Args:
      images: (batch, height, width, channels).
      y: rows, float (batch, height, width), in pixels.
      x: columns, likewise.
      edge: as in `Affine`.
    """
    top = jnp.floor(y)
    left = jnp.floor(x)
    low = (y - top)[..., None]
    low = low.astype(images.dtype)
    right = (x - left)[..., None]
    right = right.astype(images.dtype)
    look = partial(_pixels, images, edge=edge)

    upper = look(top, left) * (1 - right)
    upper = upper + look(top, left + 1) * right
    lower = look(top + 1, left) * (1 - right)
    lower = lower + look(top + 1, left + 1) * right
    return upper * (1 - low) + lower * low


def _pixels(
    images: jax.Array,
    y: jax.Array,
    x: jax.Array,
    edge: str,
) -> jax.Array:
    """Return the pixels of images at whole places, also outside of them."""
    batch, height, width, channels = images.shape
    row = _inside(y, height, edge)
    column = _inside(x, width, edge)
    places = (row * width + column).reshape(batch, -1)
    flat = images.reshape(batch, height * width, channels)

    def look(
        pixels: jax.Array,
        places: jax.Array,
    ) -> jax.Array:
        return pixels.at[places].get(mode="promise_in_bounds")

    found = jax.vmap(look)(flat, places)
    found = found.reshape(*y.shape, channels)
    if edge != "zero":
        return found
    is_inside = (y >= 0) & (y < height)
    is_inside = is_inside & (x >= 0) & (x < width)
    return jnp.where(is_inside[..., None], found, 0)


def _inside(
    place: jax.Array,
    pixels: int,
    edge: str,
) -> jax.Array:
    """Return whole places as int32, those outside brought back inside."""
    if edge == "reflect":
        last = pixels - 1
        place = jnp.abs(place)
        place = last - jnp.abs(last - place)
    return jnp.clip(place, 0, pixels - 1).astype(jnp.int32)

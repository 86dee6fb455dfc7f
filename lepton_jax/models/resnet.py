"""Residual networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer

# He et al. initialize for ReLU: by the outputs of a kernel (He et al. 2015, "Delving
# Deep into Rectifiers", section 2.2).
KERNEL = nnx.initializers.variance_scaling(2.0, "fan_out", "normal")

# Side below which an image would vanish in the stem for large images: it is halved
# twice there.
LEAST_LARGE = 4


class Residual(nnx.Module):
    """Convolutions added to their inputs.

    The last norm's scale begins at zero, so that the block begins as the identity
    (Goyal et al. 2017, "Accurate, Large Minibatch SGD", section 5.1).

    Args:
      channels: of the inputs.
      width: of the inner convolutions.
      widen: outputs by inner channels; 1: two 3x3 convolutions, else a bottleneck of
        1x1, 3x3 and 1x1.
      stride: of the 3x3 convolution that shrinks the image; 1: none does.
      rngs: stream `params`.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        widen: int,
        stride: int,
        rngs: nnx.Rngs,
    ):
        out = width * widen
        strides = (stride, stride)
        if widen == 1:
            shapes = [(channels, width, 3, strides), (width, out, 3, (1, 1))]
        else:
            shapes = [
                (channels, width, 1, (1, 1)),
                (width, width, 3, strides),
                (width, out, 1, (1, 1)),
            ]
        convs = []
        norms = []
        for number, (inner, outer, side, steps) in enumerate(shapes):
            is_last = number == len(shapes) - 1
            convs.append(_conv(inner, outer, side, steps, rngs))
            norms.append(_norm(outer, rngs, zero=is_last))
        self.convs = nnx.List(convs)
        self.norms = nnx.List(norms)

        self.pool = stride
        changes = stride != 1 or channels != out
        self.shortcut = _conv(channels, out, 1, (1, 1), rngs) if changes else None
        self.shortcut_norm = _norm(out, rngs) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, height, width, channels) to the block's outputs."""
        y = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            if number < len(self.convs) - 1:
                y = nnx.relu(y)

        if self.shortcut is not None and self.shortcut_norm is not None:
            if self.pool > 1:
                # means instead of every other pixel (He et al. 2019, "Bag of Tricks",
                # section 4, ResNet-D)
                side = (self.pool, self.pool)
                x = nnx.avg_pool(x, side, side, "SAME", count_include_pad=False)
            x = self.shortcut_norm(self.shortcut(x))
        return nnx.relu(x + y)


class ResNet(nnx.Module):
    """A residual network (He et al. 2016, "Deep Residual Learning").

    It is trained as is usual today: blocks begin as the identity, and a shortcut that
    shrinks takes means.

    Args:
      classes: number of logits.
      blocks: of each of the stages.
      width: channels of the first stage; each stage has twice as many as the one
        before.
      widen: 1: blocks of two 3x3 convolutions; 4: bottlenecks.
      channels: of the images.
      size: side of the images, or (height, width), to choose the stem and to check;
        None: large images, of any size.
      stem: "small" is a 3x3 convolution, which keeps the size; "large" is 7x7 with
        stride 2 and a pool. None: "small" up to 96 pixels.
      dropout: share of the pooled features dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size can't be, or the images are too small for the stages.
    """

    # Side up to which the stem keeps the size of images. Assumption: as many pixels
    # are left for the last stage as in ImageNet's 224 behind the large stem.
    SMALL = 96

    def __init__(
        self,
        classes: int,
        *,
        blocks: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        widen: int = 1,
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        stem: str | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        _check(classes, width, widen, channels, *blocks)
        if stem not in (None, "small", "large"):
            raise ValueError(f"stem is {stem!r}; it must be 'small' or 'large'")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        side = _least(size)
        is_small = side is not None and side <= self.SMALL
        stem = stem or ("small" if is_small else "large")
        _check_side(side, stem, len(blocks))

        self.is_large = stem == "large"
        kernel = 7 if self.is_large else 3
        step = 2 if self.is_large else 1
        self.stem = _conv(channels, width, kernel, (step, step), rngs)
        self.norm = _norm(width, rngs)

        stages = []
        inner = width
        for stage, count in enumerate(blocks):
            for number in range(count):
                shrinks = stage > 0 and number == 0
                block = Residual(
                    inner,
                    width * 2**stage,
                    widen=widen,
                    stride=2 if shrinks else 1,
                    rngs=rngs,
                )
                stages.append(block)
                inner = width * 2**stage * widen
        self.blocks = nnx.List(stages)
        self.dropout = dropout_layer(dropout, rngs)
        self.out = nnx.Linear(inner, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""
        x = nnx.relu(self.norm(self.stem(x)))
        if self.is_large:
            x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        features = jnp.mean(x, axis=(1, 2))
        if self.dropout is not None:
            features = self.dropout(features)
        return self.out(features)


class _Size(NamedTuple):
    blocks: tuple[int, ...]
    widen: int


_SIZES = {
    18: _Size((2, 2, 2, 2), 1),
    34: _Size((3, 4, 6, 3), 1),
    50: _Size((3, 4, 6, 3), 4),
    101: _Size((3, 4, 23, 3), 4),
}


def resnet_size(layers: int) -> dict[str, Any]:
    """Return arguments of `ResNet` by its number of layers: 18, 34, 50 or 101.

    They are those of He et al. 2016, table 1.

    Raises:
      ValueError: it is none of these.
    """
    if layers not in _SIZES:
        known = ", ".join(map(str, _SIZES))
        raise ValueError(f"{layers} layers are none of {known}")
    return _SIZES[layers]._asdict()


# ---- internals ----


def _least(size: int | Sequence[int] | None) -> int | None:
    """Return the shorter side of images; None if it is not known."""
    if size is None or isinstance(size, int):
        return size
    return min(size)


def _check(*counts: int) -> None:
    if min(counts) < 1:
        raise ValueError(f"classes, widths and blocks are {counts}; each must be >= 1")


def _check_side(
    side: int | None,
    stem: str,
    stages: int,
) -> None:
    least = LEAST_LARGE if stem == "large" else 1
    least *= 2 ** (stages - 1)
    if side is not None and side < least:
        raise ValueError(
            f"images of {side} pixels are too small for {stages} stages behind a"
            f" {stem} stem: they need {least}"
        )


def _conv(
    inner: int,
    outer: int,
    side: int,
    strides: tuple[int, int],
    rngs: nnx.Rngs,
) -> nnx.Conv:
    make = partial(nnx.Conv, use_bias=False, kernel_init=KERNEL, rngs=rngs)
    return make(inner, outer, (side, side), strides=strides)


def _norm(
    channels: int,
    rngs: nnx.Rngs,
    zero: bool = False,
) -> nnx.BatchNorm:
    scale = nnx.initializers.zeros if zero else nnx.initializers.ones
    return nnx.BatchNorm(channels, momentum=0.9, scale_init=scale, rngs=rngs)

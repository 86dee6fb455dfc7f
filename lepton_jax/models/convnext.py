"""Convolutional networks in the form of a Transformer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer

KERNEL = (
    7  # side of the convolutions of one channel each (Liu et al. 2022, section 2.5)
)
WIDEN = 4  # hidden units by channels (section 2.4)
EPSILON = 1e-6  # of the norms, as in the authors' code
LAYER_SCALE = 1e-6  # of what a block adds at first (appendix A.1)


class ConvNeXtBlock(nnx.Module):
    """A 7x7 convolution of each channel, and an MLP of each pixel, added to the inputs.

    Args:
      dim: channels.
      rngs: stream `params`.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            dim,
            dim,
            (KERNEL, KERNEL),
            feature_group_count=dim,
            rngs=rngs,
        )
        self.norm = nnx.LayerNorm(dim, epsilon=EPSILON, rngs=rngs)
        linear = partial(nnx.Linear, rngs=rngs)
        self.up = linear(dim, WIDEN * dim)
        self.down = linear(WIDEN * dim, dim)
        self.scale = nnx.Param(jnp.full(dim, LAYER_SCALE))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, height, width, dim) to the same shape."""
        y = self.norm(self.conv(x))
        y = self.down(nnx.gelu(self.up(y)))
        return x + self.scale[...].astype(y.dtype) * y


class ConvNeXt(nnx.Module):
    """ConvNeXt (Liu et al. 2022, "A ConvNet for the 2020s").

    Args:
      classes: number of logits.
      blocks: of each of the stages.
      dims: channels of each stage.
      patch: side of the first convolution's patches: 4, or for small images 2 or 1.
      channels: of the images.
      size: side of the images, or (height, width), to check; None: any.
      dropout: share of the pooled features dropped in training.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size can't be, or the images are too small.
    """

    def __init__(
        self,
        classes: int,
        *,
        blocks: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        patch: int = 4,
        channels: int = 3,
        size: int | Sequence[int] | None = None,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        if len(blocks) != len(dims) or min(classes, patch, *blocks, *dims) < 1:
            raise ValueError(
                f"blocks are {tuple(blocks)}, dims are {tuple(dims)}, patch is {patch};"
                " they must be as many, and at least 1 each"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        least = patch * 2 ** (len(dims) - 1)
        side = size if size is None or isinstance(size, int) else min(size)
        if side is not None and side < least:
            raise ValueError(
                f"images of {side} pixels are too small for {len(dims)} stages of"
                f" patches of {patch}: they need {least}"
            )

        shrinks = []
        norms = []
        stages = []
        for stage, (count, dim) in enumerate(zip(blocks, dims, strict=True)):
            side = patch if stage == 0 else 2
            shrinks.append(_patches(channels, dim, side, rngs))
            # the first norm follows its convolution, the others come before it
            width = dim if stage == 0 else channels
            norms.append(nnx.LayerNorm(width, epsilon=EPSILON, rngs=rngs))
            stages.append([ConvNeXtBlock(dim, rngs=rngs) for _ in range(count)])
            channels = dim
        self.shrinks = nnx.List(shrinks)
        self.norms = nnx.List(norms)
        self.stages = nnx.List([nnx.List(stage) for stage in stages])
        self.norm = nnx.LayerNorm(channels, epsilon=EPSILON, rngs=rngs)
        self.dropout = dropout_layer(dropout, rngs)
        self.out = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""
        for stage, blocks in enumerate(self.stages):
            shrink = self.shrinks[stage]
            norm = self.norms[stage]
            x = norm(shrink(x)) if stage == 0 else shrink(norm(x))
            for block in blocks:
                x = block(x)
        features = self.norm(jnp.mean(x, axis=(1, 2)))
        if self.dropout is not None:
            features = self.dropout(features)
        return self.out(features)


_SIZES = {
    "atto": ((2, 2, 6, 2), (40, 80, 160, 320)),
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
}


def convnext_size(name: str) -> dict[str, Any]:
    """Return arguments of `ConvNeXt`: atto, tiny, small or base.

    They are those of Liu et al. 2022, section 3; atto is that of Woo et al. 2023,
    "ConvNeXt V2", appendix A.

    Raises:
      ValueError: the name is none of these.
    """
    if name not in _SIZES:
        raise ValueError(f"size {name!r} is none of {', '.join(_SIZES)}")
    blocks, dims = _SIZES[name]
    return {"blocks": blocks, "dims": dims}


# ---- internals ----


def _patches(
    inner: int,
    outer: int,
    side: int,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    size = (side, side)
    return nnx.Conv(inner, outer, size, strides=size, padding="VALID", rngs=rngs)

"""Vision Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer

# Spread of the positions and extra tokens at first (Dosovitskiy et al. 2021, the
# authors' code).
SPREAD = 0.02


class EncoderBlock(nnx.Module):
    """Attention and an MLP, each on normalized inputs and added to them.

    Args:
      dim: width of the inputs and outputs.
      heads: a divisor of `dim`.
      hidden: width of the MLP.
      dropout: share dropped, in training, of what each of the two adds.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(dim, rngs=rngs)
        linear = partial(nnx.Linear, rngs=rngs)
        self.qkv = linear(dim, 3 * dim)
        self.out = linear(dim, dim)
        self.mlp_norm = nnx.LayerNorm(dim, rngs=rngs)
        self.up = linear(dim, hidden)
        self.down = linear(hidden, dim)
        self.dropout = dropout_layer(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, length, dim) to the same shape."""
        x = x + self._drop(self._attention(self.attention_norm(x)))
        hidden = nnx.gelu(self.up(self.mlp_norm(x)))
        return x + self._drop(self.down(hidden))

    def _attention(self, x: jax.Array) -> jax.Array:
        shape = (*x.shape[:2], self.heads, -1)
        parts = jnp.split(self.qkv(x), 3, axis=-1)
        query, key, value = (part.reshape(shape) for part in parts)
        mixed = jax.nn.dot_product_attention(query, key, value)
        return self.out(mixed.reshape(x.shape))

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.dropout is None:
            return x
        return self.dropout(x)


class ViT(nnx.Module):
    """A Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words").

    With `convolutions`, patches are made by 3x3 convolutions with pools instead of one
    product each, which is much better on small data (Hassani et al. 2021, "Escaping the
    Big Data Paradigm with Compact Transformers", section 3.3).

    Args:
      classes: number of logits.
      size: side of the images, or (height, width).
      patch: side of a patch, which divides the size; with `convolutions`, 2 for each.
      channels: of the images.
      dim: width of the residual stream.
      layers: number of blocks.
      heads: a divisor of `dim`.
      hidden: width of the MLPs. None: 4 times `dim`.
      pool: "mean" of the patches' features, or that of a "class" token.
      registers: tokens without a meaning (Darcet et al. 2024, "Vision Transformers Need
        Registers").
      convolutions: how many make the patches; 0: one product.
      dropout: share dropped, in training, of what each layer adds.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: a size can't be, or patches do not divide the images.
    """

    def __init__(
        self,
        classes: int,
        *,
        size: int | Sequence[int] = 224,
        patch: int = 16,
        channels: int = 3,
        dim: int = 384,
        layers: int = 12,
        heads: int = 6,
        hidden: int | None = None,
        pool: Literal["mean", "class"] = "mean",
        registers: int = 0,
        convolutions: int = 0,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        height, width = (size, size) if isinstance(size, int) else size
        patch = 2**convolutions if convolutions else patch
        _check(classes, dim, heads, layers)
        if patch < 1 or height % patch or width % patch:
            raise ValueError(
                f"patches of {patch} pixels do not divide images of {height}x{width}"
            )
        if pool not in ("mean", "class") or registers < 0 or not 0 <= dropout < 1:
            raise ValueError(
                f"pool is {pool!r}, registers are {registers}, dropout is {dropout};"
                " they must be 'mean' or 'class', at least 0, and from 0 to below 1"
            )

        self.convs = nnx.List(_convolutions(convolutions, channels, dim, rngs))
        self.patch = None if convolutions else _patches(channels, dim, patch, rngs)
        length = (height // patch) * (width // patch)
        self.positions = _tokens(length, dim, rngs)
        self.extra = registers + (pool == "class")
        self.tokens = _tokens(self.extra, dim, rngs) if self.extra else None
        self.is_class = pool == "class"
        blocks = []
        for _ in range(layers):
            block = EncoderBlock(
                dim,
                heads,
                hidden or 4 * dim,
                dropout=dropout,
                rngs=rngs,
            )
            blocks.append(block)
        self.blocks = nnx.List(blocks)
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.out = nnx.Linear(dim, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""
        batch = x.shape[0]
        if self.patch is not None:
            x = self.patch(x)
        for conv in self.convs:
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        x = x.reshape(batch, -1, x.shape[-1])
        x = x + self.positions[...].astype(x.dtype)
        if self.tokens is not None:
            tokens = self.tokens[...].astype(x.dtype)
            shape = (batch, *tokens.shape)
            x = jnp.concatenate([jnp.broadcast_to(tokens, shape), x], axis=1)

        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        features = x[:, 0] if self.is_class else x[:, self.extra :].mean(axis=1)
        return self.out(features)


_SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}


def vit_size(name: str) -> dict[str, Any]:
    """Return arguments of `ViT`: tiny, small, base, large or compact.

    base and large are those of Dosovitskiy et al. 2021, table 1; tiny and small of
    Touvron et al. 2021, "Training data-efficient image transformers", table 1; compact
    is CCT-7/3x2 of Hassani et al. 2021, section 4.2, for images of 32 to 96 pixels.

    Raises:
      ValueError: the name is none of these.
    """
    if name == "compact":
        return {
            "dim": 256,
            "layers": 7,
            "heads": 4,
            "hidden": 512,
            "convolutions": 2,
        }
    if name not in _SIZES:
        raise ValueError(f"size {name!r} is none of {', '.join(_SIZES)}, compact")
    dim, layers, heads = _SIZES[name]
    return {"dim": dim, "layers": layers, "heads": heads}


# ---- internals ----


def _check(
    classes: int,
    dim: int,
    heads: int,
    layers: int,
) -> None:
    if min(classes, dim, heads, layers) < 1 or dim % heads:
        raise ValueError(
            f"{classes} classes, {heads} heads, {layers} layers of width {dim}: each"
            " must be at least 1, and the heads divide the width"
        )


def _patches(
    channels: int,
    dim: int,
    patch: int,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    side = (patch, patch)
    return nnx.Conv(channels, dim, side, strides=side, rngs=rngs)


def _convolutions(
    count: int,
    channels: int,
    dim: int,
    rngs: nnx.Rngs,
) -> list[nnx.Conv]:
    """Return 3x3 convolutions, each of half as many channels as the next one."""
    convs = []
    for number in range(count):
        width = max(dim // 2 ** (count - 1 - number), 1)
        convs.append(nnx.Conv(channels, width, (3, 3), use_bias=False, rngs=rngs))
        channels = width
    return convs


def _tokens(
    count: int,
    dim: int,
    rngs: nnx.Rngs,
) -> nnx.Param:
    drawn = jax.random.normal(rngs.params(), (count, dim))
    return nnx.Param(SPREAD * drawn)

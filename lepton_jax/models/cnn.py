"""A small convolutional network for small images."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from lepton_jax.models.dropping import dropout_layer


class CNN(nnx.Module):
    """Convolutions, one dense layer and the logits.

    The convolutions are 3x3, with ReLU, and 2x2 max pooling between them. The defaults
    are the classic MNIST network: 32-64-64 convolutions and 64 dense units.

    Args:
      classes: number of logits.
      size: (height, width, channels) of the images.
      widths: channels of each convolution.
      dense: units of the dense layer; 0: none, but the mean of each channel, which is
        better where data is scarce.
      stride: of the first convolution, in pixels.
      padding: "VALID" shrinks an image by 2 at each convolution, "SAME" does not.
      batch_norm: normalize after each convolution.
      dropout: share dropped, in training, before the dense layer and after it.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: the images are too small, or the dropout is no share.
    """

    def __init__(
        self,
        classes: int,
        *,
        size: Sequence[int] = (28, 28, 1),
        widths: Sequence[int] = (32, 64, 64),
        dense: int = 64,
        stride: int = 1,
        padding: str = "SAME",
        batch_norm: bool = False,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        height, width, channels = size
        convs = []
        pools = []
        for i, features in enumerate(widths):
            step = stride if i == 0 else 1
            conv = nnx.Conv(
                channels,
                features,
                (3, 3),
                strides=(step, step),
                padding=padding,
                use_bias=not batch_norm,
                rngs=rngs,
            )
            convs.append(conv)
            channels = features
            if padding != "SAME":
                height -= 2
                width -= 2
            height = -(-height // step)
            width = -(-width // step)
            if min(height, width) < 1:
                raise ValueError(
                    f"images of {tuple(size)} are too small for {len(widths)} {padding}"
                    " convolutions"
                )

            is_last = i == len(widths) - 1
            pools.append(not is_last and min(height, width) >= 2)
            if pools[-1]:
                height //= 2
                width //= 2

        self.convs = nnx.List(convs)
        self.pools = tuple(pools)
        self.norms = nnx.List(
            [nnx.BatchNorm(n, momentum=0.9, rngs=rngs) for n in widths if batch_norm]
        )
        pixels = height * width * channels
        self.dense = nnx.Linear(pixels, dense, rngs=rngs) if dense else None
        self.out = nnx.Linear(dense or channels, classes, rngs=rngs)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1")
        self.dropout = dropout_layer(dropout, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if self.norms:
                x = self.norms[i](x)
            x = nnx.relu(x)
            if self.pools[i]:
                x = nnx.max_pool(
                    x,
                    (2, 2),
                    strides=(2, 2),
                )

        if self.dense is None:
            return self.out(self._drop(x.mean(axis=(1, 2))))
        x = self._drop(x.reshape(x.shape[0], -1))
        hidden = self._drop(nnx.relu(self.dense(x)))
        return self.out(hidden)

    def _drop(self, x: jax.Array) -> jax.Array:
        if self.dropout is None:
            return x
        return self.dropout(x)

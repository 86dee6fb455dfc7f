"""A variational auto-encoder of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lepton_jax.models.gan import checked, enlarged, folded

# Of a pixel whose range is -1 to 1; assumption
DEVIATION = 0.3


class Decoder(nnx.Module):
    """Codes to images, twice enlarged by a factor of two.

    An image grows by a convolution with four times the channels, whose channels then
    become 2x2 pixels (Shi et al. 2016, "Real-time single image and video
    super-resolution", section 3.1).

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      latent: length of a code.
      width: channels of the last hidden layer; the one before has twice as many.
      rngs: stream `params`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        latent: int = 16,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        height, length, channels = checked(size)
        self.latent = latent
        self.start = (height // 4, length // 4, 2 * width)
        self.input = nnx.Linear(
            latent,
            math.prod(self.start),
            rngs=rngs,
        )
        self.norms = nnx.List(
            [nnx.GroupNorm(n, num_groups=8, rngs=rngs) for n in (2 * width, width)]
        )
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.middle = conv(2 * width, 4 * width)
        self.output = conv(width, 4 * channels)

    def __call__(self, code: jax.Array) -> jax.Array:
        """Map codes (batch, latent) to images (batch, h, w, channels) in -1 to 1."""
        x = self.input(code).reshape(-1, *self.start)
        x = nnx.relu(self.norms[0](x))
        x = enlarged(self.middle(x))
        x = nnx.relu(self.norms[1](x))
        return jnp.tanh(enlarged(self.output(x)))


class VAE(nnx.Module):
    """Images to a normal distribution over codes, and a code back to an image.

    Kingma & Welling 2014, "Auto-encoding variational Bayes".

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      latent: length of a code.
      width: channels of the layers nearest to the images.
      rngs: streams `params` and `noise`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        latent: int = 16,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        self.decoder = Decoder(
            size,
            latent=latent,
            width=width,
            rngs=rngs,
        )
        height, length, channels = size
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.first = conv(4 * channels, width)
        self.second = conv(4 * width, 2 * width)
        self.code = nnx.Linear(
            height // 4 * (length // 4) * 2 * width,
            2 * latent,
            rngs=rngs,
        )
        self.rngs = rngs.fork()

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Encode and decode images (batch, height, width, channels) in -1 to 1.

        Returns:
          "image" and "decoded", of the images' shape; "mean" and "log_variance" of the
          codes, (batch, latent).
        """
        x = nnx.relu(self.first(folded(images)))
        x = nnx.relu(self.second(folded(x)))
        both = self.code(x.reshape(x.shape[0], -1))
        mean, log_variance = jnp.split(both, 2, axis=-1)
        noise = jax.random.normal(self.rngs.noise(), mean.shape, mean.dtype)
        code = mean + jnp.exp(log_variance / 2) * noise
        return {
            "image": images,
            "decoded": self.decoder(code),
            "mean": mean,
            "log_variance": log_variance,
        }

    def samples(self, key: jax.Array, count: int) -> jax.Array:
        """Return images (count, height, width, channels), from 0 to 1."""
        code = jax.random.normal(key, (count, self.decoder.latent))
        return (self.decoder(code) + 1) / 2


def evidence_loss(
    outputs: dict[str, jax.Array],
    targets: object,
    deviation: float = DEVIATION,
) -> jax.Array:
    """Return the negative bound on the evidence of each image, in nats, (batch,).

    A pixel is normal around the decoder's with a fixed deviation; the constant of its
    density is left out.

    Args:
      outputs: of a `VAE`.
      targets: not used.
      deviation: of a pixel; a smaller one asks for sharper images and gives the codes
        more to say.
    """
    del targets
    apart = optax.squared_error(outputs["decoded"], outputs["image"])
    apart = apart / (2 * deviation**2)
    error = apart.reshape(apart.shape[0], -1).sum(-1)
    mean = outputs["mean"]
    log_variance = outputs["log_variance"]
    divergence = jnp.exp(log_variance) + mean**2 - 1 - log_variance
    return error + divergence.sum(-1) / 2

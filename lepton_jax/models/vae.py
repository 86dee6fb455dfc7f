"""A variational auto-encoder of images."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lepton_jax.models.gan import Generator, folded

# Of a pixel whose range is -1 to 1; assumption
DEVIATION = 0.3


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
        self.decoder = Generator(
            size,
            latent=latent,
            width=width,
            rngs=rngs,
        )
        height, length, channels = size
        self.first = nnx.Conv(4 * channels, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(4 * width, 2 * width, (3, 3), rngs=rngs)
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

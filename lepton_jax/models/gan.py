"""A generator and a discriminator that learn from each other."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

SLOPE = 0.2  # of the leaky rectifier; Radford et al. 2016, section 3


class Generator(nnx.Module):
    """Noise to images, twice enlarged by a factor of two.

    An image grows by a convolution with four times the channels, whose channels then
    become 2x2 pixels (Shi et al. 2016, "Real-time single image and video
    super-resolution", section 3.1).

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      latent: length of the noise.
      width: channels of the last hidden layer; the one before has twice as many.
      rngs: stream `params`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        latent: int = 64,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        height, length, channels = _checked(size)
        self.latent = latent
        self.start = (height // 4, length // 4, 2 * width)
        self.input = nnx.Linear(
            latent,
            height // 4 * (length // 4) * 2 * width,
            rngs=rngs,
        )
        self.norms = nnx.List(
            [nnx.GroupNorm(n, num_groups=8, rngs=rngs) for n in (2 * width, width)]
        )
        self.middle = nnx.Conv(2 * width, 4 * width, (3, 3), rngs=rngs)
        self.output = nnx.Conv(width, 4 * channels, (3, 3), rngs=rngs)

    def __call__(self, noise: jax.Array) -> jax.Array:
        """Map noise (batch, latent) to images (batch, h, w, channels) in -1 to 1."""
        x = self.input(noise).reshape(-1, *self.start)
        x = nnx.relu(self.norms[0](x))
        x = enlarged(self.middle(x))
        x = nnx.relu(self.norms[1](x))
        return jnp.tanh(enlarged(self.output(x)))


class Discriminator(nnx.Module):
    """Images to logits: above 0 for one that looks real.

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      width: channels of the first layer; the second has twice as many.
      rngs: stream `params`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        height, length, channels = _checked(size)
        self.first = nnx.Conv(4 * channels, width, (3, 3), rngs=rngs)
        self.second = nnx.Conv(4 * width, 2 * width, (3, 3), rngs=rngs)
        self.output = nnx.Linear(
            height // 4 * (length // 4) * 2 * width,
            1,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch,)."""
        x = nnx.leaky_relu(self.first(folded(images)), SLOPE)
        x = nnx.leaky_relu(self.second(folded(x)), SLOPE)
        return self.output(x.reshape(x.shape[0], -1))[:, 0]


class GAN(nnx.Module):
    """Two players in one module, which one gradient trains (Goodfellow et al. 2014).

    The outputs are three logits of the discriminator, and a loss takes the sum of what
    both players want. No gradient goes where it must not: `fake` does not reach the
    generator, and `fooled` does not reach the parameters of the discriminator. So each
    player gets the gradient of its own loss, and each can have its own optimizer.

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      latent: length of the noise.
      width: channels of the layers nearest to the images.
      rngs: streams `params` and `noise`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        latent: int = 64,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        self.generator = Generator(
            size,
            latent=latent,
            width=width,
            rngs=rngs,
        )
        self.discriminator = Discriminator(size, width=width, rngs=rngs)
        self.rngs = rngs.fork()

    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Let the players meet over images (batch, height, width, channels).

        Returns:
          Logits (batch,) each: "real" for the images, "fake" for generated ones, and
          "fooled" for the same as the generator sees them.
        """
        shape = (images.shape[0], self.generator.latent)
        noise = jax.random.normal(self.rngs.noise(), shape, images.dtype)
        made = self.generator(noise)

        graph, parameters = nnx.split(self.discriminator)
        judge = nnx.merge(graph, jax.lax.stop_gradient(parameters))
        return {
            "real": self.discriminator(images),
            "fake": self.discriminator(jax.lax.stop_gradient(made)),
            "fooled": judge(made),
        }

    def samples(self, key: jax.Array, count: int) -> jax.Array:
        """Return images (count, height, width, channels), from 0 to 1."""
        noise = jax.random.normal(key, (count, self.generator.latent))
        return (self.generator(noise) + 1) / 2


def adversarial_loss(outputs: dict[str, jax.Array], targets: object) -> jax.Array:
    """Return the sum of both players' losses, (batch,).

    The generator's is the one that does not saturate (Goodfellow et al. 2014, section
    3): -log D(G(z)).

    Args:
      outputs: of a `GAN`.
      targets: not used.
    """
    del targets
    judged = nnx.softplus(-outputs["real"]) + nnx.softplus(outputs["fake"])
    return judged + nnx.softplus(-outputs["fooled"])


def enlarged(x: jax.Array) -> jax.Array:
    """Turn channels into pixels: (b, h, w, 4 c) to (b, 2 h, 2 w, c)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def folded(x: jax.Array) -> jax.Array:
    """Turn pixels into channels: (b, 2 h, 2 w, c) to (b, h, w, 4 c)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def _checked(size: Sequence[int]) -> Sequence[int]:
    height, width, _ = size
    if height % 4 or width % 4:
        raise ValueError(f"images of {tuple(size)}: height and width must divide by 4")
    return size

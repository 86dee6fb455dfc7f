"""A generator and a discriminator that learn from each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

SLOPE = 0.2  # of the leaky rectifier; Radford et al. 2016, section 3
PENALTY = 1.0  # of the slopes; Huang et al. 2024, table 7, for stacked MNIST


class Generator(nnx.Module):
    """Noise and classes to images, twice enlarged by a factor of two.

    An image grows by a convolution with four times the channels, whose channels then
    become 2x2 pixels (Shi et al. 2016, "Real-time single image and video
    super-resolution", section 3.1).

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      classes: number of classes.
      latent: length of the noise.
      width: channels at half of the resolution; at a quarter there are twice as many.
      rngs: stream `params`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        classes: int = 1,
        latent: int = 64,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        height, length, channels = checked(size)
        deep = 2 * width
        self.classes = classes
        self.latent = latent
        self.start = (height // 4, length // 4, deep)
        self.input = nnx.Linear(
            latent + classes,
            math.prod(self.start),
            rngs=rngs,
        )
        self.norms = nnx.List(
            [
                nnx.GroupNorm(n, num_groups=8, rngs=rngs)
                for n in (deep, deep, width, width)
            ]
        )
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.low = conv(deep, deep)
        self.middle = conv(deep, 4 * width)
        self.high = conv(width, width)
        self.output = conv(width, 4 * channels)

    def __call__(self, noise: jax.Array, classes: jax.Array) -> jax.Array:
        """Map noise (batch, latent) and classes (batch,) to images in -1 to 1.

        Returns:
          Images (batch, height, width, channels).
        """
        wanted = jax.nn.one_hot(classes, self.classes, dtype=noise.dtype)
        x = jnp.concatenate([noise, wanted], axis=-1)
        x = self.input(x).reshape(-1, *self.start)
        x = x + self.low(self._active(0, x))
        x = self.middle(self._active(1, x))
        x = enlarged(x)
        x = x + self.high(self._active(2, x))
        x = self.output(self._active(3, x))
        return jnp.tanh(enlarged(x))

    def _active(self, number: int, x: jax.Array) -> jax.Array:
        """Return what a convolution sees: normalized and rectified."""
        normed = self.norms[number](x)
        return nnx.relu(normed)


class Discriminator(nnx.Module):
    """Images and classes to logits: above 0 for one that looks real.

    Each class has a last layer of its own, on features that all share (Miyato and
    Koyama 2018, "cGANs with projection discriminator").

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      classes: number of classes.
      width: channels at half of the resolution; at a quarter there are twice as many.
      rngs: stream `params`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        classes: int = 1,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        height, length, channels = checked(size)
        deep = 2 * width
        self.classes = classes
        conv = partial(nnx.Conv, kernel_size=(3, 3), rngs=rngs)
        self.first = conv(4 * channels, width)
        self.second = conv(4 * width, deep)
        self.third = conv(deep, deep)
        self.output = nnx.Linear(
            height // 4 * (length // 4) * deep,
            classes,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array, classes: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch,).

        Args:
          images: in -1 to 1.
          classes: (batch,), from 0.
        """
        active = partial(nnx.leaky_relu, negative_slope=SLOPE)
        x = active(self.first(folded(images)))
        x = active(self.second(folded(x)))
        x = x + active(self.third(x))
        x = x.reshape(x.shape[0], -1)
        logits = self.output(x)
        asked = jax.nn.one_hot(classes, self.classes, dtype=logits.dtype)
        return (logits * asked).sum(-1)


class GAN(nnx.Module):
    """Two players in one module, which one gradient trains (Goodfellow et al. 2014).

    The outputs are three logits of the discriminator and a penalty, and a loss takes
    the sum of what both players want. No gradient goes where it must not: `fake` does
    not reach the generator, and `fooled` does not reach the parameters of the
    discriminator. So each player gets the gradient of its own loss, and each can have
    its own optimizer.

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      shares: share of the images that each class has; one class if left out.
      latent: length of the noise.
      width: channels of both players at half of the resolution; at a quarter there are
        twice as many.
      rngs: streams `params` and `noise`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        shares: Sequence[float] = (1.0,),
        latent: int = 64,
        width: int = 32,
        rngs: nnx.Rngs,
    ):
        self.shares = tuple(shares)
        self.generator = Generator(
            size,
            classes=len(shares),
            latent=latent,
            width=width,
            rngs=rngs,
        )
        self.discriminator = Discriminator(
            size,
            classes=len(shares),
            width=width,
            rngs=rngs,
        )
        self.rngs = rngs.fork()

    def __call__(
        self,
        images: jax.Array,
        classes: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Let the players meet over images (batch, height, width, channels).

        Args:
          images: in -1 to 1.
          classes: (batch,), from 0. The generated images get the same ones.

        Returns:
          (batch,) each: the logits "real" for the images, "fake" for generated ones,
          and "fooled" for the same as the generator sees them; "steepness", the sum of
          the squared slopes of the first two over the pixels.
        """
        count = images.shape[0]
        if classes is None:
            classes = jnp.zeros(count, jnp.int32)
        shape = (count, self.generator.latent)
        key = self.rngs.noise()
        noise = jax.random.normal(key, shape, images.dtype)
        made = self.generator(noise, classes)

        graph, parameters = nnx.split(self.discriminator)
        parameters = jax.lax.stop_gradient(parameters)
        judge = nnx.merge(graph, parameters)
        real, steep = self._judged(images, classes)
        still = jax.lax.stop_gradient(made)
        fake, steep_too = self._judged(still, classes)
        return {
            "real": real,
            "fake": fake,
            "fooled": judge(made, classes),
            "steepness": steep + steep_too,
        }

    def _judged(
        self,
        images: jax.Array,
        classes: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """Return logits, and their squared slopes summed over the pixels."""

        def total(images: jax.Array) -> tuple[jax.Array, jax.Array]:
            logits = self.discriminator(images, classes)
            return logits.sum(), logits

        gradient = jax.grad(total, has_aux=True)
        slopes, logits = gradient(images)
        pixels = range(1, slopes.ndim)
        return logits, (slopes**2).sum(pixels)

    def samples(self, key: jax.Array, count: int) -> jax.Array:
        """Return images (count, height, width, channels), from 0 to 1."""
        keys = jax.random.split(key)
        classes = drawn_classes(keys[0], self.shares, count)
        shape = (count, self.generator.latent)
        noise = jax.random.normal(keys[1], shape)
        images = self.generator(noise, classes)
        return (images + 1) / 2


def adversarial_loss(
    outputs: dict[str, jax.Array],
    targets: object,
    penalty: float = PENALTY,
) -> jax.Array:
    """Return the sum of both players' losses, (batch,).

    Each wants a generated image to look more real, or less, than the real one of the
    pair; the discriminator also has a zero-centered penalty of its slopes on both
    (Huang et al. 2024, "The GAN is dead; long live the GAN!", equations 2 and 4):

        log(1 + exp(D(G(z)) - D(x))) + p / 2 (|D'(x)|^2 + |D'(G(z))|^2)
        log(1 + exp(D(x) - D(G(z))))

    Args:
      outputs: of a `GAN`.
      targets: not used.
      penalty: the p of above.
    """
    del targets
    real = outputs["real"]
    judged = nnx.softplus(outputs["fake"] - real)
    still = jax.lax.stop_gradient(real)
    made = nnx.softplus(still - outputs["fooled"])
    return judged + penalty / 2 * outputs["steepness"] + made


def drawn_classes(
    key: jax.Array,
    shares: Sequence[float],
    count: int,
) -> jax.Array:
    """Draw classes (count,), each as often as its share says."""
    logits = jnp.log(jnp.asarray(shares))
    return jax.random.categorical(key, logits, shape=(count,))


def enlarged(x: jax.Array) -> jax.Array:
    """Turn channels into pixels: (b, h, w, 4 c) to (b, 2 h, 2 w, c)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height, width, 2, 2, channels // 4)
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(batch, 2 * height, 2 * width, channels // 4)


def folded(x: jax.Array) -> jax.Array:
    """Turn pixels into channels: (b, 2 h, 2 w, c) to (b, h, w, 4 c)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    x = jnp.swapaxes(x, 2, 3)
    return x.reshape(batch, height // 2, width // 2, 4 * channels)


def checked(size: Sequence[int]) -> Sequence[int]:
    """Return the size of images that can be halved twice.

    Raises:
      ValueError: height or width do not divide by 4.
    """
    height, width, _ = size
    if height % 4 or width % 4:
        raise ValueError(f"images of {tuple(size)}: height and width must divide by 4")
    return size

"""A small U-Net that turns noise into images, step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from lepton_jax.models.dropping import dropout_layer
from lepton_jax.models.gan import drawn_classes, enlarged, folded

LONGEST_PERIOD = 10_000.0  # of the codes of time; Vaswani et al. 2017, section 3.5
TIME_SCALE = 1000.0  # steps that a time of 1 stands for; Ho et al. 2020, section 4
GROUPS = 8  # of a group norm; assumption
WHOLE_UNITS = 16  # of the layer over all pixels, for each channel; assumption
UNTOLD_SHARE = 0.1  # of the classes; Ho and Salimans 2022, section 4
DEVIATION = 0.5  # of pixels in -1 to 1; Karras et al. 2022, table 1


class Block(nnx.Module):
    """Two 3x3 convolutions around which the input goes, told the time between them.

    Args:
      inputs: channels of the input.
      outputs: channels of the output.
      time: width of the code of time.
      dropout: share of the units dropped before the second convolution.
      rngs: streams `params` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        time: int,
        dropout: float,
        *,
        rngs: nnx.Rngs,
    ):
        norms = [group_norm(n, rngs) for n in (inputs, outputs)]
        self.norms = nnx.List(norms)
        conv = partial(nnx.Conv, inputs, outputs, rngs=rngs)
        self.first = conv((3, 3))
        self.second = nnx.Conv(
            outputs,
            outputs,
            (3, 3),
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.time = nnx.Linear(time, 2 * outputs, rngs=rngs)
        self.dropout = dropout_layer(dropout, rngs)
        changes = inputs != outputs
        self.way_round = conv((1, 1)) if changes else None

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """Map (batch, h, w, inputs), told codes (batch, time), to (..., outputs)."""
        normed = self.norms[0](x)
        hidden = self.first(nnx.silu(normed))
        told = self.time(time)[:, None, None, :]
        scale, shift = jnp.split(told, 2, axis=-1)
        normed = self.norms[1](hidden)
        hidden = nnx.silu(normed * (1 + scale) + shift)
        if self.dropout is not None:
            hidden = self.dropout(hidden)
        if self.way_round is not None:
            x = self.way_round(x)
        return x + self.second(hidden)


class Whole(nnx.Module):
    """Two dense layers over all pixels at once, around which the input goes.

    What a convolution passes on only slowly, such as where a stroke must end, is known
    everywhere after one of these. A few channels a pixel keep it small.

    Args:
      shape: (height, width, channels) of the input.
      narrow: channels that the dense layers see.
      units: between the dense layers.
      time: width of the code of time.
      rngs: stream `params`.
    """

    def __init__(
        self,
        shape: Sequence[int],
        narrow: int,
        units: int,
        time: int,
        *,
        rngs: nnx.Rngs,
    ):
        *grid, channels = shape
        numbers = math.prod(grid) * narrow
        linear = partial(nnx.Linear, rngs=rngs)
        self.narrow = narrow
        self.norm = group_norm(channels, rngs)
        self.enter = nnx.Conv(channels, narrow, (1, 1), rngs=rngs)
        self.first = linear(numbers, units)
        self.time = linear(time, 2 * units)
        self.second = linear(units, numbers)
        self.leave = nnx.Conv(
            narrow,
            channels,
            (1, 1),
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array, time: jax.Array) -> jax.Array:
        """Map (batch, height, width, channels), told codes (batch, time), to alike."""
        batch, height, width, _ = x.shape
        hidden = self.enter(self.norm(x))
        hidden = hidden.reshape(batch, -1)
        scale, shift = jnp.split(self.time(time), 2, axis=-1)
        hidden = self.first(hidden) * (1 + scale)
        hidden = nnx.silu(hidden + shift)
        hidden = self.second(hidden)
        hidden = hidden.reshape(batch, height, width, self.narrow)
        return x + self.leave(hidden)


class UNet(nnx.Module):
    """Noisy images, times and classes to images of the same size.

    Pixels are first folded into channels, 2x2 to 1, so that the convolutions work at
    half and at a quarter of the resolution.

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      width: channels at half of the resolution; at a quarter there are twice as many.
      blocks: on each way, down and up, at each resolution.
      classes: number of classes.
      dropout: share of the units dropped in each block.
      rngs: streams `params` and, with dropout, `dropout`.

    Raises:
      ValueError: height or width do not divide by 4.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        width: int = 32,
        blocks: int = 1,
        classes: int = 1,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        height, length, channels = size
        if height % 4 or length % 4:
            raise ValueError(
                f"images of {tuple(size)}: height and width must divide by 4"
            )
        time = 4 * width
        self.width = width

        def row(inputs: int, outputs: int) -> nnx.List:
            row = [Block(inputs, outputs, time, dropout, rngs=rngs)]
            for _ in range(blocks - 1):
                row.append(Block(outputs, outputs, time, dropout, rngs=rngs))
            return nnx.List(row)

        linears = [nnx.Linear(n, time, rngs=rngs) for n in (width, time)]
        pointwise = partial(nnx.Conv, kernel_size=(1, 1), rngs=rngs)
        self.time = nnx.List(linears)
        self.classes = nnx.Embed(classes, time, rngs=rngs)
        self.input = nnx.Conv(4 * channels, width, (3, 3), rngs=rngs)
        self.down = row(width, width)
        self.lower = pointwise(4 * width, 2 * width)
        self.whole = Whole(
            (height // 4, length // 4, 2 * width),
            max(width // 2, 1),
            WHOLE_UNITS * width,
            time,
            rngs=rngs,
        )
        self.bottom = row(2 * width, 2 * width)
        self.upper = pointwise(2 * width, 4 * width)
        self.up = row(2 * width, width)
        self.norm = group_norm(width, rngs)
        self.output = nnx.Conv(
            width,
            4 * channels,
            (3, 3),
            kernel_init=nnx.initializers.zeros,
            rngs=rngs,
        )

    def __call__(
        self,
        images: jax.Array,
        time: jax.Array,
        classes: jax.Array,
    ) -> jax.Array:
        """Map images (batch, h, w, channels) to the same shape.

        Args:
          images: with noise.
          time: (batch,), from 0 to 1.
          classes: (batch,), from 0.
        """
        code = self.time[0](time_codes(time, self.width))
        code = self.time[1](nnx.silu(code))
        code = nnx.silu(code + self.classes(classes))
        x = self.input(folded(images))
        for block in self.down:
            x = block(x, code)

        low = self.lower(folded(x))
        low = self.whole(low, code)
        for block in self.bottom:
            low = block(low, code)

        high = enlarged(self.upper(low))
        x = jnp.concatenate([x, high], axis=-1)
        for block in self.up:
            x = block(x, code)
        x = nnx.silu(self.norm(x))
        return enlarged(self.output(x))


class Diffusion(nnx.Module):
    """Images from noise, along straight lines between the two.

    At the time t, from 0 to 1, an image x and noise e are mixed as (1 - t) x + t e, and
    the direction e - x is learned (Lipman et al. 2023, "Flow matching for generative
    modeling", section 4.1; Liu et al. 2023, "Flow straight and fast"). In training, t
    is the sigmoid of a normal number, so that the middle is seen most (Esser et al.
    2024, section 3.1). What is best for pixels that are independent normal numbers is
    known; the U-Net adds what is missing, for inputs and outputs of about the variance
    1 at any time (Karras et al. 2022, "Elucidating the design space of diffusion-based
    generative models", section 5, for these lines).

    To sample, noise goes that way back in `steps` steps, with a correction in each but
    the last (Heun; algorithm 1 there). A tenth of the classes is not told in training,
    so that the way without a class is known too, and samples can go away from it (Ho
    and Salimans 2022, "Classifier-free diffusion guidance").

    Args:
      size: (height, width, channels) of the images; height and width divide by 4.
      shares: share of the images that each class has; one class if left out.
      width: channels of the U-Net at half of the resolution.
      blocks: of the U-Net, on each way at each resolution.
      dropout: share of the units dropped in each block.
      steps: from noise to an image.
      guidance: how far a sample goes the way of its class, as a multiple of how far
        that is from the way of any class.
      rngs: streams `params`, `noise` and, with dropout, `dropout`.
    """

    def __init__(
        self,
        size: Sequence[int] = (28, 28, 1),
        *,
        shares: Sequence[float] = (1.0,),
        width: int = 32,
        blocks: int = 1,
        dropout: float = 0.0,
        steps: int = 15,
        guidance: float = 1.0,
        rngs: nnx.Rngs,
    ):
        self.size = tuple(size)
        self.shares = tuple(shares)
        self.steps = steps
        self.guidance = guidance
        self.net = UNet(
            size,
            width=width,
            blocks=blocks,
            classes=len(shares) + 1,
            dropout=dropout,
            rngs=rngs,
        )
        self.rngs = rngs.fork()

    def __call__(
        self,
        images: jax.Array,
        classes: jax.Array | None = None,
    ) -> dict[str, jax.Array]:
        """Mix images (batch, h, w, channels) in -1 to 1 with noise, and ask the way.

        Args:
          images: to mix.
          classes: (batch,), from 0.

        Returns:
          "predicted" and "direction", of the images' shape.
        """
        count = images.shape[0]
        if classes is None:
            classes = jnp.zeros(count, jnp.int32)
        key = self.rngs.noise()
        untold = jax.random.bernoulli(key, UNTOLD_SHARE, (count,))
        classes = jnp.where(untold, len(self.shares), classes)
        key = self.rngs.noise()
        noise = jax.random.normal(key, images.shape, images.dtype)
        key = self.rngs.noise()
        time = nnx.sigmoid(jax.random.normal(key, (count,)))
        share = _by_image(time, images.dtype)
        mixed = (1 - share) * images + share * noise
        return {
            "predicted": self.direction(mixed, time, classes),
            "direction": noise - images,
        }

    def direction(
        self,
        mixed: jax.Array,
        time: jax.Array,
        classes: jax.Array,
    ) -> jax.Array:
        """Guess the way from images to noise.

        Args:
          mixed: images with noise, (batch, height, width, channels).
          time: (batch,), from 0 to 1.
          classes: (batch,), from 0; their number for one that is not told.
        """
        noise = _by_image(time, mixed.dtype)
        image = (1 - noise) * DEVIATION
        variance = noise**2 + image**2
        # the best guess for independent normal pixels
        known = (noise - image * DEVIATION) / variance * mixed
        scale = jax.lax.rsqrt(variance)
        missing = DEVIATION * scale
        missing = missing * self.net(scale * mixed, time, classes)
        return known + missing

    def samples(self, key: jax.Array, count: int) -> jax.Array:
        """Return images (count, height, width, channels), from 0 to 1."""
        keys = jax.random.split(key)
        classes = drawn_classes(keys[0], self.shares, count)
        pace = 1 / self.steps  # of the time, in one step

        untold = jnp.full_like(classes, len(self.shares))

        def way(x: jax.Array, time: jax.Array | float) -> jax.Array:
            times = jnp.full(count, time)
            told = self.direction(x, times, classes)
            if self.guidance == 1:
                return told
            free = self.direction(x, times, untold)
            return free + self.guidance * (told - free)

        def back(step: jax.Array, x: jax.Array) -> jax.Array:
            now = 1 - step * pace
            first = way(x, now)
            second = way(x - pace * first, now - pace)
            return x - pace * (first + second) / 2

        shape = (count, *self.size)
        noise = jax.random.normal(keys[1], shape)
        near = jax.lax.fori_loop(0, self.steps - 1, back, noise)
        # the last step has no correction: at the time 0 there is no way to ask for
        images = near - pace * way(near, pace)
        images = (images + 1) / 2
        return jnp.clip(images, 0, 1)


def direction_loss(outputs: dict[str, jax.Array], targets: object) -> jax.Array:
    """Return the squared error of the direction, (batch,).

    Args:
      outputs: of a `Diffusion`.
      targets: not used.
    """
    del targets
    apart = outputs["predicted"] - outputs["direction"]
    apart = apart.reshape(apart.shape[0], -1)
    return (apart**2).mean(-1)


def group_norm(channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """Return a norm of groups of channels, as many of `GROUPS` as divide them."""
    groups = math.gcd(channels, GROUPS)
    return nnx.GroupNorm(channels, num_groups=groups, rngs=rngs)


def _by_image(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Return (batch, 1, 1, 1), which meets all pixels of an image."""
    return x.astype(dtype)[:, None, None, None]


def time_codes(time: jax.Array, width: int) -> jax.Array:
    """Return sines and cosines of times (batch,) from 0 to 1, (batch, width)."""
    pairs = width // 2
    exponents = jnp.arange(pairs) / pairs
    angles = TIME_SCALE * time[:, None] * LONGEST_PERIOD**-exponents
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)

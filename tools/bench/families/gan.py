"""A GAN whose two nets are trained in one loss, by a reversed gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


@jax.custom_vjp
def reversed_gradient(x: jax.Array) -> jax.Array:
    """Return the value, whose gradient changes its sign."""
    return x


def _forward(x: jax.Array) -> tuple[jax.Array, None]:
    return x, None


def _backward(
    _: None,
    gradient: jax.Array,
) -> tuple[jax.Array]:
    return (-gradient,)


reversed_gradient.defvjp(_forward, _backward)


class Generator(nnx.Module):
    """Noise to an image, by transposed convolutions."""

    def __init__(
        self,
        noise: int,
        width: int,
        doublings: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.width = width * 2**doublings
        self.enter = nnx.Linear(
            noise,
            16 * self.width,
            rngs=rngs,
        )
        self.layers = nnx.List()
        self.norms = nnx.List()
        entering = self.width
        for _ in range(doublings):
            leaving = entering // 2
            layer = nnx.ConvTranspose(
                entering,
                leaving,
                (4, 4),
                strides=(2, 2),
                rngs=rngs,
            )
            self.layers.append(layer)
            self.norms.append(nnx.LayerNorm(leaving, rngs=rngs))
            entering = leaving
        self.out = nnx.Conv(
            entering,
            3,
            (3, 3),
            rngs=rngs,
        )

    def __call__(self, noise: jax.Array) -> jax.Array:
        """Map (batch, noise) to images (batch, side, side, 3)."""
        x = self.enter(noise).reshape(
            -1,
            4,
            4,
            self.width,
        )
        for layer, norm in zip(
            self.layers,
            self.norms,
            strict=True,
        ):
            x = nnx.relu(norm(layer(x)))
        return nnx.tanh(self.out(x))


class Critic(nnx.Module):
    """An image to how real it looks."""

    def __init__(
        self,
        width: int,
        halvings: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.layers = nnx.List()
        entering = 3
        for i in range(halvings):
            leaving = width * 2**i
            layer = nnx.Conv(
                entering,
                leaving,
                (4, 4),
                strides=(2, 2),
                rngs=rngs,
            )
            self.layers.append(layer)
            entering = leaving
        self.out = nnx.Linear(
            16 * entering,
            1,
            rngs=rngs,
        )

    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, side, side, 3) to logits (batch,)."""
        x = images
        for layer in self.layers:
            x = nnx.leaky_relu(layer(x), 0.2)
        return self.out(
            x.reshape(
                x.shape[0],
                -1,
            )
        )[:, 0]


class GAN(nnx.Module):
    """Both nets on real images and on noise."""

    def __init__(
        self,
        noise: int,
        width: int,
        doublings: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.generator = Generator(noise, width, doublings, rngs=rngs)
        self.critic = Critic(width, doublings, rngs=rngs)

    def __call__(
        self,
        images: jax.Array,
        noise: jax.Array,
    ) -> dict[str, Any]:
        """Map real images and noise to the critic's logits of both."""
        made = reversed_gradient(self.generator(noise))
        return {
            "real": self.critic(images.astype(made.dtype)),
            "made": self.critic(made),
        }


def loss(
    outputs: dict[str, Any],
    targets: jax.Array,
) -> jax.Array:
    """Return the critic's loss of each sample."""
    real = nnx.softplus(-outputs["real"].astype(jnp.float32))
    made = nnx.softplus(outputs["made"].astype(jnp.float32))
    return real + made + 0.0 * targets


def case(draw: Draw) -> Case:
    """Draw the side, the noise and the width."""
    doublings = draw.randint(2, 4)
    side = 4 * 2**doublings
    noise = draw.width(32, 256)
    inputs = {
        "images": shape(
            side,
            side,
            3,
            dtype=jnp.float32,
        ),
        "noise": shape(noise, dtype=jnp.float32),
    }
    return Case(
        partial(
            GAN,
            noise,
            draw.width(16, 96),
            doublings,
        ),
        inputs,
        shape(dtype=jnp.float32),
        loss=loss,
        **draw.rest(),
    )

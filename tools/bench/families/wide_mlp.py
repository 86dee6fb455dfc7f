"""A wide MLP: kernels that are larger than its activations, or the reverse."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class WideMLP(nnx.Module):
    """Dense layers with norms and shortcuts where widths agree."""

    def __init__(
        self,
        widths: tuple[int, ...],
        classes: int,
        *,
        rngs: nnx.Rngs,
    ):
        pairs = list(itertools.pairwise(widths))
        self.layers = nnx.List(
            [
                nnx.Linear(
                    a,
                    b,
                    rngs=rngs,
                )
                for a, b in pairs
            ]
        )
        self.norms = nnx.List([nnx.LayerNorm(b, rngs=rngs) for _, b in pairs])
        self.out = nnx.Linear(
            widths[-1],
            classes,
            rngs=rngs,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, widths[0]) to logits (batch, classes)."""
        for layer, norm in zip(
            self.layers,
            self.norms,
            strict=True,
        ):
            y = nnx.gelu(norm(layer(x)))
            x = x + y if x.shape == y.shape else y
        return self.out(x)


def case(draw: Draw) -> Case:
    """Draw the widths: all alike, or each on its own."""
    size = draw.width(256, 4096)
    layers = draw.randint(1, 6)
    if draw.random() < 0.5:
        hidden = [draw.width(1024, 8192)] * layers
    else:
        hidden = [draw.width(512, 8192) for _ in range(layers)]
    return Case(
        partial(
            WideMLP,
            (size, *hidden),
            draw.classes(),
        ),
        shape(size, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

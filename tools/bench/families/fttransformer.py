"""FT-Transformer (Gorishniy et al. 2021): a token for each feature of a table."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

import lepton_jax as lepton
from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw
from tools.bench.families.layers import Attention


class Layer(nnx.Module):
    """Attention over features and a gated feed-forward layer."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
    ):
        self.first = nnx.LayerNorm(dim, rngs=rngs)
        self.attention = Attention(dim, heads, rngs=rngs)
        self.second = nnx.LayerNorm(dim, rngs=rngs)
        self.up = nnx.Linear(
            dim,
            2 * hidden,
            rngs=rngs,
        )
        self.down = nnx.Linear(hidden, dim, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map (batch, features, dim) to the same shape."""
        x = x + self.attention(self.first(x))
        value, gate = jnp.split(
            self.up(self.second(x)),
            2,
            axis=-1,
        )
        return x + self.down(value * nnx.relu(gate))


class FTTransformer(nnx.Module):
    """Numbers times a vector each, categories from one table, a class token."""

    def __init__(
        self,
        numbers: int,
        rows: int,
        dim: int,
        heads: int,
        layers: int,
        *,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.normal(0.02)
        self.scale = nnx.Param(
            init(
                rngs.params(),
                (numbers, dim),
            )
        )
        self.shift = nnx.Param(
            init(
                rngs.params(),
                (numbers, dim),
            )
        )
        self.label = nnx.Param(
            init(
                rngs.params(),
                (1, 1, dim),
            )
        )
        self.table = nnx.Embed(rows, dim, rngs=rngs)
        hidden = dim * 4 // 3
        self.layers = nnx.List(
            [
                Layer(
                    dim,
                    heads,
                    hidden,
                    rngs=rngs,
                )
                for _ in range(layers)
            ]
        )
        self.norm = nnx.LayerNorm(dim, rngs=rngs)
        self.out = nnx.Linear(dim, 1, rngs=rngs)

    def __call__(
        self,
        numbers: jax.Array,
        categories: jax.Array,
    ) -> jax.Array:
        """Map float32 (batch, n) and int32 (batch, m) to values (batch,)."""
        numeric = numbers[..., None] * self.scale[...] + self.shift[...]
        batch, _, dim = numeric.shape
        label = jnp.broadcast_to(
            self.label[...],
            (batch, 1, dim),
        )
        parts = [label, numeric, self.table(categories)]
        x = jnp.concatenate(
            [p.astype(numeric.dtype) for p in parts],
            axis=1,
        )
        for layer in self.layers:
            x = layer(x)
        return self.out(nnx.relu(self.norm(x[:, 0])))[:, 0]


def case(draw: Draw) -> Case:
    """Draw the numbers of features, the width and the layers."""
    numbers = draw.randint(4, 60)
    categories = draw.randint(1, 30)
    dim = draw.width(64, 512)
    model = partial(
        FTTransformer,
        numbers,
        draw.width(1_000, 100_000),
        dim,
        draw.heads(dim),
        draw.randint(1, 4),
    )
    inputs = {
        "numbers": shape(numbers, dtype=jnp.float32),
        "categories": shape(categories),
    }
    return Case(
        model,
        inputs,
        shape(dtype=jnp.float32),
        loss=lepton.losses.squared_error,
        **draw.rest(),
    )

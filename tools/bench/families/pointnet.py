"""PointNet (Qi et al. 2017), in Linen: dense layers on points, the greatest of each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen

from tools.bench.families.case import Case, shape
from tools.bench.families.draw import Draw


class PointNet(linen.Module):
    """Points to a label; a learned 3x3 map straightens them first."""

    classes: int
    widths: tuple[int, ...]
    hidden: int
    dropout: float

    @linen.compact
    def __call__(
        self,
        points: jax.Array,
        train: bool = False,
    ) -> jax.Array:
        """Map (batch, n, 3) to logits (batch, classes)."""
        y = points
        for width in self.widths:
            y = linen.relu(linen.Dense(width)(y))
        turn = linen.Dense(9)(y.max(axis=1)).reshape(-1, 3, 3)
        x = points.astype(turn.dtype) @ (
            turn
            + jnp.eye(
                3,
                dtype=turn.dtype,
            )
        )
        for width in self.widths:
            x = linen.relu(linen.LayerNorm()(linen.Dense(width)(x)))
        x = x.max(axis=1)
        x = linen.relu(linen.Dense(self.hidden)(x))
        x = linen.Dropout(
            self.dropout,
            deterministic=not train,
        )(x)
        return linen.Dense(self.classes)(x)


def case(draw: Draw) -> Case:
    """Draw the number of points and the widths."""
    points = draw.length(128, 4096)
    widths = tuple(
        draw.width(
            32 * 2**i,
            256 * 2**i,
        )
        for i in range(3)
    )
    model = PointNet(
        draw.classes(),
        widths,
        draw.width(128, 1024),
        draw.choice((0.0, 0.3)),
    )
    return Case(
        model,
        shape(points, 3, dtype=jnp.float32),
        shape(),
        **draw.rest(),
    )

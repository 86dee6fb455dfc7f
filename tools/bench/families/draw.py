"""Draws of sizes, optimizers and precisions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import optax

# Shares of draws (assumption: what is usual is drawn most, what is odd often enough to
# be seen in 150 programs).
ODD = 0.15
WITH_REMAT = 0.15
WITH_CLIPPING = 0.2

OPTIMIZERS: tuple[Callable[[], Any], ...] = (
    lambda: optax.adamw(1e-3),
    lambda: optax.adamw(1e-3),
    lambda: optax.adam(1e-3),
    lambda: optax.sgd(0.1, momentum=0.9),
    lambda: optax.sgd(0.1),
    lambda: optax.lion(1e-4),
    lambda: optax.adafactor(1e-3),
    lambda: optax.rmsprop(1e-3),
)


class Draw(random.Random):
    """A generator of the sizes that families need.

    Attributes:
      scale: by what widths and lengths are multiplied: 1 for devices that only a
        compiler sees, less where steps run on a CPU.
    """

    scale: float = 1.0

    def width(self, low: int, high: int) -> int:
        """Draw a width: mostly a multiple of a large power of 2, at times an odd one.

        Args:
          low: the least, before scaling.
          high: the greatest, before scaling.
        """
        size = max(
            4.0,
            self.between(low, high) * self.scale,
        )
        if self.random() < ODD:
            return round(size)
        unit = 2 ** max(
            2,
            math.floor(math.log2(size)) - 2,
        )
        return max(unit, round(size / unit) * unit)

    def length(self, low: int, high: int) -> int:
        """Draw a length of sequences, or a side of images, like a width."""
        return max(8, self.width(low, high))

    def heads(self, dim: int) -> int:
        """Draw a number of heads that divides a width."""
        fitting = [n for n in (1, 2, 3, 4, 6, 8, 12, 16) if dim % n == 0]
        useful = [n for n in fitting if dim // n >= min(32, dim // 2)]
        return self.choice(useful[-3:])

    def between(self, low: float, high: float) -> float:
        """Draw a number, uniform in its logarithm."""
        return math.exp(
            self.uniform(
                math.log(low),
                math.log(high),
            )
        )

    def classes(self) -> int:
        """Draw a number of classes."""
        return self.choice((10, 100, 257, 1000))

    def vocabulary(self) -> int:
        """Draw a number of tokens."""
        return max(64, self.width(8_000, 64_000))

    def rest(self) -> dict[str, Any]:
        """Draw the arguments of a case that no model knows of."""
        drawn = self.choice(OPTIMIZERS)
        precision = self.choice(("bfloat16", "bfloat16", "float32"))
        fixed = {}
        if self.random() < WITH_REMAT:
            fixed["remat"] = self.choice(("dots", "full"))
        clip = 1.0 if self.random() < WITH_CLIPPING else None
        return {
            "optimizer": drawn(),
            "precision": precision,
            "fixed": fixed,
            "clip_norm": clip,
        }

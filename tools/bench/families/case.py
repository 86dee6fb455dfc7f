"""A recipe without data, and how to plan it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

import lepton_jax as lepton

# Where a case leaves the batch to whoever uses it (assumption).
USUAL_BATCH = 64


@dataclass(frozen=True)
class Case:
    """Recipe to plan.

    Attributes:
      model, batch_size, loss, optimizer, precision, clip_norm: as in `Recipe`.
      inputs, targets: shapes of one sample.
      fixed: arguments of the planner, e.g. remat.
      most: the greatest sensible batch; None: any.
      unit: the batch is a multiple of it.
      ids: integers among inputs and targets may be 0 to ids - 1, where they must have
        values.
      on: topologies to draw from; empty: the usual ones.
    """

    model: Callable[..., Any]
    inputs: Any
    targets: Any
    batch_size: int = USUAL_BATCH
    loss: Callable[..., Any] = lepton.losses.cross_entropy
    optimizer: Any = field(default_factory=lambda: optax.adamw(1e-3))
    precision: str = "bfloat16"
    fixed: dict[str, Any] = field(default_factory=dict)
    clip_norm: float | None = None
    most: int | None = None
    unit: int = 1
    ids: int = 2
    on: tuple[str, ...] = ()

    def recipe(
        self,
        batch_size: int | None = None,
    ) -> lepton.Recipe:
        """Return the recipe, with another batch size if one is given."""
        return lepton.Recipe(
            model=self.model,
            loss=self.loss,
            optimizer=self.optimizer,
            batch_size=batch_size or self.batch_size,
            precision=self.precision,
            clip_norm=self.clip_norm,
        )


def shape(
    *dims: int,
    dtype: Any = jnp.int32,
) -> jax.ShapeDtypeStruct:
    """Return the shape of a batch of one sample."""
    return jax.ShapeDtypeStruct((1, *dims), dtype)

"""The state of a run: one pytree, which a step changes and a checkpoint holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """The state of a training run after `step` optimizer updates.

    Attributes:
      step: updates done, int32 scalar.
      params: the parameters, which the optimizer changes; nested dict of arrays,
        float32 master weights.
      variables: the module's other collections (batch statistics, dropout keys and
        counts, carries, constants).
      optimizer: state of the Optax transformation.
      controller: a `controller.ControllerState`; an empty tuple where nothing can ever
        move.
      key: the run's random key; step keys are folded from it, so it never changes.
    """

    step: Any
    params: Any
    variables: Any
    optimizer: Any
    controller: Any
    key: Any

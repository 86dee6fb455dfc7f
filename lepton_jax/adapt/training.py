"""What a recipe needs besides a model with adapters: an optimizer for them alone."""

from __future__ import annotations

from typing import Any

from lepton_jax.adapt.low_rank import PATTERN
from lepton_jax.step import optimizers


def only(optimizer: Any) -> Any:
    """Return an optimizer for the adapters; all other parameters are frozen.

    Frozen parameters have no gradient and no state in the optimizer.

    Args:
      optimizer: as in `Recipe.optimizer`.

    Example:
      >>> import optax
      >>> [part.label for part in only(optax.adamw).parts]
      ['*lora_*', 'default']
    """
    return optimizers.by_part({PATTERN: optimizer}, default="frozen")


def trained_by(optimizer: Any) -> Any:
    """Return the optimizer that `only` was given; any other one as it is."""
    parts = getattr(optimizer, "parts", ())
    own = [part.given for part in parts if part.pattern == PATTERN]
    return own[0] if own else optimizer

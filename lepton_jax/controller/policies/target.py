"""The end of a run at a target that it has reached, or a budget that it has used up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import reduce
from typing import Any

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range, is_better_lower
from lepton_jax.errors import RecipeError


def until(**targets: float) -> Policy:
    """End the run at the first target that is reached.

    Losses, errors and perplexities are reached from above; everything else (metrics,
    updates, seconds, price) from below. `loss` is the moving mean of the batches'
    losses, `evaluation_loss` that of the last evaluation. `seconds` and `price` are
    counted from where the run began or was resumed, and known from the last report on.

    Args:
      **targets: signal to value.

    Raises:
      RecipeError: there is no target, or one that is not a finite number.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.until(evaluation_accuracy=0.99, seconds=3600)
      >>> signals = {
      ...     "evaluation_accuracy": jnp.float32(0.992),
      ...     "seconds": jnp.float32(100),
      ... }
      >>> bool(policy.update(signals, policy.init())[0]["stop"])
      True
    """
    if not targets:
        raise RecipeError(
            "until has no target",
            where="controllers.until",
            remedy="give one, e.g. until(evaluation_loss=0.1)",
        )
    # None passes the check as "not given", which a target can't be
    numbers: dict[str, Any] = {
        name: math.nan if value is None else value for name, value in targets.items()
    }
    check_range("until", -math.inf, math.inf, **numbers)
    signal_of = {name: "loss_mean" if name == "loss" else name for name in targets}

    def update(
        signals: Mapping[str, Any],
        state: Any,
    ) -> tuple[dict[str, Any], Any]:
        reached = []
        for name, target in targets.items():
            value = signals[signal_of[name]]
            lower = is_better_lower(name)
            reached.append(value <= target if lower else value >= target)
        return {"stop": reduce(jnp.logical_or, reached)}, state

    return Policy(
        "until",
        lambda: (),
        update,
        watches=tuple(signal_of.values()),
        moves=("stop",),
    )

"""The end of a run by what it has reached, or has used up."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked, falls
from lepton_jax.errors import RecipeError


def until(**targets: float) -> Policy:
    """Ends the run at the first target that is reached:
    `until(evaluation_accuracy=0.99, seconds=3600)`.

    Losses, errors and perplexities are reached from above, all else (metrics, updates,
    seconds, price) from below. `loss` is the moving mean of the batches' losses,
    `evaluation_loss` that of the last evaluation. `seconds` and `price` are counted
    from where the run began or was resumed, and known from the last report on.

    Args:
      targets: signal to value.

    Raises:
      RecipeError: no target, or one that is not a finite number.
    """
    if not targets:
        raise RecipeError(
            "until has no target",
            where="controllers.until",
            remedy="give one, e.g. until(evaluation_loss=0.1)",
        )
    given: dict[str, Any] = {
        n: math.nan if x is None else x for n, x in targets.items()
    }
    checked(
        "until",
        -math.inf,
        math.inf,
        **given,
    )
    names = {name: "loss_mean" if name == "loss" else name for name in targets}

    def update(signals: Mapping[str, Any], state: Any) -> tuple[dict[str, Any], Any]:
        reached = [
            signals[names[n]] <= x if falls(n) else signals[names[n]] >= x
            for n, x in targets.items()
        ]
        return {"stop": jnp.stack(reached).any()}, state

    return Policy(
        "until",
        lambda: (),
        update,
        watches=tuple(names.values()),
        moves=("stop",),
    )

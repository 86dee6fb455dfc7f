"""A moving average of the parameters, which is evaluated and served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range

# the greatest decay, unless the caller gives one or a share; assumption
DECAY = 0.999


class Averaging(NamedTuple):
    """State of `averaging`.

    Attributes:
      begun: updates done when the averaging began, int32 (); -1 before it.
    """

    begun: Any


def averaging(
    decay: float | None = None,
    start: float = 0.0,
    *,
    share: float | None = None,
) -> Policy:
    """Keep a moving average of the parameters.

        average <- d * average + (1 - d) * params

    After n updates since the start of the averaging, with `decay`:

        d = min(decay, (1 + n) / (10 + n))

    so that the first parameters are soon forgotten. With `share` instead,

        d = (n / (n + 1)) ** (1 / share - 1)

    which gives update n' the weight (n' / n) ** (1 / share - 2). The mean age of the
    average is then `share` of the n updates; a share of 0.5 weighs all updates alike.

    References:
      Polyak & Juditsky 1992, "Acceleration of stochastic approximation by averaging".
      The ramp is that of TensorFlow's ExponentialMovingAverage.
      Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion
      models", section 3.1, for the share.

    Args:
      decay: the greatest decay. None: 0.999, or with `share` no bound.
      start: share of the run after which the averaging begins; until then the average
        is the parameters.
      share: mean age of the average as a share of the updates, above 0 to 0.5.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.averaging(share=0.5)
      >>> state = policy.init()
      >>> for updates in range(4):
      ...     signals = {"updates": jnp.float32(updates)}
      ...     moves, state = policy.update(signals, state)
      ...     print(f"{moves['averaging_decay']:.3f}")
      0.000
      0.500
      0.667
      0.750
    """
    check_range("averaging", 0, 1, decay=decay, start=start)
    check_range("averaging", 1e-6, 0.5, share=share)
    unbounded = 1.0
    default = DECAY if share is None else unbounded
    highest = default if decay is None else decay

    def update(
        signals: Mapping[str, Any], state: Averaging
    ) -> tuple[dict[str, Any], Averaging]:
        updates = signals["updates"].astype(jnp.int32)
        due = signals["progress"] > start if start else True
        begun = jnp.where(
            (state.begun < 0) & due,
            updates,
            state.begun,
        )

        n = jnp.maximum(updates - begun, 0).astype(jnp.float32)
        grown = _ramp(n, share)
        d = jnp.where(
            begun < 0,
            0.0,
            jnp.minimum(grown, highest),
        )
        return {"averaging_decay": d}, Averaging(begun)

    return Policy(
        "averaging",
        lambda: Averaging(jnp.int32(-1)),
        update,
        watches=("updates", "progress") if start else ("updates",),
        moves=("averaging_decay",),
    )


def _ramp(n: Any, share: float | None) -> Any:
    """Return the decay after n updates, before its bound."""
    if share is None:
        return (1 + n) / (10 + n)
    return (n / (n + 1)) ** (1 / share - 1)

"""A moving average of the parameters, which is what is evaluated and served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked


class Averaging(NamedTuple):
    """Updates done when the averaging began, int32 (); -1 before it."""

    begun: Any


def averaging(
    decay: float | None = None,
    start: float = 0.0,
    *,
    share: float | None = None,
) -> Policy:
    """Keeps a moving average of the parameters from `start` of the run on: average +=
    (1 - decay) * (params - average).

    With n updates since the start, the decay is min(decay, (1 + n) / (10 + n)), so that
    the beginning is soon forgotten. With `share` instead, the average's mean age is
    that share of the n updates: decay (1 - 1 / n) ** (1 / share - 1), the power
    function (n' / n) ** (1 / share - 2) as weight of the update n'; 0.5 weighs all
    alike.

    Sources: Polyak & Juditsky 1992; the ramp is that of TensorFlow's
    ExponentialMovingAverage; Karras et al. 2024, "Analyzing and improving the training
    dynamics of diffusion models", section 3.1, for the share.

    Args:
      decay: the decay at most. None: 0.999; with `share` no bound.
      start: share of the run; until then the average is the parameters.
      share: from above 0 to 0.5.
    """
    checked(
        "averaging",
        0,
        1,
        decay=decay,
        start=start,
    )
    checked("averaging", 1e-6, 0.5, share=share)
    highest = decay if decay is not None else 0.999 if share is None else 1.0

    def init() -> Averaging:
        return Averaging(jnp.int32(-1))

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
        ramp = (1 + n) / (10 + n) if share is None else (n / (n + 1)) ** (1 / share - 1)
        return {
            "averaging_decay": jnp.where(
                begun < 0,
                0.0,
                jnp.minimum(ramp, highest),
            )
        }, Averaging(begun)

    return Policy(
        "averaging",
        init,
        update,
        watches=("updates", "progress") if start else ("updates",),
        moves=("averaging_decay",),
    )

"""When the loss has stopped falling: what several policies start from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

WATCHES = ("loss_trend", "loss_mean")


class Trend(NamedTuple):
    """Moving mean of the loss's change in a step, without its correction for the start,
    float32 (), and steps in it.
    """

    slope: Any
    count: Any


def begin() -> Trend:
    """Before the first step."""
    return Trend(jnp.float32(0), jnp.int32(0))


def flattened(
    signals: Mapping[str, Any],
    state: Trend,
    patience: int,
    tolerance: float,
) -> tuple[Any, Trend]:
    """Whether another `patience` steps would lower the loss by less than `tolerance` of
    its mean; never before twice as many.

    The loss's change in a step is the signal `loss_trend`, averaged once more with
    decay 1 - 1 / patience.
    """
    decay = 1 - 1 / patience
    usable = jnp.isfinite(signals["loss_trend"]) & jnp.isfinite(signals["loss_mean"])
    slope = jnp.where(
        usable,
        decay * state.slope + (1 - decay) * signals["loss_trend"],
        state.slope,
    )
    count = jnp.minimum(state.count + usable, 2**30)
    drop = -slope / (1 - decay ** jnp.maximum(count, 1)) * patience
    return (count >= 2 * patience) & usable & (
        drop < tolerance * jnp.abs(signals["loss_mean"])
    ), Trend(slope, count)

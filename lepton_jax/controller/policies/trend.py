"""Whether the loss has stopped falling: a criterion of several policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

WATCHES = ("loss_trend", "loss_mean")


class Trend(NamedTuple):
    """The loss's mean change in a step.

    Attributes:
      slope: moving mean of the change, not corrected for its start at 0, float32 ().
      count: steps in it, int32 ().
    """

    slope: Any
    count: Any


def begin() -> Trend:
    """Return the trend before the first step."""
    return Trend(slope=jnp.float32(0), count=jnp.int32(0))


def flattened(
    signals: Mapping[str, Any],
    state: Trend,
    patience: int,
    tolerance: float,
) -> tuple[Any, Trend]:
    """Whether the loss is flat: more steps would hardly lower it.

    The signal `loss_trend` t, the loss's change in a step, is averaged once more:

        d = 1 - 1 / patience
        slope <- d * slope + (1 - d) * t
        drop = -slope / (1 - d ** count) * patience

    The loss is flat when `drop`, by which another `patience` steps would lower it, is
    below `tolerance` of its mean. It is never called flat before 2 * `patience` steps.

    Args:
      signals: the signals in `WATCHES`.
      state: the trend so far.
      patience: the steps looked ahead.
      tolerance: the share of the loss.

    Returns:
      Whether the loss is flat, bool (), and the trend after this step.
    """
    change = signals["loss_trend"]
    mean = signals["loss_mean"]
    usable = jnp.isfinite(change) & jnp.isfinite(mean)

    decay = 1 - 1 / patience
    moved = decay * state.slope + (1 - decay) * change
    slope = jnp.where(usable, moved, state.slope)
    count = jnp.minimum(state.count + usable, 2**30)

    drop = -slope / (1 - decay ** jnp.maximum(count, 1)) * patience
    flat = (count >= 2 * patience) & usable & (drop < tolerance * jnp.abs(mean))
    return flat, Trend(slope, count)

"""Dynamic loss scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy
from lepton_jax.step.precision import START


class LossScale(NamedTuple):
    """State of `loss_scaling`.

    Attributes:
      scale: the scale, float32 ().
      finite: finite steps since it last moved, int32 ().
    """

    scale: Any
    finite: Any


def loss_scaling(
    start: float = START,
    grow_after: int = 2000,
    lowest: float = 1.0,
) -> Policy:
    """Scale the loss so that float16 gradients neither overflow nor vanish.

    After a gradient that is not finite, the scale is halved and the update skipped.
    After `grow_after` finite gradients in a row it is doubled:

        scale <- max(scale / 2, lowest)   gradient not finite
        scale <- 2 * scale                `grow_after` finite gradients since it moved

    At `lowest` it skips no more: an overflow there has another reason. Recipes with
    precision="float16" have this policy without naming it.

    References:
      Micikevicius et al. 2018, "Mixed precision training", section 3.2 (2000 steps).

    Args:
      start: the first scale.
      grow_after: finite steps after which the scale doubles.
      lowest: the lowest scale.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.loss_scaling(start=8.0, grow_after=2)
      >>> state = policy.init()
      >>> for finite in (0, 1, 1):
      ...     signals = {"finite": jnp.float32(finite)}
      ...     moves, state = policy.update(signals, state)
      ...     print(float(moves["loss_scale"]), bool(moves["skip"]))
      4.0 True
      4.0 False
      8.0 False
    """

    def init() -> LossScale:
        return LossScale(scale=jnp.float32(start), finite=jnp.int32(0))

    def update(
        signals: Mapping[str, Any], state: LossScale
    ) -> tuple[dict[str, Any], LossScale]:
        finite = signals["finite"] > 0
        grow = finite & (state.finite + 1 >= grow_after)
        scale = jnp.where(
            finite,
            jnp.where(grow, state.scale * 2, state.scale),
            jnp.maximum(state.scale / 2, lowest),
        )
        moves = {
            "loss_scale": scale,
            "skip": ~finite & (state.scale > lowest),
        }
        count = jnp.where(
            finite & ~grow,
            state.finite + 1,
            0,
        )
        return moves, LossScale(scale, count)

    return Policy(
        "loss_scaling",
        init,
        update,
        watches=("finite",),
        moves=("loss_scale", "skip"),
    )

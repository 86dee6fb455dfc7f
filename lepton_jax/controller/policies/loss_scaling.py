"""Dynamic loss scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy
from lepton_jax.step.precision import START


class LossScale(NamedTuple):
    """The scale, float32 (), and the finite steps since it last moved."""

    scale: Any
    finite: Any


def loss_scaling(
    start: float = START,
    grow_after: int = 2000,
    lowest: float = 1.0,
) -> Policy:
    """Halves the loss scale after a gradient that is not finite, which it skips;
    doubles it after `grow_after` finite ones.

    At `lowest` it skips no more: what overflows there has another reason. Recipes with
    precision="float16" have this policy.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3.2 (2000
    steps).
    """

    def init() -> LossScale:
        return LossScale(jnp.float32(start), jnp.int32(0))

    def update(
        signals: Mapping[str, Any], state: LossScale
    ) -> tuple[dict[str, Any], LossScale]:
        finite = signals["finite"] > 0
        grow = finite & (state.finite + 1 >= grow_after)
        scale = jnp.where(
            finite,
            jnp.where(
                grow,
                state.scale * 2,
                state.scale,
            ),
            jnp.maximum(state.scale / 2, lowest),
        )
        moves = {"loss_scale": scale, "skip": ~finite & (state.scale > lowest)}
        return moves, LossScale(
            scale,
            jnp.where(
                finite & ~grow,
                state.finite + 1,
                0,
            ),
        )

    return Policy(
        "loss_scaling",
        init,
        update,
        watches=("finite",),
        moves=("loss_scale", "skip"),
    )

"""The decay phase of warmup-stable-decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

import lepton_jax.controller.policies.trend as trend
from lepton_jax.controller.policy import Policy, checked
from lepton_jax.errors import RecipeError

SHAPES = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
}


class Decay(NamedTuple):
    """How flat the loss is, and the step at which the trend began the decay; -1 before
    it.
    """

    trend: Any
    begun: Any


def decay(
    share: float = 0.2,
    shape: str = "1-sqrt",
    floor: float = 0.0,
    start: str = "budget",
    *,
    patience: int = 200,
    tolerance: float = 0.01,
) -> Policy:
    """Leaves the learning rate alone until the last `share` of the run, then lowers it
    to `floor` of it.

    factor = floor + (1 - floor) * shape(x), with x the part of the decay that is done:
    linear 1 - x, "1-sqrt" 1 - sqrt(x), cosine (1 + cos(pi x)) / 2. Where the number of
    steps is not known it does nothing.

    With start="trend" it begins earlier if another `patience` steps would lower the
    loss by less than `tolerance` of it. The decay then takes as many steps as make it
    `share` of the whole, and at its end the run stops.

    Sources: Haegele et al. 2024, "Scaling laws and compute-optimal training beyond
    fixed training durations" (constant rate, 1-sqrt over 20 %); Wen et al. 2024,
    "Understanding warmup-stable-decay learning rates".

    Raises:
      RecipeError: an argument is out of range.
    """
    checked("decay", 1e-6, 1, share=share)
    checked("decay", 0, 1, floor=floor)
    checked(
        "decay",
        1,
        math.inf,
        whole=True,
        patience=patience,
    )
    checked("decay", 0, math.inf, tolerance=tolerance)
    if shape not in SHAPES or start not in ("budget", "trend"):
        raise RecipeError(
            f"shape is {shape!r} and start {start!r}",
            where="controllers.decay",
            remedy=f"shape is one of {', '.join(SHAPES)}; start is budget or trend",
        )
    by_trend = start == "trend" and share < 1

    def factor(x: Any) -> Any:
        x = jnp.where(
            x > 0,
            jnp.minimum(x, 1.0),
            0.0,
        )  # NaN is 0
        return floor + (1 - floor) * jnp.clip(
            SHAPES[shape](x),
            0.0,
            1.0,
        )

    def init() -> Any:
        return Decay(trend.begin(), jnp.int32(-1)) if by_trend else ()

    def update(signals: Mapping[str, Any], state: Any) -> tuple[dict[str, Any], Any]:
        step = signals["step"]
        # before this step: the last one still has some rate left
        done = signals["progress"] * step / (step + 1)
        x = jnp.nan_to_num(
            (done - (1 - share)) / share,
            nan=0.0,
            posinf=1.0,
            neginf=0.0,
        )
        if not by_trend:
            return {"learning_rate": factor(x)}, state
        flat, slope = trend.flattened(
            signals,
            state.trend,
            patience,
            tolerance,
        )
        begun = jnp.where(
            (state.begun < 0) & flat & (x <= 0),
            step.astype(jnp.int32),
            state.begun,
        )
        length = jnp.maximum(begun * share / (1 - share), 1.0)
        early = jnp.where(
            begun < 0,
            0.0,
            (step - begun) / length,
        )
        moves = {
            "learning_rate": factor(jnp.maximum(x, early)),
            "stop": (begun >= 0) & (step - begun + 1 >= length),
        }
        return moves, Decay(slope, begun)

    watches = ("step", "progress", *trend.WATCHES) if by_trend else ("step", "progress")
    return Policy(
        "decay",
        init,
        update,
        watches=watches,
        moves=("learning_rate", "stop") if by_trend else ("learning_rate",),
    )

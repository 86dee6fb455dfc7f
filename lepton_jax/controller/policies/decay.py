"""The decay phase of warmup-stable-decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

import lepton_jax.controller.policies.trend as trend
from lepton_jax.controller.policy import Policy, check_range
from lepton_jax.errors import RecipeError

SHAPES = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - jnp.sqrt(x),
    "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
}


class Decay(NamedTuple):
    """State of `decay` that begins by trend.

    Attributes:
      trend: how flat the loss is, a `trend.Trend`.
      begun: the step at which the decay began, int32 (); -1 before it.
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
    """Lower the learning rate over the last part of the run.

        factor = floor + (1 - floor) * shape(x)

    where x is the part of the decay that is done, 0 before it begins, and

        linear: 1 - x,   1-sqrt: 1 - sqrt(x),   cosine: (1 + cos(pi x)) / 2

    Where the number of steps is not known the policy does nothing.

    With start="trend" the decay begins earlier if another `patience` steps would lower
    the loss by less than `tolerance` of it. It then takes `share` of the steps that the
    run has in the end, and the run stops when it is done.

    References:
      Haegele et al. 2024, "Scaling laws and compute-optimal training beyond fixed
      training durations" (constant rate, 1-sqrt over 20 %).
      Wen et al. 2024, "Understanding warmup-stable-decay learning rates".

    Args:
      share: share of the run that the decay takes.
      shape: "linear", "1-sqrt" or "cosine".
      floor: the factor at the end of the decay.
      start: "budget" or "trend".
      patience: with "trend", the steps looked ahead.
      tolerance: with "trend", the share of the loss.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.decay(0.5, "linear")
      >>> for step in (0, 5, 6, 9):
      ...     progress = jnp.float32((step + 1) / 10)
      ...     signals = {"step": jnp.float32(step), "progress": progress}
      ...     moves, _ = policy.update(signals, policy.init())
      ...     print(f"{moves['learning_rate']:.1f}")
      1.0
      1.0
      0.8
      0.2
    """
    check_range("decay", 1e-6, 1, share=share)
    check_range("decay", 0, 1, floor=floor)
    check_range(
        "decay",
        1,
        math.inf,
        whole=True,
        patience=patience,
    )
    check_range("decay", 0, math.inf, tolerance=tolerance)
    if shape not in SHAPES or start not in ("budget", "trend"):
        raise RecipeError(
            f"shape is {shape!r} and start {start!r}",
            where="controllers.decay",
            remedy=f"shape is one of {', '.join(SHAPES)}; start is budget or trend",
        )

    def factor(x: Any) -> Any:
        # the comparison makes 0 of NaN, where the number of steps is not known
        x = jnp.where(
            x > 0,
            jnp.minimum(x, 1.0),
            0.0,
        )
        return floor + (1 - floor) * jnp.clip(
            SHAPES[shape](x),
            0.0,
            1.0,
        )

    def part_done(signals: Mapping[str, Any]) -> Any:
        """Return x by the budget, below 0 before the decay begins."""
        step = signals["step"]
        # before this step: the last one still has some rate left
        done = signals["progress"] * step / (step + 1)
        x = (done - (1 - share)) / share
        return jnp.nan_to_num(
            x,
            nan=0.0,
            posinf=1.0,
            neginf=0.0,
        )

    def update(
        signals: Mapping[str, Any],
        state: Any,
    ) -> tuple[dict[str, Any], Any]:
        return {"learning_rate": factor(part_done(signals))}, state

    def update_by_trend(
        signals: Mapping[str, Any], state: Decay
    ) -> tuple[dict[str, Any], Decay]:
        step = signals["step"]
        x = part_done(signals)
        flat, slope = trend.flattened(
            signals,
            state.trend,
            patience,
            tolerance,
        )
        begins = (state.begun < 0) & flat & (x <= 0)
        begun = jnp.where(
            begins,
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

    # a decay over the whole run can't begin earlier
    if start == "trend" and share < 1:
        return Policy(
            "decay",
            lambda: Decay(trend.begin(), jnp.int32(-1)),
            update_by_trend,
            watches=("step", "progress", *trend.WATCHES),
            moves=("learning_rate", "stop"),
        )
    return Policy(
        "decay",
        lambda: (),
        update,
        watches=("step", "progress"),
        moves=("learning_rate",),
    )

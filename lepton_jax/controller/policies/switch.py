"""The change from one optimizer to the next in the middle of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

import lepton_jax.controller.policies.trend as trend
from lepton_jax.controller.policy import Policy, check_range
from lepton_jax.errors import RecipeError

# the greatest number of an optimizer: see the knob "optimizer"
LAST = 15


class Switch(NamedTuple):
    """State of `switch_optimizer`.

    Attributes:
      trend: how flat the loss is, a `trend.Trend`; or ().
      made: whether the switch is made, bool ().
    """

    trend: Any
    made: Any


def switch_optimizer(
    to: int = 1,
    at: float | str = "trend",
    *,
    patience: int = 200,
    tolerance: float = 0.01,
) -> Policy:
    """Go over to another optimizer of `switchable(...)`, once and for good.

    The switch is made when `at` of the run is done; with at="trend", when another
    `patience` steps would lower the loss by less than `tolerance` of it. Give the
    second optimizer its own scale of rates in `switchable`.

    References:
      Keskar & Socher 2017, "Improving generalization performance by switching from Adam
      to SGD" (SWATS). Its own criterion, the projected rate at rest, is replaced here
      by the loss at rest.

    Args:
      to: number of the optimizer in `switchable`, from 0.
      at: share of the run, or "trend".
      patience: with "trend", the steps looked ahead.
      tolerance: with "trend", the share of the loss.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.switch_optimizer(1, at=0.5)
      >>> state = policy.init()
      >>> for progress in (0.25, 0.75, 0.25):
      ...     signals = {"progress": jnp.float32(progress)}
      ...     moves, state = policy.update(signals, state)
      ...     print(float(moves["optimizer"]))
      nan
      1.0
      1.0
    """
    check_range("switch_optimizer", 0, LAST, whole=True, to=to)
    check_range(
        "switch_optimizer",
        1,
        math.inf,
        whole=True,
        patience=patience,
    )
    check_range("switch_optimizer", 0, math.inf, tolerance=tolerance)
    _check_at(at)
    by_trend = at == "trend"

    def init() -> Switch:
        return Switch(trend.begin() if by_trend else (), jnp.bool_(False))

    def update(
        signals: Mapping[str, Any], state: Switch
    ) -> tuple[dict[str, Any], Switch]:
        slope = state.trend
        if by_trend:
            due, slope = trend.flattened(signals, slope, patience, tolerance)
        else:
            due = signals["progress"] > at
        made = state.made | due
        number = jnp.where(made, float(to), jnp.nan)
        return {"optimizer": number}, Switch(slope, made)

    return Policy(
        "switch_optimizer",
        init,
        update,
        watches=trend.WATCHES if by_trend else ("progress",),
        moves=("optimizer",),
    )


def _check_at(at: float | str) -> None:
    if not isinstance(at, str):
        check_range("switch_optimizer", 0, 1, at=at)
    elif at != "trend":
        raise RecipeError(
            f"at is {at!r}",
            where="controllers.switch_optimizer",
            remedy='give a share of the run, or "trend"',
        )

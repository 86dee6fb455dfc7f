"""From one optimizer to the next in the middle of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

import lepton_jax.controller.policies.trend as trend
from lepton_jax.controller.policy import Policy, checked
from lepton_jax.errors import RecipeError


class Switch(NamedTuple):
    """How flat the loss is, and whether the switch is made, bool ()."""

    trend: Any
    made: Any


def switch_optimizer(
    to: int = 1,
    at: float | str = "trend",
    *,
    patience: int = 200,
    tolerance: float = 0.01,
) -> Policy:
    """Puts the optimizer number `to` of `switchable(...)` to work, once and for good.

    It does so when `at` of the run is done, or, with at="trend", when another
    `patience` steps would lower the loss by less than `tolerance` of it. Give the
    second optimizer its own scale of rates in `switchable`.

    Source: Keskar & Socher 2017, "Improving generalization performance by switching
    from Adam to SGD" (SWATS), whose own criterion, the projected rate at rest, is
    replaced here by the loss at rest.

    Raises:
      RecipeError: an argument is out of range.
    """
    checked(
        "switch_optimizer",
        0,
        15,
        whole=True,
        to=to,
    )
    checked(
        "switch_optimizer",
        1,
        math.inf,
        whole=True,
        patience=patience,
    )
    checked("switch_optimizer", 0, math.inf, tolerance=tolerance)
    if isinstance(at, str) and at != "trend":
        raise RecipeError(
            f"at is {at!r}",
            where="controllers.switch_optimizer",
            remedy='give a share of the run, or "trend"',
        )
    by_trend = isinstance(at, str)
    if not by_trend:
        checked("switch_optimizer", 0, 1, at=at)

    def init() -> Switch:
        return Switch(trend.begin() if by_trend else (), jnp.bool_(False))

    def update(
        signals: Mapping[str, Any], state: Switch
    ) -> tuple[dict[str, Any], Switch]:
        slope = state.trend
        if by_trend:
            due, slope = trend.flattened(
                signals,
                slope,
                patience,
                tolerance,
            )
        else:
            due = signals["progress"] > at
        made = state.made | due
        return {"optimizer": jnp.where(made, float(to), jnp.nan)}, Switch(slope, made)

    return Policy(
        "switch_optimizer",
        init,
        update,
        watches=trend.WATCHES if by_trend else ("progress",),
        moves=("optimizer",),
    )

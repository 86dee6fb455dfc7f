"""Warm-up of the learning rate that ends when the gradient has settled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, checked

# decays of the two moving means of the gradient norm's logarithm
QUICK = 0.8
SLOW = 0.95
FINISH = 1.1  # growth of the factor in an update, once settled


class Warmup(NamedTuple):
    """Moving means of the logarithm of the gradient's norm, float32 (); steps in them;
    the update at which they met.
    """

    quick: Any
    slow: Any
    count: Any
    settled: Any


def warmup(
    steps: int | None = None,
    start: float = 0.01,
    b2: float = 0.999,
    tolerance: float | None = 0.05,
    least: int = 20,
) -> Policy:
    """Raises the learning rate from `start` of it, linearly in the updates, for at most
    `steps` of them.

    The bound is that of untuned linear warm-up, 2 / (1 - b2) updates, after which the
    second moment's estimate is as good as rectified Adam wants it: factor = start + (1
    - start) * updates / steps. A warm-up is needed for as long as the gradient changes
    quickly, which it does at first; when a quick and a slow moving mean of log(gradient
    norm) have met to within `tolerance`, the rest is made up by 10 % in each update.

    Sources: Ma & Yarats 2021, "On the adequacy of untuned warmup for adaptive
    optimization", section 5; Liu et al. 2020, RAdam; Gilmer et al. 2022, "A loss
    curvature perspective on training instabilities", for the end by what is measured.

    Args:
      steps: updates at most; None: 2 / (1 - b2).
      start: factor of the first update.
      b2: the optimizer's.
      tolerance: of log(gradient norm). None: only `steps` ends it.
      least: steps before the gradient is judged at all.
    """
    checked(
        "warmup",
        1,
        math.inf,
        whole=True,
        steps=steps,
        least=least,
    )
    checked("warmup", 0, 1, start=start)
    checked("warmup", 0, 0.999999, b2=b2)
    checked("warmup", 0, math.inf, tolerance=tolerance)
    bound = steps or max(1, round(2 / (1 - b2)))

    def init() -> Warmup:
        return Warmup(
            jnp.float32(0),
            jnp.float32(0),
            jnp.int32(0),
            jnp.int32(-1),
        )

    def update(
        signals: Mapping[str, Any], state: Warmup
    ) -> tuple[dict[str, Any], Warmup]:
        updates = signals["updates"]
        linear = lambda n: jnp.minimum(start + (1 - start) * n / bound, 1.0)
        if tolerance is None:
            return {"learning_rate": linear(updates)}, state
        log = jnp.log(jnp.maximum(signals["gradient_norm"], 1e-30))
        usable = jnp.isfinite(log)
        first = state.count == 0
        log = jnp.where(
            usable,
            log,
            state.slow,
        )
        quick = jnp.where(
            first,
            log,
            QUICK * state.quick + (1 - QUICK) * log,
        )
        slow = jnp.where(
            first,
            log,
            SLOW * state.slow + (1 - SLOW) * log,
        )
        count = jnp.minimum(state.count + usable, least)
        met = (count >= least) & (jnp.abs(quick - slow) < tolerance)
        settled = jnp.where(
            (state.settled < 0) & met,
            updates.astype(jnp.int32),
            state.settled,
        )
        since = jnp.clip(updates - settled, 0, 1000)
        made_up = jnp.minimum(jnp.maximum(linear(settled), 1e-3) * FINISH**since, 1.0)
        factor = jnp.where(
            settled < 0,
            linear(updates),
            jnp.maximum(made_up, linear(updates)),
        )
        return {"learning_rate": factor}, Warmup(
            quick,
            slow,
            count,
            settled,
        )

    watches = ("updates",) if tolerance is None else ("updates", "gradient_norm")
    return Policy(
        "warmup",
        init,
        update,
        watches=watches,
        moves=("learning_rate",),
    )

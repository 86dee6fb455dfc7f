"""Warm-up of the learning rate that ends when the gradient has settled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policy import Policy, check_range

# decays of the two moving means of the gradient norm's logarithm; assumption
QUICK = 0.8
SLOW = 0.95
# growth of the factor in an update, once the gradient has settled; assumption
FINISH = 1.1
# the least factor from which it grows so
LEAST_FACTOR = 1e-3
# updates after which the growth has certainly made up for all that is missing
ENOUGH = 1000


class Warmup(NamedTuple):
    """State of `warmup`.

    Attributes:
      quick: quick moving mean of log(gradient norm), float32 ().
      slow: slow moving mean of it, float32 ().
      count: steps in both, int32 ().
      settled: the update at which the two met, int32 (); -1 before it.
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
    """Raise the learning rate until the gradient has settled.

    The factor of the rate grows linearly in the updates n, for at most `steps` of them:

        linear(n) = min(start + (1 - start) * n / steps, 1)

    The bound is that of untuned linear warm-up, 2 / (1 - b2) updates, after which the
    estimate of the second moment is as good as rectified Adam wants it. A warm-up is
    needed for as long as the gradient changes quickly, which it does at first. When a
    quick and a slow moving mean of log(gradient norm) have met to within `tolerance`,
    at update m, the rest is made up by 10 % in each update:

        factor = max(linear(m) * 1.1 ** (n - m), linear(n))

    References:
      Ma & Yarats 2021, "On the adequacy of untuned warmup for adaptive optimization",
      section 5.
      Liu et al. 2020, "On the variance of the adaptive learning rate and beyond"
      (RAdam).
      Gilmer et al. 2022, "A loss curvature perspective on training instabilities", for
      an end that is measured.

    Args:
      steps: the greatest number of updates; None: 2 / (1 - b2).
      start: factor of the first update.
      b2: the optimizer's decay of the second moment.
      tolerance: distance of the two means of log(gradient norm). None: only `steps`
        ends the warm-up.
      least: steps before the gradient is judged at all.

    Raises:
      RecipeError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.warmup(4, start=0.2, tolerance=None)
      >>> for updates in (0, 1, 4, 5):
      ...     signals = {"updates": jnp.float32(updates)}
      ...     moves, _ = policy.update(signals, policy.init())
      ...     print(f"{moves['learning_rate']:.1f}")
      0.2
      0.4
      1.0
      1.0
    """
    check_range(
        "warmup",
        1,
        math.inf,
        whole=True,
        steps=steps,
        least=least,
    )
    check_range("warmup", 0, 1, start=start)
    check_range("warmup", 0, 0.999999, b2=b2)
    check_range("warmup", 0, math.inf, tolerance=tolerance)
    bound = steps or max(1, round(2 / (1 - b2)))

    def linear(n: Any) -> Any:
        return jnp.minimum(start + (1 - start) * n / bound, 1.0)

    def init() -> Warmup:
        return Warmup(
            quick=jnp.float32(0),
            slow=jnp.float32(0),
            count=jnp.int32(0),
            settled=jnp.int32(-1),
        )

    def update(
        signals: Mapping[str, Any], state: Warmup
    ) -> tuple[dict[str, Any], Warmup]:
        updates = signals["updates"]
        if tolerance is None:
            return {"learning_rate": linear(updates)}, state

        quick, slow, count = _averaged(signals["gradient_norm"], state, least)
        met = (count >= least) & (jnp.abs(quick - slow) < tolerance)
        settles = (state.settled < 0) & met
        now = updates.astype(jnp.int32)
        settled = jnp.where(settles, now, state.settled)

        since = jnp.clip(updates - settled, 0, ENOUGH)
        grown = jnp.maximum(linear(settled), LEAST_FACTOR) * FINISH**since
        made_up = jnp.minimum(grown, 1.0)
        factor = jnp.where(
            settled < 0,
            linear(updates),
            jnp.maximum(made_up, linear(updates)),
        )
        return {"learning_rate": factor}, Warmup(quick, slow, count, settled)

    watches = ("updates",) if tolerance is None else ("updates", "gradient_norm")
    return Policy(
        "warmup",
        init,
        update,
        watches=watches,
        moves=("learning_rate",),
    )


def _averaged(
    norm: Any,
    state: Warmup,
    least: int,
) -> tuple[Any, Any, Any]:
    """Return the two means and their count after one more gradient norm."""
    log = jnp.log(jnp.maximum(norm, 1e-30))
    usable = jnp.isfinite(log)
    first = state.count == 0
    log = jnp.where(usable, log, state.slow)
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
    return quick, slow, jnp.minimum(state.count + usable, least)

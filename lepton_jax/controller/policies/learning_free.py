"""A learning rate from distances; the recipe's own is not used.

Prodigy's estimate on a small example: the parabola f(x) = x^2 / 2 from x_0 = 1, whose
solution is at a distance of D = 1. Its gradient at x is x. Gradients g_k at points x_k
say how far the solution is at least: f is convex, so <g_k, x_0 - x_k> grows as x_k
moves towards it, while |g_k| does not grow with it. After a step to x_1 = 0.9,

    d >= <g_1, x_0 - x_1> / |g_0 + g_1| = 0.9 * 0.1 / 1.9 = 0.047

and after steps of 0.1 down to x_5 = 0.5,

>>> x = 1 - 0.1 * jnp.arange(6)
>>> print(f"{(x * (1 - x)).sum() / x.sum():.2f}")
0.21

The bound is d; it is always below D, and it grows as the parameters move. As the rate
is d, the parameters then move faster, until their way is about as long as D.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from lepton_jax.controller.policies import admission
from lepton_jax.controller.policy import Notice, Policy, check_range
from lepton_jax.controller.signals import MEMORY

# greatest growth of the estimate in a step; and in a run that has no known end, where
# the growth can't be spread over a share of it; assumption
FASTEST = 2.0
BLIND = 1.1
# bounds of the first estimate, which a loss of 0 or infinity would otherwise give;
# assumption
LEAST = 1e-9
MOST = 1e6
# greatest d / d_0 in the weights, whose squares must not overflow float32
HIGHEST = 1e12
TINY = 1e-30
# the warm-up goes on where d still grows by a factor of `STEEP` in `SLOW` steps;
# assumption
STEEP = 1.25
SLOW = 10
# the estimate is not to be trusted if it has used up this share of the logarithm of the
# growth that it may have after `until`; assumption
UNSETTLED = 0.95
NOTICE = Notice(
    "the learning rate grew all the time: the run was too short to find it",
    "train for more steps, or give controllers.learning_free a higher start",
)


class Distance(NamedTuple):
    """State of `learning_free`, float32 ().

    Attributes:
      base: the learning rate's base in the first step; 0 before it.
      first: d_0, the first estimate; 0 before the first usable step.
      estimate: d.
      numerator: r, the weighted sum of <g, x_0 - x>.
      weight: w, the weight of the present gradient in both sums.
      level: d when it had last grown by a factor of `STEEP`.
      since: the steps since then.
      warm: d when the warm-up was over; 0 before it.
    """

    base: Any
    first: Any
    estimate: Any
    numerator: Any
    weight: Any
    level: Any
    since: Any
    warm: Any


def learning_free(
    start: float = 1e-3,
    coefficient: float = 2.0,
    *,
    growth: float = 1e4,
    until: float = 0.1,
    later: float = 3.0,
) -> Policy:
    """Set the learning rate to an estimate of the distance to the solution.

    It is for optimizers whose updates have entries of about the learning rate's size:
    Adam, AdamW and their like. With gradients g_k at parameters x_k, losses l_k,
    weights w_k = (d_k / d_0)^2 and memory b = 0.9995:

        d_0 = start |l_0| / |g_0|_1
        r_k = b r_{k-1} + w_k <g_k, x_0 - x_k>
        s_k = b s_{k-1} + w_k g_k
        d_{k+1} = max(d_k, c r_k / |s_k|_1)

    |l| / |g|_1 is the length of entries at which the first update would bring the loss
    to 0 if it were linear. So nothing depends on the scale of parameters, inputs or
    losses. The recipe's rate cancels out. A rate that is
    set later, by a person or after a rollback, acts by its ratio to the recipe's: half
    of it is half of d. Memory: two copies of the parameters, x_0 and s.

    References:
      Mishchenko and Defazio 2023, "Prodigy: An Expeditiously Adaptive Parameter-Free
      Learner", algorithm 4, without its rescaled moments.
      Polyak 1987, "Introduction to optimization", section 5.3: the step of d_0.

    Args:
      start: d_0, as a share of the length above. Choose it too small rather than too
        large, since d never shrinks; its growth to the right size takes some dozen
        steps.
      coefficient: c.
      growth: factor by which d may grow while the share `until` of the run is done,
        evenly in its logarithm, and at most twofold in a step. Where the budget is not
        known d may grow by 10 % a step.
      until: see `growth`. The warm-up goes on as long as d grows by a quarter in 10
        steps.
      later: factor by which d may grow after the warm-up, evenly over a whole run. A
        model that fits its samples by heart moves its parameters without end, and d
        with them.

    Raises:
      RecipeError: an argument is out of range. When the recipe is traced, also for an
        optimizer that it can't drive.

    Example:
      >>> import jax.numpy as jnp
      >>> from lepton_jax import controllers
      >>> policy = controllers.learning_free(start=0.01)
      >>> signals = {
      ...     "loss": jnp.float32(2),
      ...     "gradient_dot_distance": jnp.float32(0),
      ...     "gradient_sum_norm": jnp.float32(10),
      ...     "gradient_steps": jnp.float32(1),
      ...     "base_rate": jnp.float32(1),
      ...     "step": jnp.float32(0),
      ...     "progress": jnp.float32(0.1),
      ... }
      >>> moves, _ = policy.update(signals, policy.init())
      >>> print(f"{moves['learning_rate']:.4f}")  # 0.01 * 2 / 10
      0.0020
    """
    check_range("learning_free", 1e-9, 1, start=start)
    check_range("learning_free", 1e-3, 1e3, coefficient=coefficient)
    check_range("learning_free", 1.01, 1e9, growth=growth)
    check_range("learning_free", 1e-3, 0.99, until=until)
    check_range("learning_free", 1, 1e9, later=later)
    pace = math.log(growth) / until
    most = later**UNSETTLED
    later_pace = math.log(later) / (1 - until)

    def init() -> Distance:
        zeros = {name: jnp.float32(0) for name in Distance._fields}
        return Distance(**zeros | {"weight": jnp.float32(1)})

    def update(
        signals: Mapping[str, Any], state: Distance
    ) -> tuple[dict[str, Any], Distance]:
        base, first, d = _begun(signals, state, start)
        product = signals["gradient_dot_distance"]
        # one step of so many is measured, and counts for them all
        steps = signals["gradient_steps"]
        r = MEMORY**steps * state.numerator + steps * state.weight * product
        s_norm = signals["gradient_sum_norm"]
        bound = coefficient * r / jnp.maximum(s_norm, TINY)
        usable = jnp.isfinite(bound) & jnp.isfinite(r)

        early = state.warm == 0
        pace_now = jnp.where(early, pace, later_pace)
        fastest = _greatest_growth(signals, pace_now, steps)
        d = jnp.where(
            usable,
            jnp.clip(bound, d, fastest * d),
            d,
        )

        w = jnp.minimum(d / jnp.maximum(first, LEAST), HIGHEST) ** 2
        steep = d > STEEP * state.level
        since = jnp.where(steep, 0.0, state.since + usable * steps)
        over = early & (signals["progress"] > until) & (since >= SLOW)
        after = Distance(
            base,
            first,
            estimate=d,
            numerator=jnp.where(usable, r, state.numerator),
            weight=jnp.where(first > 0, w, 1.0),
            level=jnp.where(steep, d, state.level),
            since=jnp.minimum(since, HIGHEST),
            warm=jnp.where(over, d, state.warm),
        )
        # d is above 0 times anything where the warm-up has not ended
        grown = d > most * after.warm
        unsettled = (signals["progress"] >= 1) & grown & (later > 1)
        moves = {
            "learning_rate": d / base,
            "gradient_weight": after.weight,
            "notice": jnp.where(unsettled, 1.0, 0.0),
        }
        return moves, after

    return Policy(
        "learning_free",
        init,
        update,
        watches=(
            "gradient_dot_distance",
            "gradient_sum_norm",
            "gradient_steps",
            "loss",
            "base_rate",
            "step",
            "progress",
        ),
        moves=("learning_rate", "gradient_weight", "notice"),
        notices=(NOTICE,),
        check=admission.check,
    )


def _begun(
    signals: Mapping[str, Any],
    state: Distance,
    start: float,
) -> tuple[Any, Any, Any]:
    """Return the base, d_0 and d; the first usable step makes them of its signals."""
    fresh = state.first == 0
    base = jnp.nan_to_num(signals["base_rate"], posinf=0.0)
    base = jnp.where(
        state.base == 0,
        jnp.maximum(base, 1e-20),
        state.base,
    )
    # the sum of the absolute entries of the only gradient so far
    slope = signals["gradient_sum_norm"]
    length = start * jnp.abs(signals["loss"]) / slope
    usable = jnp.isfinite(length) & jnp.isfinite(slope) & (slope > 0)
    length = jnp.where(
        usable,
        jnp.clip(length, LEAST, MOST),
        0.0,
    )
    first = jnp.where(fresh, length, state.first)
    return base, first, jnp.where(fresh, first, state.estimate)


def _greatest_growth(
    signals: Mapping[str, Any],
    pace: Any,
    steps: Any,
) -> Any:
    """Return the factor by which d may grow in this step.

    Args:
      signals: of this step.
      pace: logarithm of the growth in a whole run.
      steps: the steps that this one counts for.
    """
    step = signals["progress"] / (signals["step"] + 1)
    known = jnp.isfinite(step) & (step > 0)
    even = jnp.exp(jnp.minimum(step, 1.0) * pace * steps)
    return jnp.where(
        known,
        jnp.clip(even, 1.0, FASTEST),
        jnp.minimum(BLIND**steps, FASTEST),
    )
